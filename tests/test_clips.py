"""Clips in a process of its own, whose memory they must not take.

Invariant: a clip holds memory from the moment it has one of the few places until its answer is sent, and
whoever has no place sends in vain.
"""

import re
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from conftest import export_random_model
from running import TIMEOUT_SECONDS

from service.limits import MAX_CLIP_BYTES
from service.pb.percepnet_service.v1 import enhancement_pb2 as pb

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads memory as Linux tells it")

CLIP = "/percepnet_service.v1.EnhancementService/EnhanceClip"
TOO_LONG = pb.EnhanceClipRequest(
    sample_rate_hz=48_000, encoding=pb.ENCODING_F32LE, audio=bytes(MAX_CLIP_BYTES + 4)
).SerializeToString()
CLIP_MB = len(TOO_LONG) / 1e6


class Service:
    """A running service of one process, and what its clips took."""

    def __init__(self, process: subprocess.Popen[str], target: str) -> None:
        self.process = process
        self.target = target
        self._before_mb = self._peak_mb()

    def _peak_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) / 1e3

    @property
    def grown_clips(self) -> float:
        """The most memory since the start, in multiples of the largest clip."""
        return (self._peak_mb() - self._before_mb) / CLIP_MB

    def channel(self) -> grpc.Channel:
        """A channel with a connection of its own."""
        return grpc.insecure_channel(self.target, [("grpc.use_local_subchannel_pool", 1)])


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    model = export_random_model(tmp_path, fc=32, conv=64, gru=64, strength_gru=32)
    with socket.create_server(("127.0.0.1", 0)) as free:
        target = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "percepnet.cli", "serve", "--workers", "1", "--model", str(model)]
    listen = ["--http-listen", "127.0.0.1:0", "--grpc-listen", target]
    with subprocess.Popen([*command, *listen], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            assert next(line for line in process.stderr if "running on" in line)
            yield Service(process, target)
        finally:
            process.terminate()
            process.communicate()


def test_refused_clips_one_after_another_take_the_memory_of_a_few(service: Service) -> None:
    with service.channel() as channel:
        for _ in range(30):
            with pytest.raises(grpc.RpcError, match="1048321 samples; accepted are 1048320"):
                channel.unary_unary(CLIP)(TOO_LONG, timeout=TIMEOUT_SECONDS)
    assert service.grown_clips < 12


def test_many_clips_at_once_take_the_memory_of_those_that_have_a_place(service: Service) -> None:
    channels = [service.channel() for _ in range(40)]
    calls = [channel.unary_unary(CLIP).future(TOO_LONG, timeout=TIMEOUT_SECONDS) for channel in channels]
    codes = Counter(call.code().name for call in calls)
    for channel in channels:
        channel.close()
    assert codes.keys() <= {"INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"}
    assert service.grown_clips < 24
