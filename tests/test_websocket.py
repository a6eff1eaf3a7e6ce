"""Live streams over WebSocket, through a real server on a real socket.

Invariant: the same session as over gRPC; every stream gets all of its samples, or an error and its close
code.
"""

import json
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import pytest
import running
from running import TIMEOUT_SECONDS
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from percepnet.enhancer import Enhancer
from percepnet.stream import enhance
from percepnet.synthesis import Controls
from service.main import Server

RATE = 16_000
CONFIG = {"sample_rate_hz": RATE, "encoding": "ENCODING_S16LE"}


class Service(running.Service):
    """A running server and connections to it."""

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self.url = "ws://{}:{}/v1/stream".format(*self.address)

    def connect(self, **choices: Any) -> ClientConnection:
        return connect(self.url, open_timeout=TIMEOUT_SECONDS, ping_interval=None, **choices)

    @contextmanager
    def stream(self, **config: Any) -> Iterator[ClientConnection]:
        """A connection whose config was sent and answered."""
        with self.connect() as call:
            send(call, config=CONFIG | config)
            assert "started" in text(call)
            yield call


def send(call: ClientConnection, **message: Any) -> None:
    call.send(json.dumps(message))


def text(call: ClientConnection) -> dict[str, Any]:
    message = call.recv(timeout=TIMEOUT_SECONDS)
    assert isinstance(message, str)
    return json.loads(message)


def audio(call: ClientConnection) -> bytes:
    message = call.recv(timeout=TIMEOUT_SECONDS)
    assert isinstance(message, bytes)
    return message


def read_on(call: ClientConnection) -> None:
    while True:
        call.recv(timeout=TIMEOUT_SECONDS)


def speak_on(call: ClientConnection) -> None:
    while True:
        call.send(bytes(4 * RATE))


def ending(call: ClientConnection) -> tuple[int, str]:
    """The code and the reason that a connection is closed with."""
    with pytest.raises(ConnectionClosed) as closed:
        read_on(call)
    assert closed.value.rcvd is not None
    return closed.value.rcvd.code, closed.value.rcvd.reason


serving = partial(running.serving, Service)


@pytest.fixture(scope="module")
def service(enhancer: Enhancer) -> Iterator[Service]:
    with serving(enhancer, max_streams=4, shutdown_grace_seconds=2) as service:
        yield service


def pcm16(n_samples: int) -> bytes:
    noise = 0.1 * np.random.default_rng(0).standard_normal(n_samples)
    return (noise * 32_768).astype("<i2").tobytes()


def enhanced(data: bytes, enhancer: Enhancer) -> np.ndarray:
    samples = np.frombuffer(data, "<i2") / np.float32(32_768)
    clean = enhance(samples, RATE, enhancer=enhancer)
    return np.rint(clean * 32_768).clip(-32_768, 32_767)


def test_a_stream_is_the_offline_result(service: Service, enhancer: Enhancer) -> None:
    data = pcm16(3_217)
    output = []
    with service.connect() as call:
        send(call, config=CONFIG)
        started = text(call)["started"]
        assert started["model_name"] == "random"
        assert started["config"]["parameters"] == asdict(Controls())
        for start in range(0, len(data), 320):
            call.send(data[start : start + 320])
            output.append(audio(call))
            assert len(output[-1]) == len(data[start : start + 320])
        send(call, end={})
        last = text(call)["audio"]
        assert last["flushed"]
        assert isinstance(last["position"], int)
        output.append(audio(call))
        assert ending(call) == (1000, "")
    delay = started["delay_samples"]
    samples = np.frombuffer(b"".join(output), "<i2")[delay:]
    np.testing.assert_array_equal(samples, enhanced(data, enhancer))


def test_parameters_flushes_and_reports_come_as_texts(service: Service) -> None:
    with service.stream(compensate_delay=True, report=True) as call:
        call.send(pcm16(1_600))
        described = text(call)["audio"]
        assert described["position"] == 0
        assert 0 < described["report"]["mean_gain"] <= 1
        first = audio(call)
        send(call, flush={})
        assert text(call)["audio"]["flushed"]
        assert len(first) + len(audio(call)) == 3_200
        send(call, parameters={"mix": 0, "postfilter": 0.5})
        in_force = asdict(Controls(mix=0, postfilter=0.5))
        assert text(call) == {"parameters": {"parameters": in_force, "position": 0}}
        send(call, end={})
        assert text(call)["audio"]["flushed"]
        assert audio(call) == b""
        assert ending(call) == (1000, "")


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([b"ab"], "payload: the first message is audio"),
        (["{}"], "payload: the first message is nothing"),
        (["not JSON"], "the text is no EnhanceStreamRequest in JSON"),
        (["[1, 2]"], "the text is no EnhanceStreamRequest in JSON: it is [1, 2]; accepted is an object"),
        (["null"], "the text is no EnhanceStreamRequest in JSON: it is null; accepted is an object"),
        (['{"end": true}'], "the text is no EnhanceStreamRequest in JSON: end is true; accepted is {}"),
        (["[" * 100_000], "the text is no EnhanceStreamRequest in JSON"),
        ([{"confg": CONFIG}], 'no field named "confg"'),
        ([{"config": CONFIG | {"sample_rate": 1}}], 'no field named "sample_rate"'),
        ([{"config": CONFIG | {"sample_rate_hz": 7_999}}], "config.sample_rate_hz: 7999; accepted are 8000"),
        ([{"config": CONFIG | {"sample_rate_hz": -1}}], "sample_rate_hz"),
        ([{"config": CONFIG | {"encoding": "MP3"}}], "MP3"),
        ([{"config": CONFIG | {"encoding": float("inf")}}], "infinity"),
        ([{"config": CONFIG | {"encoding": "\ud800"}}], "encode character '\\ud800'"),
        ([{"config": CONFIG | {"parameters": {"mix": "\ud800"}}}], r"parse float: \ud800"),
        ([{"\ud800": 1}], "encode character '\\ud800'"),
        ([{"config": {"sample_rate_hz": RATE}}], "config.encoding: 0; accepted are ENCODING_S16LE and"),
        ([{"config": CONFIG | {"parameters": {"mix": "NaN"}}}], "config.parameters.mix: nan"),
        (
            [{"config": CONFIG | {"parameters": {"postfilter": 2}}}],
            "config.parameters.postfilter: 2; accepted",
        ),
        ([{"config": CONFIG | {"parameters": {"postfilter": "off"}}}], "off at EnhanceStreamRequest.config"),
        ([{"config": CONFIG}, {"config": CONFIG}], "payload: config came"),
        ([{"config": CONFIG}, b"abc"], "audio: 3 bytes; samples have 2 bytes each"),
        ([{"config": CONFIG}, bytes(2 * RATE + 2)], "audio: 16001 samples; accepted are 16000"),
    ],
)
def test_a_wrong_message_is_told_and_harms_no_other_stream(
    service: Service, messages: list[Any], told: str
) -> None:
    with service.stream() as bystander:
        bystander.send(pcm16(333))
        assert len(audio(bystander)) == 666
        with service.connect() as call:
            for message in messages:
                call.send(json.dumps(message) if isinstance(message, dict) else message)
            answer = text(call)
            if "started" in answer:
                answer = text(call)
            assert answer["error"]["code"] == "bad_parameter"
            assert told in answer["error"]["detail"]
            code, reason = ending(call)
            assert code == 4422
            assert reason
            assert answer["error"]["detail"].startswith(reason)
        bystander.send(pcm16(160))
        assert len(audio(bystander)) == 320


def test_all_that_is_sent_at_once_is_answered(service: Service) -> None:
    with service.stream() as call:
        pongs = [call.ping() for _ in range(2_000)]
        for _ in range(500):
            call.send(bytes(2))
        send(call, end={})
        answers = list(call)
    assert all(pong.wait(TIMEOUT_SECONDS) for pong in pongs)
    assert sum(len(answer) for answer in answers[:500]) == 1_000


def test_a_message_over_the_limit_ends_the_stream(service: Service) -> None:
    before = service.metric('percepnet_streams_total{outcome="too_large"}')
    with service.stream() as call:
        call.send(bytes((1 << 20) + 2))
        assert ending(call)[0] == 1009
    service.wait_for('percepnet_streams_total{outcome="too_large"}', before + 1)


def test_one_stream_too_many_is_told_and_places_come_back(service: Service) -> None:
    service.wait_for("percepnet_streams_active", 0)
    with ExitStack() as held:
        for _ in range(4):
            held.enter_context(service.stream())
        with service.connect() as call:
            send(call, config=CONFIG)
            error = text(call)["error"]
            assert (error["code"], error["retry_seconds"]) == ("busy", 1)
            assert ending(call) == (4503, "all 4 live streams of this server are taken")
    service.wait_for("percepnet_streams_active", 0)


@pytest.mark.parametrize("path", ["/v1/streams", "/enhance", "/v1/stream/"])
def test_another_path_is_told_to_be_wrong(service: Service, path: str) -> None:
    with pytest.raises(InvalidStatus) as refused:
        connect(service.url.replace("/v1/stream", path), open_timeout=TIMEOUT_SECONDS)
    response = refused.value.response
    assert response.status_code == 404
    assert json.loads(response.body)["detail"] == f"{path} is no WebSocket; /v1/stream is"


def test_only_the_known_subprotocol_is_accepted(service: Service) -> None:
    with service.connect(subprotocols=["other", "percepnet.v1"]) as call:
        assert call.subprotocol == "percepnet.v1"
    with service.connect() as call:
        assert call.subprotocol is None


def test_a_caller_that_vanishes_leaves_nothing_behind(service: Service) -> None:
    before = service.metric('percepnet_streams_total{outcome="client_gone"}')
    for abruptly in (True, False):
        with service.stream() as call:
            call.send(pcm16(100))
            if abruptly:
                call.socket.close()
    service.wait_for('percepnet_streams_total{outcome="client_gone"}', before + 2)
    service.wait_for("percepnet_streams_active", 0)


def test_silence_is_ended(enhancer: Enhancer) -> None:
    with serving(enhancer, stream_idle_seconds=0.4) as service, service.connect() as unopened:
        with service.stream() as silent:
            assert text(silent)["error"] == {"code": "idle", "detail": "nothing was sent for 0.4 s"}
            assert ending(silent) == (4408, "nothing was sent for 0.4 s")
        assert ending(unopened)[0] == 4408


def test_a_caller_that_does_not_read_is_held_up_and_given_up(enhancer: Enhancer) -> None:
    """Its audio stops being taken after the queue and the buffers are full; its place is free again."""
    choices = {"stream_idle_seconds": 0.6, "stream_queue_seconds": 0.5}
    narrow = socket.socket()  # whose buffers fill soon
    for buffer in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        narrow.setsockopt(socket.SOL_SOCKET, buffer, 4_096)
    with serving(enhancer, **choices) as service:
        narrow.connect(service.address)
        with service.connect(sock=narrow, max_queue=1, close_timeout=0) as caller:
            send(caller, config=CONFIG | {"encoding": "ENCODING_F32LE"})
            with pytest.raises(ConnectionClosed):
                speak_on(caller)
        service.wait_for("percepnet_streams_active", 0)
        assert service.metric('percepnet_streams_total{outcome="slow_reader"}') == 1
        assert service.metric("percepnet_stream_audio_seconds_total") < 100


def test_stopping_tells_live_streams_and_lets_them_end(enhancer: Enhancer) -> None:
    with (
        serving(enhancer, shutdown_grace_seconds=TIMEOUT_SECONDS) as service,
        service.stream() as call,
        service.connect() as unopened,
    ):
        service.server.should_exit = True
        assert ending(unopened)[0] == 4503
        call.send(pcm16(160))
        assert text(call)["audio"]["draining"]
        assert len(audio(call)) == 320
        with service.connect() as late:
            assert ending(late)[0] == 4503
        call.send(pcm16(160))
        assert len(audio(call)) == 320
        send(call, end={})
        assert text(call)["audio"]["flushed"]
        assert audio(call)
        assert ending(call) == (1000, "")


def test_a_stream_that_outlives_the_grace_is_told(enhancer: Enhancer) -> None:
    with serving(enhancer, shutdown_grace_seconds=0.3) as service, service.stream() as call:
        started = time.monotonic()
        service.server.should_exit = True
        assert ending(call)[0] == 4503
        assert time.monotonic() - started < TIMEOUT_SECONDS


def test_a_stream_leaves_two_lines_that_keep_the_trace(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    service.wait_for("percepnet_streams_active", 0)
    with caplog.at_level(logging.INFO):
        with service.connect(additional_headers={"traceparent": trace}) as call:
            send(call, config=CONFIG)
            send(call, end={})
            assert ending(call)[0] == 1000
        lines = [record for record in caplog.records if record.name.startswith(("percepnet", "uvicorn"))]
    assert [line.getMessage() for line in lines] == ["stream opened", "stream closed"]
    assert {line.fields["traceparent"] for line in lines} == {trace}  # type: ignore[attr-defined]
