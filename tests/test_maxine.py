"""Clients of NVIDIA Maxine BNR on our port: what they send, as they send it, and what they then rely on.

Invariant: a live stream gets a chunk of the same size for each of its chunks, a WAV file an equal WAV file,
or one status that names what was wrong.
"""

import io
import logging
import threading
import time
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import grpc
import numpy as np
import pytest
import running
import soundfile
from running import TIMEOUT_SECONDS, eventually

from percepnet.enhancer import Enhancer
from percepnet.stream import Stream, enhance_file
from percepnet.synthesis import MAX_ATTENUATION_LIMIT_DB, Controls
from service.main import Server
from service.pb.nvidia.maxine.bnr.v1 import bnr_pb2 as bnr

NAMES = ("nvidia.maxine.bnr.v1.MaxineBNR", "nvidia.ai4m.bnr.v1.BNR")
PIECE_BYTES = 64 * 1024


class Service(running.Service):
    """A running server and a channel to it."""

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self.channel = grpc.insecure_channel(f"127.0.0.1:{server.grpc.port}")

    def close(self) -> None:
        self.channel.close()
        super().close()

    def enhance_audio(self, requests: Iterable[bnr.EnhanceAudioRequest], name: str = NAMES[0]) -> Any:
        method = self.channel.stream_stream(
            f"/{name}/EnhanceAudio",
            bnr.EnhanceAudioRequest.SerializeToString,
            bnr.EnhanceAudioResponse.FromString,
        )
        return method(iter(requests), timeout=TIMEOUT_SECONDS)

    def refused(self, *requests: bnr.EnhanceAudioRequest) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.RpcError) as caught:
            list(self.enhance_audio(requests))
        return caught.value.code(), caught.value.details()


serving = partial(running.serving, Service)


@pytest.fixture(scope="module")
def service(enhancer: Enhancer) -> Iterator[Service]:
    choices = {"max_streams": 2, "max_requests": 2, "max_upload_mib": 1, "max_channels": 2}
    with serving(enhancer, **choices) as service:
        yield service


def config(ratio: float | None = None) -> bnr.EnhanceAudioRequest:
    return bnr.EnhanceAudioRequest(config=bnr.EnhanceAudioConfig(intensity_ratio=ratio))


def audio(data: bytes) -> bnr.EnhanceAudioRequest:
    return bnr.EnhanceAudioRequest(audio_stream_data=data)


def noise(n_samples: int) -> np.ndarray:
    return (0.1 * np.random.default_rng(0).standard_normal(n_samples)).astype(np.float32)


def chunks(samples: np.ndarray, rate: int) -> list[bnr.EnhanceAudioRequest]:
    return [audio(chunk.tobytes()) for chunk in samples.reshape(-1, rate // 100)]


def wav(rate: int, channels: int, subtype: str) -> bytes:
    file = io.BytesIO()
    samples = noise(2 * rate * channels).reshape(-1, channels)
    soundfile.write(file, samples, rate, subtype, format="WAV")
    return file.getvalue()


def pieces(file: bytes) -> list[bnr.EnhanceAudioRequest]:
    return [audio(file[start : start + PIECE_BYTES]) for start in range(0, len(file), PIECE_BYTES)]


def enhanced(file: bytes, enhancer: Enhancer, ratio: float = 1) -> bytes:
    """The ratio is a share of all that can be removed."""
    target, controls = io.BytesIO(), Controls(MAX_ATTENUATION_LIMIT_DB, mix=ratio)
    enhance_file(io.BytesIO(file), target, controls=controls, enhancer=enhancer)
    return target.getvalue()


def content(file: bytes) -> tuple[np.ndarray, int, str]:
    """Samples, rate and encoding; the rest of a float WAV tells the time when it was written."""
    with soundfile.SoundFile(io.BytesIO(file)) as sound:
        return sound.read(always_2d=True), sound.samplerate, sound.subtype


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rate", [48_000, 16_000])
def test_a_live_stream_gets_a_chunk_for_each_chunk(
    service: Service, enhancer: Enhancer, rate: int, name: str
) -> None:
    samples = noise(rate // 2)
    answers = list(service.enhance_audio(chunks(samples, rate), name))
    assert [len(answer.audio_stream_data) for answer in answers] == [rate // 25] * 50
    output = np.frombuffer(b"".join(answer.audio_stream_data for answer in answers), np.float32)
    stream = Stream(rate, controls=Controls(MAX_ATTENUATION_LIMIT_DB), enhancer=enhancer)
    expected = np.concatenate([stream.push(samples), stream.flush()])[: len(samples)]
    np.testing.assert_array_equal(output, expected)


def test_the_intensity_is_told_first_and_may_change(service: Service) -> None:
    """Nothing removed, the output is the input; later all is."""
    samples = noise(48_000)
    heard = threading.Event()

    def speak() -> Iterator[bnr.EnhanceAudioRequest]:
        yield config(0)
        yield from chunks(samples[:24_000], 48_000)
        heard.wait(TIMEOUT_SECONDS)
        yield config()
        yield from chunks(samples[24_000:], 48_000)

    answers = []
    for answer in service.enhance_audio(speak()):
        answers.append(answer)
        if len(answers) == 51:
            heard.set()
    ratios = [answer.config.intensity_ratio for answer in answers if answer.HasField("config")]
    assert ratios == [0, 1]
    output = np.frombuffer(b"".join(answer.audio_stream_data for answer in answers), np.float32)
    delayed = np.concatenate([np.zeros(1440, np.float32), samples])[: len(output)]
    np.testing.assert_allclose(output[:24_000], delayed[:24_000], atol=1e-5)
    assert np.abs(output[-9_600:] - delayed[-9_600:]).max() > 0.01


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("rate", "channels", "subtype"), [(48_000, 1, "PCM_16"), (22_050, 2, "FLOAT")])
def test_a_wav_file_comes_back_as_one(
    service: Service, enhancer: Enhancer, rate: int, channels: int, subtype: str, name: str
) -> None:
    file = wav(rate, channels, subtype)
    answers = list(service.enhance_audio([config(0.5), *pieces(file)], name))
    assert answers[0].config.intensity_ratio == 0.5
    assert all(0 < len(answer.audio_stream_data) <= PIECE_BYTES for answer in answers[1:])
    result = b"".join(answer.audio_stream_data for answer in answers)
    samples, *kind = content(result)
    expected, *_ = content(enhanced(file, enhancer, 0.5))
    np.testing.assert_array_equal(samples, expected)
    assert kind == [rate, subtype]


def test_a_wav_file_may_come_in_pieces_of_any_size(service: Service, enhancer: Enhancer) -> None:
    file = wav(8_000, 1, "PCM_16")
    cuts = [0, 0, 1, 4, 4, 11, 13, len(file)]
    requests = [audio(file[start:end]) for start, end in pairwise(cuts)]
    result = b"".join(answer.audio_stream_data for answer in service.enhance_audio(requests))
    assert result == enhanced(file, enhancer)


@pytest.mark.parametrize(
    ("requests", "code", "told"),
    [
        ([bnr.EnhanceAudioRequest()], "INVALID_ARGUMENT", "stream_input: nothing came"),
        ([config(1.5)], "INVALID_ARGUMENT", "config.intensity_ratio: 1.5; accepted are 0 to 1"),
        ([config(float("nan"))], "INVALID_ARGUMENT", "config.intensity_ratio: nan"),
        ([audio(bytes(1000))], "INVALID_ARGUMENT", "audio_stream_data: 1000 bytes; accepted are 1920 (10 ms"),
        ([audio(b"RI"), audio(b"FF")], "INVALID_ARGUMENT", "audio_stream_data: 4 bytes; accepted are 1920"),
        ([audio(b"")], "INVALID_ARGUMENT", "audio_stream_data: 0 bytes"),
        (
            [audio(bytes(1920)), audio(bytes(640))],
            "INVALID_ARGUMENT",
            "audio_stream_data: 640 bytes; all chunks of this stream have 1920",
        ),
        ([audio(bytes(640)), config(-1)], "INVALID_ARGUMENT", "config.intensity_ratio: -1"),
        ([audio(wav(8_000, 1, "PCM_16")[:-2])], "INVALID_ARGUMENT", "the file is truncated"),
        ([audio(wav(8_000, 3, "PCM_16"))], "RESOURCE_EXHAUSTED", "the recording has 3 channels"),
        ([audio(b"RIFF    WAVE"), audio(bytes(2**20))], "RESOURCE_EXHAUSTED", "is larger than 1 MiB"),
    ],
)
def test_what_is_wrong_is_named(
    service: Service, requests: list[bnr.EnhanceAudioRequest], code: str, told: str
) -> None:
    status, details = service.refused(*requests)
    assert status.name == code
    assert told in details


def test_an_empty_call_is_no_error(service: Service) -> None:
    assert list(service.enhance_audio([])) == []


def test_they_share_the_places_and_the_books_of_all_streams_and_files(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    eventually(lambda: service.metric("percepnet_streams_active") == 0, "an idle server")
    ended = service.metric('percepnet_streams_total{outcome="ok"}')
    files = service.metric("percepnet_file_audio_seconds_total")
    with caplog.at_level(logging.INFO, "percepnet.service"):
        calls = [service.enhance_audio(endless(bytes(640))) for _ in range(2)]
        eventually(lambda: service.metric("percepnet_streams_active") == 2, "two streams")
        with pytest.raises(grpc.RpcError) as full:
            list(service.enhance_audio([audio(bytes(640))]))
        assert full.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(full.value.trailing_metadata())["grpc-retry-pushback-ms"] == "1000"
        for call in calls:
            call.cancel()
        eventually(lambda: service.metric("percepnet_streams_active") == 0, "an idle server")
        list(service.enhance_audio([audio(bytes(640))]))
        list(service.enhance_audio(pieces(wav(8_000, 1, "PCM_16"))))
        eventually(lambda: service.metric('percepnet_streams_total{outcome="ok"}') == ended + 1, "the end")
    assert service.metric("percepnet_file_audio_seconds_total") == files + 2
    (line,) = (record for record in caplog.records if record.getMessage() == "file streamed")
    assert line.fields["audio_seconds"] == 2  # type: ignore[attr-defined]
    assert line.fields["outcome"] == "ok"  # type: ignore[attr-defined]


def endless(data: bytes) -> Iterator[bnr.EnhanceAudioRequest]:
    while True:
        yield audio(data)


def test_uploads_that_stop_or_never_begin_give_their_places_back(enhancer: Enhancer) -> None:
    limits = {"transfer_timeout_seconds": 0.5, "stream_idle_seconds": 0.5}
    told = threading.Event()

    def held(request: bnr.EnhanceAudioRequest) -> Iterator[bnr.EnhanceAudioRequest]:
        yield request
        told.wait(TIMEOUT_SECONDS)

    with serving(enhancer, max_requests=1, **limits) as service:
        head = audio(wav(8_000, 1, "PCM_16")[:1_000])
        stalled = service.enhance_audio(held(head))
        eventually(lambda: service.metric("percepnet_files_accepted") == 1, "a place taken")
        assert service.refused(head)[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        silent = service.enhance_audio(held(config(1)))
        for call, why in ((stalled, "in the middle of the upload"), (silent, "nothing was sent for 0.5 s")):
            with pytest.raises(grpc.RpcError) as late:
                list(call)
            assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert why in late.value.details()
        told.set()
        assert service.metric("percepnet_files_accepted") == 0


def test_a_server_that_stops_finishes_the_files_it_has(enhancer: Enhancer) -> None:
    file = wav(8_000, 1, "PCM_16")
    with serving(enhancer, shutdown_grace_seconds=TIMEOUT_SECONDS) as service:

        def speak() -> Iterator[bnr.EnhanceAudioRequest]:
            yield audio(file[:1_000])
            eventually(lambda: service.metric("percepnet_files_accepted") == 1, "a place taken")
            service.server.should_exit = True
            eventually(lambda: service.server.health.stopping, "the end")
            time.sleep(1.5)  # longer than calls are left alone without a grace
            yield audio(file[1_000:])

        answers = list(service.enhance_audio(speak()))
    assert b"".join(answer.audio_stream_data for answer in answers) == enhanced(file, enhancer)
