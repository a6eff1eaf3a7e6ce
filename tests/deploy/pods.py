"""Pods without a cluster: processes that serve with the environment that the manifests give them."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Self

import grpc
import numpy as np
import running
from manifests import environment, overlay
from running import TIMEOUT_SECONDS

from service import pcm
from service.pb.percepnet_service.v1 import enhancement_pb2 as pb


def free_address() -> str:
    """An address of this machine where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return "{}:{}".format(*free.getsockname())


class Pod:
    """A running service; it is told to stop as a kubelet tells it, when its block ends at the latest."""

    def __init__(self, model: Path, **variables: str) -> None:
        self.http, self.grpc = free_address(), free_address()
        listen = {"PERCEPNET_HTTP_LISTEN": self.http, "PERCEPNET_GRPC_LISTEN": self.grpc}
        given = environment(overlay("autoscaling/hpa")) | listen | {"PERCEPNET_MODEL": str(model)} | variables
        others = {name: value for name, value in os.environ.items() if not name.startswith("PERCEPNET_")}
        self.process = subprocess.Popen(
            [sys.executable, running.__file__],
            env=others | given,
            stderr=subprocess.PIPE,
            text=True,
        )
        log = self.process.stderr
        assert log is not None
        said = (json.loads(line)["message"] for line in log)
        assert any("running on" in line for line in said)
        self.log: list[str] = []
        self._reader = threading.Thread(target=lambda: self.log.extend(said))
        self._reader.start()

    def terminate(self) -> None:
        """Begin to stop."""
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """The exit status, once it has stopped."""
        status = self.process.wait(TIMEOUT_SECONDS)
        self._reader.join()
        return status

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.terminate() if kind is None else self.process.kill()
        self.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()


class PlainStream:
    """A live stream of a client that knows nothing of pods: it stays where it is."""

    def __init__(self, channel: grpc.Channel, rate: int) -> None:
        self._requests: SimpleQueue[pb.EnhanceStreamRequest | None] = SimpleQueue()
        self._call = channel.stream_stream(
            "/percepnet_service.v1.EnhancementService/EnhanceStream",
            pb.EnhanceStreamRequest.SerializeToString,
            pb.EnhanceStreamResponse.FromString,
        )(iter(self._requests.get, None), timeout=TIMEOUT_SECONDS)
        config = pb.StreamConfig(sample_rate_hz=rate, encoding=pb.ENCODING_F32LE, compensate_delay=True)
        try:
            self._ask(pb.EnhanceStreamRequest(config=config))
        except grpc.RpcError:
            self._requests.put(None)
            raise

    def push(self, samples: np.ndarray) -> np.ndarray:
        """Send samples, take the answer."""
        return self._audio(pb.EnhanceStreamRequest(audio=samples.astype(pcm.F32LE).tobytes()))

    def end(self) -> np.ndarray:
        """Take the tail and the status, which must be ok."""
        tail = self._audio(pb.EnhanceStreamRequest(end=pb.End()))
        self._requests.put(None)
        assert list(self._call) == []
        return tail

    def _audio(self, request: pb.EnhanceStreamRequest) -> np.ndarray:
        return pcm.decode(self._ask(request).audio.audio, pcm.F32LE)

    def _ask(self, request: pb.EnhanceStreamRequest) -> pb.EnhanceStreamResponse:
        self._requests.put(request)
        return next(self._call)
