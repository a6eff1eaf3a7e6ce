"""Frames that are too late, over every interface: sent dry, told, counted.

Invariant: no sample is lost or moved, and none is dry without being counted. `service.engine` says when a
frame is too late (see test_engine.py); here every frame of a live stream is.
"""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
import soundfile
from running import TIMEOUT_SECONDS, eventually, running
from websockets.sync.client import connect

from percepnet.cli import main
from percepnet.enhancer import Enhancer
from percepnet.model import Model
from percepnet.stream import enhance
from service import engine
from service.client import Client
from service.main import Server
from service.pb.nvidia.maxine.bnr.v1 import bnr_pb2 as bnr
from service.pb.percepnet_service.v1 import enhancement_pb2 as pb

RATE = 48_000
HOP = 480
N_FRAMES = 12
SAMPLES = (0.1 * np.random.default_rng(0).standard_normal(N_FRAMES * HOP)).astype("<f4")
DELAYED = np.concatenate([np.zeros(1440, np.float32), SAMPLES])


@pytest.fixture(scope="module")
def server(random_model: Model) -> Iterator[Server]:
    with running(Enhancer(random_model), max_streams=4) as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "DEADLINE_SECONDS", -1.0)  # before they come: these senders outrun speech
        patch.setattr(engine, "LATE_SECONDS", 0.0)
        yield server


@pytest.fixture
def counted(server: Server) -> Callable[[], float]:
    """Dry frames since the test began."""
    before = dry_frames(server)
    return lambda: dry_frames(server) - before


def dry_frames(server: Server) -> float:
    host, port = server.servers[0].sockets[0].getsockname()
    lines = httpx.get(f"http://{host}:{port}/metrics", timeout=TIMEOUT_SECONDS).text.splitlines()
    name = "percepnet_dry_frames_total "
    return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))


@pytest.mark.parametrize("multiplex", [False, True])
def test_a_grpc_stream_is_told_with_each_answer(
    server: Server, counted: Callable[[], float], multiplex: bool, caplog
) -> None:
    target = f"127.0.0.1:{server.grpc.port}"
    with caplog.at_level(logging.INFO, "percepnet.service"):
        with Client(target, multiplex=multiplex) as client, client.stream(RATE, message_samples=HOP) as call:
            for i, frame in enumerate(np.split(SAMPLES, N_FRAMES)):
                heard = call.push(frame)
                np.testing.assert_allclose(heard, DELAYED[i * HOP : (i + 1) * HOP], atol=1e-4)
                assert call.last is not None
                assert call.last.dry
            call.end()
        eventually(lambda: caplog.messages[-1] == "stream closed", "the end of the stream")
    assert counted() == caplog.records[-1].fields["dry_frames"] >= N_FRAMES  # type: ignore[attr-defined]


def test_a_websocket_is_told_by_a_text_before_the_audio(server: Server, counted: Callable[[], float]) -> None:
    host, port = server.servers[0].sockets[0].getsockname()
    config = {"sample_rate_hz": RATE, "encoding": "ENCODING_F32LE", "message_samples": HOP}
    with connect(f"ws://{host}:{port}/v1/stream", ping_interval=None) as call:
        call.send(json.dumps({"config": config}))
        call.recv(timeout=TIMEOUT_SECONDS)
        for i, frame in enumerate(np.split(SAMPLES, N_FRAMES)):
            call.send(frame.tobytes())
            assert json.loads(call.recv(timeout=TIMEOUT_SECONDS))["audio"]["dry"] is True
            heard = np.frombuffer(call.recv(timeout=TIMEOUT_SECONDS), "<f4")
            np.testing.assert_allclose(heard, DELAYED[i * HOP : (i + 1) * HOP], atol=1e-6)
    assert counted() == N_FRAMES


def test_a_maxine_stream_whose_protocol_cannot_tell_is_counted(
    server: Server, counted: Callable[[], float]
) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc.port}") as channel:
        call = channel.stream_stream(
            "/nvidia.maxine.bnr.v1.MaxineBNR/EnhanceAudio",
            bnr.EnhanceAudioRequest.SerializeToString,
            bnr.EnhanceAudioResponse.FromString,
        )
        requests = [
            bnr.EnhanceAudioRequest(audio_stream_data=f.tobytes()) for f in np.split(SAMPLES, N_FRAMES)
        ]
        answers = list(call(iter(requests), timeout=TIMEOUT_SECONDS))
    heard = np.frombuffer(b"".join(answer.audio_stream_data for answer in answers), "<f4")
    np.testing.assert_allclose(heard, DELAYED[: len(heard)], atol=1e-6)
    assert counted() >= N_FRAMES


@pytest.mark.parametrize("multiplex", [False, True])
def test_a_stream_that_has_time_is_enhanced_however_late(
    server: Server, counted: Callable[[], float], random_model: Model, multiplex: bool
) -> None:
    target = f"127.0.0.1:{server.grpc.port}"
    options = {"message_samples": HOP, "compensate_delay": True, "never_dry": True}
    with Client(target, multiplex=multiplex) as client, client.stream(RATE, **options) as call:
        heard = [call.push(frame) for frame in np.split(SAMPLES, N_FRAMES)]
        assert call.started.config.never_dry
        assert call.last is not None
        assert not call.last.dry
        heard.append(call.end())
    expected = enhance(SAMPLES, RATE, enhancer=Enhancer(random_model))
    np.testing.assert_array_equal(np.concatenate(heard), expected)
    assert counted() == 0


def test_the_command_never_writes_dry_frames_without_a_word(
    server: Server, counted: Callable[[], float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a recording every frame is enhanced; live it tells how many messages were not."""
    source, output = tmp_path / "a.wav", tmp_path / "out.wav"
    soundfile.write(source, SAMPLES, RATE, "FLOAT")
    command = ["stream", str(source), str(output), "--target", f"127.0.0.1:{server.grpc.port}", "--force"]
    assert main(command) == 0
    assert "without enhancement" not in capsys.readouterr().out
    assert counted() == 0
    assert main([*command, "--realtime"]) == 0
    assert f"{N_FRAMES + 1} messages came back without enhancement" in capsys.readouterr().out


def test_a_clip_and_a_file_are_enhanced_however_late(
    server: Server, counted: Callable[[], float], random_model: Model
) -> None:
    request = pb.EnhanceClipRequest(sample_rate_hz=RATE, encoding=pb.ENCODING_F32LE, audio=SAMPLES.tobytes())
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc.port}") as channel:
        call = channel.unary_unary(
            "/percepnet_service.v1.EnhancementService/EnhanceClip",
            pb.EnhanceClipRequest.SerializeToString,
            pb.EnhanceClipResponse.FromString,
        )
        clip = np.frombuffer(call(request, timeout=TIMEOUT_SECONDS).audio, "<f4")
    np.testing.assert_array_equal(clip, enhance(SAMPLES, RATE, enhancer=Enhancer(random_model)))
    assert counted() == 0
