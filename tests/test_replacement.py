"""Servers are replaced under live calls: processes that are told to stop or killed, on real sockets.

Invariant: no sample is lost or doubled; and if the server was told to stop, none is different.
"""

import asyncio
import multiprocessing
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from conftest import export_random_model
from running import TIMEOUT_SECONDS, eventually, serve

from percepnet.enhancer import Enhancer
from percepnet.model import Model
from percepnet.stream import enhance
from percepnet.synthesis import Controls
from service.client import AsyncClient, AsyncLiveStream, Client, LiveStream, pods

RATES = (8_000, 16_000, 44_100, 48_000)
N_STREAMS = 20


PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["running"])  # what every pod imports takes a second; here it is done once


class Pod:
    """A server in a process of its own."""

    def __init__(self, folder: Path, **settings: object) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = "{}:{}".format(*free.getsockname())
        settings |= {"workers": 1, "http_listen": "127.0.0.1:0", "grpc_listen": self.address}
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
        self._log = folder / f"{self.address}.log"
        self._log.touch()
        self.process = PROCESSES.Process(target=serve, args=(flags, self._log))
        self.process.start()

    def wait(self) -> int | None:
        """The exit status, once it has stopped."""
        self.process.join(TIMEOUT_SECONDS)
        return self.process.exitcode

    @property
    def log(self) -> str:
        return self._log.read_text()


class Fleet:
    """The pods behind a name, some of which come and go."""

    def __init__(self, folder: Path) -> None:
        model = export_random_model(folder, fc=32, conv=64, gru=64, strength_gru=32)
        self.enhancer = Enhancer(Model.load(model))
        keys = folder / "keys"
        keys.write_text("0123456789abcdef" * 2)
        self._folder = folder
        self._settings = {"model": model, "max_streams": N_STREAMS, "handover_keys_file": keys}
        self._started: list[Pod] = []
        self.listed: list[Pod] = []

    def ready(self, n_pods: int) -> list[Pod]:
        """So many pods that serve."""
        alive = [pod for pod in self._started if pod.process.is_alive()][:n_pods]
        new = [Pod(self._folder, **self._settings) for _ in range(n_pods - len(alive))]
        self._started += new
        for pod in new:
            eventually(lambda pod=pod: "running on" in pod.log, "a pod")
        return alive + new

    def client(self) -> Client:
        return Client("calls:50051", resolver=self.resolve)

    def resolve(self, host: str, port: int) -> list[str]:
        return [pod.address for pod in self.listed]

    def close(self) -> None:
        for pod in self._started:
            pod.process.kill()
            pod.process.join()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path_factory.mktemp("fleet"))
    yield fleet
    fleet.close()


class Caller:
    """Speaks noise at the pace of speech until it is enough, and keeps what was said and heard."""

    def __init__(self, seed: int, enough: Event, controls: Controls = Controls()) -> None:
        self.rate = RATES[seed % len(RATES)]
        self.said: list[np.ndarray] = []
        self.heard: list[np.ndarray] = []
        self.stream: LiveStream | AsyncLiveStream
        self._random = np.random.default_rng(seed)
        self._enough = enough
        self._options = {"controls": controls, "compensate_delay": True}

    def speak(self, client: Client) -> None:
        self.stream = client.stream(self.rate, **self._options)
        for samples in self.stream.pipe(self._speech(), realtime=True):
            self.heard.append(samples)

    async def speak_async(self, client: AsyncClient) -> None:
        self.stream = await client.stream(self.rate, **self._options)
        async for samples in self.stream.pipe(self._speech(), realtime=True):
            self.heard.append(samples)

    def _speech(self) -> Iterator[np.ndarray]:
        while not self._enough.is_set():
            self.said.append((0.1 * self._random.standard_normal(self.rate // 10)).astype(np.float32))
            yield self.said[-1]


def speak_at_once(callers: list[Caller], fleet: Fleet) -> None:
    """All on one event loop, and with each server over one RPC."""

    async def main() -> None:
        async with AsyncClient("calls:50051", multiplex=True, resolver=fleet.resolve) as client:
            await asyncio.gather(*(caller.speak_async(client) for caller in callers))

    asyncio.run(main())


def wait_for(condition: Callable[[], bool], what: str, calls: list[Future[None]]) -> None:
    """Return once it holds; raises what ends a call before."""

    def holds() -> bool:
        for call in calls:
            if call.done():
                call.result()
        return condition()

    eventually(holds, what)


def test_a_rolling_replacement_under_live_streams_changes_no_sample(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pods, "LOOK_UP_SECONDS", 0)
    servers = fleet.ready(6)
    old, new = servers[:3], servers[3:]
    fleet.listed = list(old)
    enough = Event()
    callers = [Caller(seed, enough) for seed in range(N_STREAMS)]
    in_threads, on_a_loop = callers[::2], callers[1::2]
    with fleet.client() as client, ThreadPoolExecutor(N_STREAMS) as pool:
        calls = [pool.submit(caller.speak, client) for caller in in_threads]
        calls.append(pool.submit(speak_at_once, on_a_loop, fleet))
        try:
            wait_for(lambda: all(caller.heard for caller in callers), "all streams", calls)
            for pod, successor in zip(old, new, strict=True):
                fleet.listed.append(successor)
                fleet.listed.remove(pod)
                pod.process.terminate()
                assert pod.wait() == -signal.SIGTERM
        finally:
            enough.set()
        for call in calls:
            call.result()
    for caller in callers:
        expected = enhance(np.concatenate(caller.said), caller.rate, enhancer=fleet.enhancer)
        np.testing.assert_array_equal(np.concatenate(caller.heard), expected)
        assert caller.stream.handovers >= 1
        assert caller.stream.reconnections == 0
    given = sum(pod.log.count('"outcome": "handed_over"') for pod in old)
    assert sum(caller.stream.handovers for caller in callers) == given


def test_a_killed_server_costs_its_streams_no_sample(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """All dry the output does not depend on the memory that is lost: every sample must be in its place."""
    monkeypatch.setattr(pods, "LOOK_UP_SECONDS", 0)
    killed, other = fleet.ready(2)
    fleet.listed = [killed]
    enough = Event()
    callers = [Caller(seed, enough, Controls(mix=0)) for seed in range(4)]
    with fleet.client() as client, ThreadPoolExecutor(N_STREAMS) as pool:
        calls = [pool.submit(caller.speak, client) for caller in callers[::2]]
        calls.append(pool.submit(speak_at_once, callers[1::2], fleet))
        try:
            wait_for(lambda: all(len(caller.heard) > 5 for caller in callers), "all streams", calls)
            fleet.listed = [other]
            killed.process.kill()
            wait_for(lambda: all(caller.stream.reconnections for caller in callers), "another server", calls)
        finally:
            enough.set()
        for call in calls:
            call.result()
    for caller in callers:
        dry = enhance(
            np.concatenate(caller.said), caller.rate, controls=Controls(mix=0), enhancer=fleet.enhancer
        )
        np.testing.assert_allclose(np.concatenate(caller.heard), dry, atol=1e-3)
        assert (caller.stream.handovers, caller.stream.reconnections) == (0, 1)
