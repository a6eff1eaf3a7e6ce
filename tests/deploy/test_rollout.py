"""A pod that is told to stop drops no call: those that it has go on to their end, and no new one comes.

The clients here are the plainest; those of the project move to another pod by themselves.
"""

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Thread

import grpc
import httpx
import numpy as np
import pytest
from conftest import export_random_model
from pods import PlainStream, Pod
from running import eventually

from percepnet.enhancer import Enhancer
from percepnet.model import Model
from percepnet.stream import enhance

RATE = 16_000
CHUNK = RATE // 20
CALLERS = 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_random_model(tmp_path_factory.mktemp("model"), fc=32, conv=64, gru=64, strength_gru=32)


class Caller(Thread):
    """Speaks at the pace of speech until it is told to hang up, and keeps what it says and hears."""

    def __init__(self, target: str, seed: int) -> None:
        super().__init__()
        self._noise = np.random.default_rng(seed)
        self._channel = grpc.insecure_channel(target, [("grpc.use_local_subchannel_pool", 1)])
        self._stream = PlainStream(self._channel, RATE)
        self.said: list[np.ndarray] = []
        self.heard: list[np.ndarray] = []
        self.hang_up = False

    def run(self) -> None:
        while not self.hang_up:
            self.said.append((0.1 * self._noise.standard_normal(CHUNK)).astype(np.float32))
            self.heard.append(self._stream.push(self.said[-1]))
            time.sleep(CHUNK / RATE)
        self.heard.append(self._stream.end())
        self._channel.close()


def refuses(channel: grpc.Channel) -> bool:
    """Whether a pod takes no new call."""
    try:
        PlainStream(channel, RATE).end()
    except grpc.RpcError as error:
        return error.code() is grpc.StatusCode.UNAVAILABLE
    return False


def test_a_rolling_replacement_loses_and_doubles_no_sample(model: Path) -> None:
    with ThreadPoolExecutor() as pool, ExitStack() as stack:
        pods = [stack.enter_context(pod) for pod in pool.map(Pod, 4 * [model])]
        old, new = pods[:2], pods[2:]
        calls = [Caller(old[i % 2].grpc, i) for i in range(CALLERS)]
        for call in calls:
            call.start()
        for leaving, replacement in zip(old, new, strict=True):
            # As maxUnavailable: 0 has it, the new one is ready before the old one goes.
            assert httpx.get(f"http://{replacement.http}/readyz").status_code == 200
            leaving.terminate()
            with grpc.insecure_channel(leaving.grpc) as channel:
                eventually(lambda channel=channel: refuses(channel), "the pod takes no new call")
            with grpc.insecure_channel(replacement.grpc) as channel:
                assert not refuses(channel)
        before = [len(call.heard) for call in calls]
        eventually(lambda: all(len(call.heard) > before[i] + 4 for i, call in enumerate(calls)), "speech")
        for call in calls:
            call.hang_up = True
        for call in calls:
            call.join()
        assert {pod.wait() for pod in old} <= {0, -signal.SIGTERM}
    enhancer = Enhancer(Model.load(model))
    for call in calls:
        unbroken = enhance(np.concatenate(call.said), RATE, enhancer=enhancer)
        np.testing.assert_array_equal(np.concatenate(call.heard), unbroken)


def test_calls_that_outlast_the_grace_are_ended_with_a_status_that_says_why(model: Path) -> None:
    with (
        Pod(model, PERCEPNET_SHUTDOWN_GRACE_SECONDS="0.5") as pod,
        grpc.insecure_channel(pod.grpc) as channel,
    ):
        stream = PlainStream(channel, RATE)
        pod.terminate()
        assert pod.wait() in (0, -signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as ended:
            stream.push(np.zeros(CHUNK, np.float32))
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "elsewhere" in ended.value.details()
