"""A pod that is told to stop drops no call: plain clients stay to their end, those of the project move on."""

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
from service.client import Client, LiveStream
from service.client import pods as client_pods

RATE = 16_000
CHUNK = RATE // 20
CALLERS = 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_random_model(tmp_path_factory.mktemp("model"), fc=32, conv=64, gru=64, strength_gru=32)


class Caller(Thread):
    """Speaks at the pace of speech until it is told to hang up, and keeps what it says and hears."""

    def __init__(self, stream: PlainStream | LiveStream, seed: int) -> None:
        super().__init__()
        self._noise = np.random.default_rng(seed)
        self.stream = stream
        self.said: list[np.ndarray] = []
        self.heard: list[np.ndarray] = []
        self.hang_up = False

    def run(self) -> None:
        while not self.hang_up:
            self.said.append((0.1 * self._noise.standard_normal(CHUNK)).astype(np.float32))
            self.heard.append(self.stream.push(self.said[-1]))
            time.sleep(CHUNK / RATE)
        self.heard.append(self.stream.end())


def hang_up(calls: list[Caller]) -> None:
    """End all calls, after each was heard for a while longer."""
    before = [len(call.heard) for call in calls]
    eventually(lambda: all(len(call.heard) > before[i] + 4 for i, call in enumerate(calls)), "speech")
    for call in calls:
        call.hang_up = True
    for call in calls:
        call.join()


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
        channels = [stack.enter_context(grpc.insecure_channel(pod.grpc)) for pod in old]
        calls = [Caller(PlainStream(channels[i % 2], RATE), i) for i in range(CALLERS)]
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
        hang_up(calls)
        assert {pod.wait() for pod in old} <= {0, -signal.SIGTERM}
    enhancer = Enhancer(Model.load(model))
    for call in calls:
        unbroken = enhance(np.concatenate(call.said), RATE, enhancer=enhancer)
        np.testing.assert_array_equal(np.concatenate(call.heard), unbroken)


@pytest.mark.parametrize("keys", [False, True], ids=["plain", "handover"])
def test_clients_that_know_pods_let_them_go_at_once(
    model: Path, keys: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The grace is minutes; the pods stop in the moment when their last stream has moved."""
    monkeypatch.setattr(client_pods, "LOOK_UP_SECONDS", 0.2)
    variables = {}
    if keys:
        variables["PERCEPNET_HANDOVER_KEYS_FILE"] = str(tmp_path / "keys")
        (tmp_path / "keys").write_text(64 * "k")
    with ThreadPoolExecutor() as pool, ExitStack() as stack:
        started = [pool.submit(Pod, model, **variables) for _ in range(4)]
        pods = [stack.enter_context(pod.result()) for pod in started]
        old, new = pods[:2], pods[2:]
        names = [pod.grpc for pod in old]  # what the headless service's name stands for
        client = stack.enter_context(Client("percepnet-streams:50051", resolver=lambda host, port: names))
        streams = [client.stream(RATE, compensate_delay=True) for _ in range(CALLERS)]
        calls = [Caller(stream, i) for i, stream in enumerate(streams)]
        for call in calls:
            call.start()
        for leaving, replacement in zip(old, new, strict=True):
            names.append(replacement.grpc)
            names.remove(leaving.grpc)
            leaving.terminate()
            assert leaving.wait() in (0, -signal.SIGTERM)
        hang_up(calls)
    enhancer = Enhancer(Model.load(model))
    for call, stream in zip(calls, streams, strict=True):
        assert (stream.handovers if keys else stream.reconnections) >= 1
        assert not (keys and stream.reconnections)
        heard = np.concatenate(call.heard)
        unbroken = enhance(np.concatenate(call.said), RATE, enhancer=enhancer)
        assert heard.shape == unbroken.shape
        # One sample more or less, and noise would have nothing in common with itself.
        assert np.sum((heard - unbroken) ** 2) <= (0 if keys else 0.01 * np.sum(unbroken**2))


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
