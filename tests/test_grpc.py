"""The gRPC interface, through a real server on a real socket.

Invariant: every stream gets all of its samples, or one status that names what was wrong; nothing that a
stream does reaches another one, and nothing stays behind.
"""

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from functools import partial
from queue import SimpleQueue
from typing import Any

import grpc
import numpy as np
import pytest
import running
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from running import TIMEOUT_SECONDS, eventually

from percepnet.enhancer import Enhancer
from percepnet.errors import ParameterError
from percepnet.model import Model
from percepnet.stream import enhance
from percepnet.synthesis import Controls
from service import streams
from service.client import Client, LiveStream
from service.main import Server
from service.messages import parameters
from service.pb.percepnet_service.v1 import enhancement_pb2 as pb
from service.settings import Address, Settings

STATUS = "/percepnet_service.v1.EnhancementService/GetStatus"
RATE = 16_000

Request = pb.EnhanceStreamRequest
CONFIG = pb.StreamConfig(sample_rate_hz=RATE, encoding=pb.ENCODING_S16LE)


class Service(running.Service):
    """A running server, a channel and a client to it."""

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self.target = f"127.0.0.1:{server.grpc.port}"
        # The caller's own window is part of what a slow reader piles up; here it must not grow.
        self.channel = grpc.insecure_channel(self.target, [("grpc.http2.bdp_probe", 0)])
        self.client = Client(self.target, patience_seconds=0)

    def stream(self, requests: Iterable[Request | bytes]) -> Any:
        """Open an EnhanceStream with any messages, garbage included."""
        call = self.channel.stream_stream(
            "/percepnet_service.v1.EnhancementService/EnhanceStream",
            lambda request: request if isinstance(request, bytes) else request.SerializeToString(),
            pb.EnhanceStreamResponse.FromString,
        )
        return call(iter(requests), timeout=TIMEOUT_SECONDS)

    def refused(self, *requests: Request | bytes) -> tuple[grpc.StatusCode, str]:
        """The status that a stream of some messages ends with."""
        with pytest.raises(grpc.RpcError) as caught:
            list(self.stream(requests))
        return caught.value.code(), caught.value.details()

    def close(self) -> None:
        self.client.close()
        self.channel.close()
        super().close()


serving = partial(running.serving, Service)


@pytest.fixture(scope="module")
def service(enhancer: Enhancer) -> Iterator[Service]:
    with serving(enhancer, max_streams=4, shutdown_grace_seconds=2) as service:
        yield service


@pytest.fixture
def bystander(service: Service) -> Iterator[LiveStream]:
    """A stream that must go on as if nothing had happened."""
    with service.client.stream(RATE) as stream:
        stream.push(noise(333))
        yield stream
        assert len(stream.push(noise(160))) == 160
        assert len(stream.end()) == stream.delay_samples


def noise(n_samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(n_samples)).astype(np.float32)


def pcm16(n_samples: int) -> bytes:
    return (noise(n_samples) * 32_768).astype("<i2").tobytes()


def test_grpc_knows_how_it_is_told_to_read() -> None:
    """It says so on stderr when a newer one does not; then `read_directly` has to go."""
    code = (
        "from service import wakeups; wakeups.read_directly()\n"
        "import grpc; server = grpc.server(None); server.add_insecure_port('127.0.0.1:0')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_live_stream_is_the_offline_result(service: Service, enhancer: Enhancer) -> None:
    samples = noise(3_217)
    with service.client.stream(RATE) as stream:
        assert stream.started.model_name == "random"
        assert stream.delay_samples > 480
        outputs = []
        for i, start in enumerate(range(0, len(samples), 160)):
            chunk = samples[start : start + 160]
            outputs.append(stream.push(chunk))
            assert len(outputs[-1]) == len(chunk)
            assert stream.last is not None
            assert stream.last.position == 160 * i - stream.delay_samples
        outputs.append(stream.end())
    output = np.concatenate(outputs)
    np.testing.assert_array_equal(output[stream.delay_samples :], enhance(samples, RATE, enhancer=enhancer))


def test_a_stream_is_told_its_settings_with_all_defaults(service: Service) -> None:
    with service.client.stream(48_000, message_samples=480) as stream:
        config = stream.started.config
        assert stream.delay_samples == 1440
        assert (config.sample_rate_hz, config.encoding) == (48_000, pb.ENCODING_F32LE)
        assert config.parameters == parameters(Controls())
        assert stream.started.idle_timeout_seconds == 30
        with pytest.raises(ParameterError, match="7 samples; this stream takes multiples of 480"):
            stream.push(noise(7))


def test_closing_the_sending_side_flushes_the_tail(service: Service, enhancer: Enhancer) -> None:
    config = pb.StreamConfig(sample_rate_hz=RATE, encoding=pb.ENCODING_S16LE, compensate_delay=True)
    data = pcm16(2_000)
    _, *answers = service.stream([Request(config=config), Request(audio=data), Request(audio=b"")])
    output = np.frombuffer(b"".join(answer.audio.audio for answer in answers), "<i2")
    expected = enhance(np.frombuffer(data, "<i2") / np.float32(32_768), RATE, enhancer=enhancer)
    np.testing.assert_array_equal(output, np.rint(expected * 32_768).clip(-32_768, 32_767))
    assert [answer.audio.flushed for answer in answers] == [False, False, True]


def test_parameters_change_and_passages_end_inside_a_stream(service: Service, enhancer: Enhancer) -> None:
    samples = noise(1_600)
    with service.client.stream(RATE, compensate_delay=True, report=True) as stream:
        passages = [np.concatenate([stream.push(samples), stream.flush()])]
        assert stream.last is not None
        assert stream.last.flushed
        assert 0 < stream.last.report.mean_gain <= 1
        assert stream.update(Controls(mix=0)) == 0
        passages.append(np.concatenate([stream.push(samples), stream.end()]))
    for passage, controls in zip(passages, (Controls(), Controls(mix=0)), strict=True):
        np.testing.assert_array_equal(passage, enhance(samples, RATE, controls=controls, enhancer=enhancer))


@pytest.mark.parametrize(
    ("requests", "told"),
    [
        ([Request(audio=b"")], "the first message is audio"),
        ([Request()], "the first message is nothing"),
        ([b"\xff\xff garbage"], "no percepnet_service.v1.EnhanceStreamRequest"),
        ([Request(config=pb.StreamConfig())], "config.sample_rate_hz: 0; accepted are 8000 to 48000"),
        ([Request(config=pb.StreamConfig(sample_rate_hz=96_000))], "config.sample_rate_hz: 96000"),
        ([Request(config=pb.StreamConfig(sample_rate_hz=RATE))], "config.encoding: 0; accepted are ENCODING"),
        (
            [Request(config=pb.StreamConfig(sample_rate_hz=RATE, encoding=7))],  # type: ignore[arg-type]
            "config.encoding: 7",
        ),
        (
            [
                Request(
                    config=pb.StreamConfig(
                        sample_rate_hz=RATE, encoding=pb.ENCODING_S16LE, parameters=pb.Parameters(mix=1.5)
                    )
                )
            ],
            "config.parameters.mix: 1.5",
        ),
        (
            [
                Request(
                    config=pb.StreamConfig(
                        sample_rate_hz=RATE, encoding=pb.ENCODING_S16LE, message_samples=RATE + 1
                    )
                )
            ],
            "config.message_samples: 16001; accepted are 0 to 16000",
        ),
        ([Request(config=CONFIG), Request(config=CONFIG)], "payload: config came"),
        ([Request(config=CONFIG), Request()], "payload: nothing came"),
        ([Request(config=CONFIG), Request(audio=b"abc")], "audio: 3 bytes"),
        ([Request(config=CONFIG), Request(audio=bytes(2 * RATE + 2))], "audio: 16001 samples"),
        (
            [Request(config=CONFIG), Request(parameters=pb.Parameters(attenuation_limit_db=float("nan")))],
            "parameters.attenuation_limit_db: nan; accepted are 0 to 100",
        ),
        (
            [Request(config=CONFIG), Request(parameters=pb.Parameters(postfilter=-1))],
            "parameters.postfilter: -1; accepted are 0 to 1",
        ),
        ([Request(config=CONFIG), Request(audio=pcm16(999)), b"\xff"], "no percepnet_service.v1"),
    ],
)
def test_a_wrong_message_names_its_field_and_harms_no_other_stream(
    service: Service,
    bystander: LiveStream,
    requests: list[Request | bytes],
    told: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "percepnet.service"):
        code, details = service.refused(*requests)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert told in details
    line = caplog.records[-1].fields  # type: ignore[attr-defined]
    assert (line["outcome"], line["detail"]) == ("bad_parameter", details)


def test_a_stream_without_a_message_is_no_error(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "percepnet.service"):
        assert list(service.stream([])) == []
        eventually(lambda: bool(caplog.records), "the log line")
    assert caplog.messages == ["stream left before its config"]


def test_streams_beyond_the_capacity_are_told_when_to_come_back(service: Service) -> None:
    service.wait_for("percepnet_streams_active", 0)
    rejected = service.metric("percepnet_streams_rejected_total")
    streams = [service.client.stream(RATE) for _ in range(4)]
    with pytest.raises(grpc.RpcError) as refused:
        service.client.stream(RATE)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert dict(refused.value.trailing_metadata())["grpc-retry-pushback-ms"] == "1000"
    assert service.metric("percepnet_streams_rejected_total") == rejected + 1
    status = service.client.status()
    assert (status.active_streams, status.stream_capacity, status.accepting) == (4, 4, False)
    for stream in streams:
        assert len(stream.push(noise(160))) == 160
        stream.end()
    service.wait_for("percepnet_streams_active", 0)
    assert service.client.status().accepting


def test_callers_that_vanish_leave_nothing_behind(service: Service) -> None:
    before = service.metric('percepnet_streams_total{outcome="client_gone"}')
    for _ in range(6):
        with service.client.stream(RATE) as stream:
            stream.push(noise(100))
    service.wait_for('percepnet_streams_total{outcome="client_gone"}', before + 6)
    service.wait_for("percepnet_streams_active", 0)


def test_a_clip_is_enhanced_without_delay(service: Service, enhancer: Enhancer) -> None:
    samples = noise(5_000)
    clean = service.client.enhance(samples, RATE, controls=Controls(mix=0.5))
    expected = enhance(samples, RATE, controls=Controls(mix=0.5), enhancer=enhancer)
    np.testing.assert_array_equal(clean, expected)


@pytest.mark.parametrize(("rate", "longest"), [(8_000, 480_000), (48_000, 1_048_320)])
def test_the_longest_clip_fits_what_grpc_takes_by_default(service: Service, rate: int, longest: int) -> None:
    samples = noise(longest + 1)
    assert len(clip(service, samples[:-1], rate).result().audio) == 4 * longest
    refused = clip(service, samples, rate)
    assert refused.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.details() == f"audio: {longest + 1} samples; accepted are {longest} in a message"
    with pytest.raises(ParameterError, match=f"{longest + 1} samples; a clip takes {longest}"):
        service.client.enhance(samples, rate)


def test_a_clip_without_audio_is_refused(service: Service) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        service.client.enhance(noise(0), RATE)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "audio: empty" in refused.value.details()


def test_health_and_reflection_answer(service: Service) -> None:
    health = health_pb2_grpc.HealthStub(service.channel)
    names = "percepnet_service.v1.EnhancementService nvidia.maxine.bnr.v1.MaxineBNR nvidia.ai4m.bnr.v1.BNR"
    for name in ("", *names.split()):
        response = health.Check(health_pb2.HealthCheckRequest(service=name))
        assert response.status == health_pb2.HealthCheckResponse.SERVING
    listing = reflection_pb2.ServerReflectionRequest(list_services="")
    (answer,) = reflection_pb2_grpc.ServerReflectionStub(service.channel).ServerReflectionInfo(
        iter([listing])
    )
    names = {found.name for found in answer.list_services_response.service}
    assert "percepnet_service.v1.EnhancementService" in names


@pytest.mark.parametrize(
    ("method", "requests", "told"),
    [
        (STATUS, [], "without a request"),
        (STATUS, [b"\xff"], "GetStatusRequest"),
        ("/grpc.health.v1.Health/Check", [], "without a request"),
        ("/grpc.health.v1.Health/Check", [b"\xff"], "no message of its kind"),
        ("/grpc.health.v1.Health/Watch", [], "without a request"),
        (
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            [b"\xff"],
            "no message of its kind",
        ),
    ],
)
def test_a_request_that_is_missing_or_garbage_is_told(
    service: Service, method: str, requests: list[bytes], told: str
) -> None:
    call: Any = service.channel.stream_stream(method)(iter(requests), timeout=TIMEOUT_SECONDS)
    assert call.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert told in call.details()


def test_a_silent_caller_of_status_is_counted(enhancer: Enhancer) -> None:
    with serving(enhancer, max_streams=1, stream_idle_seconds=0.1) as service:
        requests: SimpleQueue[Any] = SimpleQueue()
        call: Any = service.channel.stream_stream(STATUS)(iter(requests.get, None), timeout=TIMEOUT_SECONDS)
        assert call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        service.wait_for('percepnet_rpcs_total{method="GetStatus",outcome="idle"}', 1)
        requests.put(None)


def test_callers_may_ask_whether_the_connection_lives_while_nothing_is_said(service: Service) -> None:
    """Three times too early, and gRPC would hang up, on connections with calls and without."""
    options = [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.keepalive_time_ms", 1_500),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    with (
        grpc.insecure_channel(service.target, options) as idle,
        grpc.insecure_channel(service.target, options) as busy,
    ):
        states: list[grpc.ChannelConnectivity] = []
        idle.subscribe(states.append, try_to_connect=True)
        with pytest.raises(grpc.RpcError) as ended:
            list(health_pb2_grpc.HealthStub(busy).Watch(health_pb2.HealthCheckRequest(), timeout=6))
        assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert states[-1] is grpc.ChannelConnectivity.READY


def test_metrics_count_streams_audio_and_time(service: Service) -> None:
    service.wait_for("percepnet_streams_active", 0)
    names = (
        'percepnet_streams_total{outcome="ok"}',
        "percepnet_stream_audio_seconds_total",
        "percepnet_stream_latency_seconds_count",
        "percepnet_tick_streams_sum",
        "percepnet_stream_open_seconds_total",
    )
    before = [service.metric(name) for name in names]
    stages = [f'percepnet_cpu_seconds_total{{stage="{stage}"}}' for stage in ("dsp", "network", "transport")]
    cpu_before = [service.metric(stage) for stage in stages]
    with service.client.stream(RATE) as stream:
        for _ in range(20):
            stream.push(noise(160))
        stream.end()
    service.wait_for("percepnet_streams_active", 0)
    grown = [service.metric(name) - was for name, was in zip(names, before, strict=True)]
    assert grown[0] == 1
    assert grown[1] == pytest.approx(0.2)
    assert grown[2] == 21
    assert grown[3] >= 20
    assert 0 < grown[4] < TIMEOUT_SECONDS
    assert all(service.metric(stage) > was for stage, was in zip(stages, cpu_before, strict=True))


def test_the_stages_are_all_of_the_process_cpu_time(service: Service) -> None:
    text = service.http.get("/metrics").text.splitlines()
    stages = [float(line.split()[-1]) for line in text if line.startswith("percepnet_cpu_seconds_total{")]
    assert len(stages) == 4
    (process,) = (float(line.split()[-1]) for line in text if line.startswith("process_cpu_seconds_total "))
    assert sum(stages) == pytest.approx(process, abs=0.1)


def test_a_stream_leaves_two_lines_that_keep_the_trace(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    call = service.channel.stream_stream(
        "/percepnet_service.v1.EnhancementService/EnhanceStream",
        Request.SerializeToString,
        pb.EnhanceStreamResponse.FromString,
    )
    with caplog.at_level(logging.INFO, "percepnet.service"):
        requests = [Request(config=CONFIG), Request(audio=pcm16(800))]
        list(call(iter(requests), metadata=(("traceparent", trace),), timeout=TIMEOUT_SECONDS))
        lines = [record for record in caplog.records if getattr(record, "fields", {}).get("traceparent")]
    assert [line.getMessage() for line in lines] == ["stream opened", "stream closed"]
    assert lines[1].fields["audio_seconds"] == 0.05  # type: ignore[attr-defined]
    assert "detail" not in lines[1].fields  # type: ignore[attr-defined]
    assert {line.fields["traceparent"] for line in lines} == {trace}  # type: ignore[attr-defined]


def test_a_silent_stream_is_closed_and_a_speaking_one_is_not(enhancer: Enhancer) -> None:
    with serving(enhancer, stream_idle_seconds=1) as service, service.client.stream(RATE) as speaking:
        silent: SimpleQueue[Request | None] = SimpleQueue()
        silent.put(Request(config=CONFIG))
        unopened: SimpleQueue[Request | None] = SimpleQueue()
        calls = [service.stream(iter(requests.get, None)) for requests in (silent, unopened)]
        assert next(calls[0]).WhichOneof("payload") == "started"
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while any(call.is_active() for call in calls):
            speaking.push(noise(160))
            assert time.monotonic() < deadline
            time.sleep(0.02)
        for call in calls:
            assert call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert call.details() == "nothing was sent for 1 s"
        silent.put(None)
        unopened.put(None)
        assert len(speaking.end()) == speaking.delay_samples


def endless(taken: list[Request]) -> Iterator[Request]:
    """What a caller sends who never stops to speak; taken: as much of it as was taken."""
    yield Request(config=CONFIG)
    while True:
        taken.append(Request(audio=bytes(10_000)))
        yield taken[-1]


def test_a_caller_that_does_not_read_is_held_up_and_then_told(enhancer: Enhancer) -> None:
    """Its audio stops being taken after the queue and the transport's windows are full."""
    taken: list[Request] = []
    with serving(enhancer, stream_idle_seconds=1, stream_queue_seconds=0.5) as service:
        call = service.stream(endless(taken))
        service.wait_for('percepnet_streams_total{outcome="slow_reader"}', 1)
        service.wait_for("percepnet_streams_active", 0)
        assert len(taken) < 100
        with pytest.raises(grpc.RpcError, match="the answers were not read for 1 s"):
            list(call)
        assert call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_caller_that_was_cut_and_still_does_not_read_holds_nobody_up(enhancer: Enhancer) -> None:
    choices = {"max_streams": 1, "stream_idle_seconds": 1, "shutdown_grace_seconds": TIMEOUT_SECONDS}
    with serving(enhancer, **choices) as service:
        unread = service.stream(endless([]))
        service.wait_for('percepnet_streams_total{outcome="slow_reader"}', 1)
        with service.client.stream(RATE) as stream:
            assert len(stream.push(noise(160))) == 160
            stream.end()
        stopping = time.monotonic()
    assert time.monotonic() - stopping < TIMEOUT_SECONDS / 2
    eventually(lambda: not unread.is_active(), "the end of the call")


def test_callers_that_never_read_cannot_go_on_for_ever(
    enhancer: Enhancer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over one connection; what was cut stays in memory until it is read."""
    monkeypatch.setattr(streams, "MAX_UNREAD", 1)
    with serving(enhancer, max_streams=2, stream_idle_seconds=1) as service:

        def is_refused(method: str) -> bool:
            call: Any = service.channel.stream_stream(f"/percepnet_service.v1.EnhancementService/{method}")
            ended = call(iter([]), timeout=TIMEOUT_SECONDS)
            full = ended.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert not full or "streams over this connection have ended" in ended.details()
            return full

        unread = service.stream(endless([]))
        eventually(lambda: is_refused("EnhanceStream"), "a refusal")
        assert is_refused("EnhanceStreams")
        with service.client.stream(RATE) as stream:  # over another one
            stream.end()
        unread.cancel()
        eventually(lambda: not is_refused("EnhanceStream"), "a place")


def test_stopping_refuses_new_streams_and_lets_live_ones_end(enhancer: Enhancer) -> None:
    choices = {"shutdown_grace_seconds": TIMEOUT_SECONDS}
    with serving(enhancer, **choices) as service, service.client.stream(RATE) as stream:
        stream.push(noise(160))
        service.server.should_exit = True
        eventually(lambda: service.server.health.stopping, "the end")
        with pytest.raises(grpc.RpcError) as refused:
            service.client.stream(RATE)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        health = health_pb2_grpc.HealthStub(service.channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert len(stream.push(noise(160))) == 160
        assert stream.last is not None
        assert stream.last.draining
        assert len(stream.end()) == stream.delay_samples


def test_while_live_streams_end_http_tells_of_them_and_takes_no_files(enhancer: Enhancer) -> None:
    choices = {"shutdown_grace_seconds": TIMEOUT_SECONDS, "max_streams": 8}
    with serving(enhancer, **choices) as service, service.client.stream(RATE) as stream:
        assert service.metric("percepnet_stopping") == 0
        assert service.metric("percepnet_streams_capacity") == 8
        service.server.should_exit = True
        eventually(lambda: service.server.health.stopping, "the end")
        time.sleep(0.3)  # uvicorn closes what it closes within 0.1 s
        assert service.http.get("/healthz").status_code == 200
        assert service.http.get("/readyz").status_code == 503
        assert service.metric("percepnet_stopping") == 1
        assert service.metric("percepnet_streams_active") == 1
        assert service.metric("percepnet_streams_capacity") == 1  # nobody else is taken
        refused = service.http.post("/enhance", content=bytes(1000))
        assert (refused.status_code, refused.json()["code"]) == (503, "stopping")
        assert int(refused.headers["retry-after"]) > 0
        stream.end()


def speak_on(stream: LiveStream) -> None:
    while True:
        stream.push(noise(160))
        time.sleep(0.01)


def test_a_stream_that_outlives_the_grace_is_told(enhancer: Enhancer) -> None:
    with serving(enhancer, shutdown_grace_seconds=0.3) as service, service.client.stream(RATE) as stream:
        service.server.should_exit = True
        with pytest.raises(grpc.RpcError) as told:
            speak_on(stream)
        assert told.value.code() is grpc.StatusCode.UNAVAILABLE


def clip(service: Service, samples: np.ndarray, rate: int = RATE) -> Any:
    """Send a clip; the answer is to come."""
    request = pb.EnhanceClipRequest(sample_rate_hz=rate, encoding=pb.ENCODING_F32LE, audio=samples.tobytes())
    method = service.channel.unary_unary(
        "/percepnet_service.v1.EnhancementService/EnhanceClip",
        pb.EnhanceClipRequest.SerializeToString,
        pb.EnhanceClipResponse.FromString,
    )
    return method.future(request, timeout=TIMEOUT_SECONDS)


def test_a_server_that_stops_finishes_the_clips_it_has(random_model: Model, enhancer: Enhancer) -> None:
    begun, stopping, samples = threading.Event(), threading.Event(), noise(5_000)

    class Held(Enhancer):
        def process(self, *arguments: Any) -> Any:
            begun.set()
            stopping.wait(TIMEOUT_SECONDS)
            return super().process(*arguments)

    choices = {"shutdown_grace_seconds": TIMEOUT_SECONDS, "max_streams": 1}
    with serving(Held(random_model), **choices) as service:
        call = clip(service, samples)
        begun.wait(TIMEOUT_SECONDS)
        service.server.should_exit = True
        eventually(lambda: service.server.health.stopping, "the end")
        time.sleep(1.5)  # longer than calls are left alone without a grace
        stopping.set()
        clean = np.frombuffer(call.result().audio, "<f4")
    np.testing.assert_array_equal(clean, enhance(samples, RATE, enhancer=enhancer))


def test_a_clip_that_nobody_waits_for_is_not_finished(random_model: Model) -> None:
    blocks = []

    class Slow(Enhancer):
        def process(self, *arguments: Any) -> Any:
            blocks.append(arguments)
            time.sleep(0.05)
            return super().process(*arguments)

    with serving(Slow(random_model), max_streams=1) as service:
        call = clip(service, noise(60 * RATE))
        eventually(lambda: len(blocks) > 0, "the first block")
        call.cancel()
    assert len(blocks) < 30


def test_a_clip_that_fails_through_our_fault_is_counted_and_logged(
    random_model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Enhancer):
        def process(self, *arguments: Any) -> Any:
            raise RuntimeError("broken")

    failures = 'percepnet_rpcs_total{method="EnhanceClip",outcome="internal"}'
    with caplog.at_level(logging.INFO), serving(Broken(random_model), max_streams=1) as service:
        assert f"{failures} 0.0" in service.http.get("/metrics").text
        assert clip(service, noise(160)).code() is grpc.StatusCode.INTERNAL
        service.wait_for(failures, 1)
    (line,) = (vars(record)["fields"] for record in caplog.records if record.getMessage() == "clip")
    assert (line["outcome"], line["audio_seconds"]) == ("internal", 0.01)


def test_a_taken_port_ends_the_process(enhancer: Enhancer, service: Service) -> None:
    settings = Settings(
        http_listen=Address("127.0.0.1", 0), grpc_listen=Address("127.0.0.1", service.server.grpc.port)
    )
    with pytest.raises(SystemExit):
        Server(settings, enhancer).run()
