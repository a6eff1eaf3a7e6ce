"""A service of several worker processes, started as users start it.

Invariant: the loss of a worker costs the streams that it had, and nothing else.
"""

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue

import grpc
import httpx
import numpy as np
import psutil
import pytest
from conftest import export_random_model
from prometheus_client.parser import text_string_to_metric_families
from running import TIMEOUT_SECONDS, eventually

from percepnet.enhancer import Enhancer
from percepnet.stream import enhance
from service.client import AsyncClient, Client
from service.pb.percepnet_service.v1 import enhancement_pb2 as pb
from service.settings import Settings
from service.supervisor import Supervisor

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts processes as Linux does")

RATE = 16_000
KEY = "0123456789abcdef0123456789abcdef"
MESSAGE = np.random.default_rng(0).integers(-3000, 3000, RATE // 100).astype("<i2").tobytes()
COMMAND = [sys.executable, "-m", "percepnet.cli", "serve"]
RETRIED = {
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
}
ANYWHERE = ["--http-listen", "127.0.0.1:0", "--grpc-listen", "127.0.0.1:0"]


class Service:
    """A running service of two workers, which carry four streams each."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stderr is not None
        self.log = process.stderr
        line = json.loads(next(text for text in self.log if "running on" in text))["message"]
        http, self.target = re.findall(r"127\.0\.0\.1:\d+", line)
        self.http = httpx.Client(base_url=f"http://{http}", timeout=TIMEOUT_SECONDS)
        eventually(lambda: self.value("percepnet_workers") == 2, "both workers")

    @property
    def workers(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    def values(self) -> dict[str, float]:
        """All metrics: sums over the labels of each name, and those of each CPU stage."""
        found: dict[str, float] = {}
        # A connection of its own, so that any worker may answer.
        text = httpx.get(f"{self.http.base_url}/metrics", timeout=TIMEOUT_SECONDS).text
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found[sample.name] = found.get(sample.name, 0) + sample.value
                if "stage" in sample.labels:
                    found[sample.labels["stage"]] = sample.value
        return found

    def value(self, name: str) -> float:
        return self.values()[name]

    def wait_for(self, name: str, value: float) -> None:
        eventually(lambda: self.value(name) == value, f"{name} = {value}")

    def channel(self) -> grpc.Channel:
        """A channel with connections of its own."""
        return grpc.insecure_channel(self.target, [("grpc.use_local_subchannel_pool", 1)])


class Stream:
    """An open live stream."""

    def __init__(self, channel: grpc.Channel, metadata: tuple[tuple[str, str], ...] = ()) -> None:
        self._requests: SimpleQueue[pb.EnhanceStreamRequest | None] = SimpleQueue()
        self.call = channel.stream_stream(
            "/percepnet_service.v1.EnhancementService/EnhanceStream",
            pb.EnhanceStreamRequest.SerializeToString,
            pb.EnhanceStreamResponse.FromString,
        )(iter(self._requests.get, None), timeout=TIMEOUT_SECONDS, metadata=metadata)
        config = pb.StreamConfig(sample_rate_hz=RATE, encoding=pb.ENCODING_S16LE)
        self._requests.put(pb.EnhanceStreamRequest(config=config))
        try:
            next(self.call)
        except grpc.RpcError:
            self.end()
            raise

    def push(self) -> None:
        """Send 10 ms and take the answer."""
        self._requests.put(pb.EnhanceStreamRequest(audio=MESSAGE))
        try:
            assert len(next(self.call).audio.audio) == len(MESSAGE)
        except grpc.RpcError:
            self.end()
            raise

    def lives(self) -> bool:
        """Whether it is still answered."""
        with suppress(grpc.RpcError):
            self.push()
            return True
        return False

    def end(self) -> None:
        self._requests.put(None)


def push(streams: list[Stream]) -> None:
    for stream in streams:
        stream.push()


def opened(channel: grpc.Channel, metadata: tuple[tuple[str, str], ...] = ()) -> Stream:
    """A stream, asked for again when the service says so, or when it came to a worker that was leaving."""
    while True:
        try:
            return Stream(channel, metadata)
        except grpc.RpcError as error:
            if error.code() not in RETRIED:
                raise
            hint = dict(error.trailing_metadata() or ()).get("grpc-retry-pushback-ms", "100")
            time.sleep(int(hint) / 1000)


@contextmanager
def serving(tmp_path: Path, *arguments: str) -> Iterator[Service]:
    model = export_random_model(tmp_path, fc=32, conv=64, gru=64, strength_gru=32)
    command = [*COMMAND, *ANYWHERE, "--workers", "2", "--max-streams", "8", "--model", str(model), *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            service = Service(process)
            yield service
            service.http.close()
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("workers")) as service:
        yield service


def test_streams_over_one_connection_reach_all_workers(service: Service) -> None:
    with service.channel() as channel:
        streams = [opened(channel) for _ in range(8)]
        push(streams)
        values = service.values()
        assert (values["percepnet_streams_active"], values["percepnet_streams_capacity"]) == (8, 8)
        with pytest.raises(grpc.RpcError) as refused:
            Stream(channel)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(refused.value.trailing_metadata())["grpc-retry-pushback-ms"] == "1000"
        push(streams)
        for stream in streams:
            stream.end()
        service.wait_for("percepnet_streams_active", 0)


def test_the_sessions_of_a_client_reach_all_workers(service: Service) -> None:
    samples = np.zeros(RATE // 100, np.float32)
    with Client(service.target, multiplex=True) as client:
        streams = [client.stream(RATE) for _ in range(8)]
        for stream in streams:
            assert len(stream.push(samples)) == len(samples)
            stream.end()
    service.wait_for("percepnet_streams_active", 0)

    async def main() -> None:
        async with AsyncClient(service.target, multiplex=True) as client:
            streams = [await client.stream(RATE) for _ in range(8)]
            for stream in streams:
                assert len(await stream.push(samples)) == len(samples)
                await stream.end()

    asyncio.run(main())
    service.wait_for("percepnet_streams_active", 0)


def test_cpu_figures_are_those_of_the_operating_system(service: Service) -> None:
    def used() -> float:
        return sum(sum(worker.cpu_times()[:2]) for worker in service.workers)

    def settled() -> dict[str, float]:
        time.sleep(1.5)  # until the other worker, idle again, has told the rest
        return service.values()

    before, used_before, started = settled(), used(), time.monotonic()
    with service.channel() as one, service.channel() as other:
        streams = [opened(channel) for channel in (one, other) for _ in range(3)]
        while used() < used_before + 0.5:
            push(streams)
        for stream in streams:
            stream.end()
        service.wait_for("percepnet_streams_active", 0)
        open_seconds = time.monotonic() - started
    after = settled()
    taken = {stage: after[stage] - before[stage] for stage in ("dsp", "network", "files", "transport")}
    assert sum(taken.values()) == pytest.approx(used() - used_before, abs=0.15)
    assert taken["files"] == 0
    assert min(taken["dsp"], taken["network"], taken["transport"]) > 0.02
    grown = after["percepnet_stream_open_seconds_total"] - before["percepnet_stream_open_seconds_total"]
    assert 0 < grown <= 6 * open_seconds
    assert 0 < after["percepnet_stream_cpu_ratio"] < 1


def test_a_killed_worker_costs_its_streams_only_and_is_replaced(service: Service) -> None:
    before = service.values()
    channels = [service.channel() for _ in range(8)]
    streams = [opened(channel) for channel in channels]
    for _ in range(5):
        push(streams)
    time.sleep(1.1)  # the books are told every second
    assert service.value("percepnet_streams_active") == 8

    service.workers[0].kill()
    alive = [stream for stream in streams if stream.lives()]
    assert len(alive) == 4
    while service.value("percepnet_worker_restarts_total") == before["percepnet_worker_restarts_total"]:
        push(alive)
    lost = [channel for channel, stream in zip(channels, streams, strict=True) if stream not in alive]
    alive += [opened(channel) for channel in lost]
    for _ in range(5):
        push(alive)

    service.wait_for("percepnet_workers", 2)
    values = service.values()
    assert values["percepnet_worker_restarts_total"] == before["percepnet_worker_restarts_total"] + 1
    assert values["percepnet_streams_lost_total"] == before["percepnet_streams_lost_total"] + 4
    assert (values["percepnet_streams_active"], values["percepnet_streams_capacity"]) == (8, 8)
    answers = "percepnet_stream_latency_seconds_count"
    assert values[answers] >= before[answers] + 8 * 5
    for stream in alive:
        stream.end()
    service.wait_for("percepnet_streams_active", 0)
    for channel in channels:
        channel.close()


def test_a_worker_killed_amid_speech_costs_no_caller_a_sample(service: Service, enhancer: Enhancer) -> None:
    """Six speak without a pause, a second ahead of the answers, until a second after the kill."""
    killed = threading.Event()
    sent, heard = ([[] for _ in range(6)] for _ in range(2))
    noise = 0.1 * np.random.default_rng(0).standard_normal((50, RATE // 50)).astype(np.float32)

    def speech(i: int) -> Iterator[np.ndarray]:
        n_after = 0
        while n_after < len(noise):
            n_after += killed.is_set()
            sent[i].append(noise[len(sent[i]) % len(noise)])
            yield sent[i][-1]

    def call(client: Client, i: int) -> int:
        stream = client.stream(RATE, compensate_delay=True, never_dry=True)
        for samples in stream.pipe(speech(i)):
            heard[i].append(samples)
        return stream.reconnections

    with ThreadPoolExecutor(6) as callers, Client(service.target, patience_seconds=TIMEOUT_SECONDS) as client:
        calls = [callers.submit(call, client, i) for i in range(6)]
        eventually(lambda: min(map(len, heard)) > 10, "answers to all")
        service.workers[0].kill()
        killed.set()
        reconnections = [call.result(TIMEOUT_SECONDS) for call in calls]
    assert 2 <= sum(map(bool, reconnections)) <= 4
    for i, n_lost in enumerate(reconnections):
        clean = np.concatenate(heard[i])
        expected = enhance(np.concatenate(sent[i]), RATE, enhancer=enhancer)
        assert len(clean) == len(expected)
        if not n_lost:
            np.testing.assert_array_equal(clean, expected)
    service.wait_for("percepnet_workers", 2)
    service.wait_for("percepnet_streams_active", 0)


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that wants a key, and soon replaces a worker that hangs."""
    path = tmp_path_factory.mktemp("strict")
    (path / "keys").write_text(f"radio:{KEY}\n")
    limits = ["--api-keys-file", str(path / "keys"), "--max-streams-per-key", "6", "--hang-seconds", "2"]
    with serving(path, *limits) as service:
        yield service


def test_a_key_has_only_so_many_streams_at_all_workers(strict: Service) -> None:
    """Each of the two carries four."""
    key = (("x-api-key", KEY),)
    channels = [strict.channel() for _ in range(8)]
    streams = [opened(channel, key) for channel in channels[:6]]
    for channel in channels:
        with pytest.raises(grpc.RpcError, match="at most 6 live streams with one API key"):
            Stream(channel, key)
    streams.pop().end()
    strict.wait_for("percepnet_streams_active", 5)
    streams.append(opened(channels[7], key))
    for stream in streams:
        stream.end()
    strict.wait_for("percepnet_streams_active", 0)
    for channel in channels:
        channel.close()


def test_a_machine_that_stood_still_costs_no_worker(strict: Service) -> None:
    processes = [psutil.Process(strict.process.pid), *strict.workers]
    for process in processes:
        process.suspend()
    time.sleep(3)
    for process in processes:
        process.resume()
    time.sleep(1)
    assert strict.value("percepnet_worker_restarts_total") == 0
    assert strict.workers == processes[1:]


def test_a_worker_that_hangs_is_told_and_replaced(strict: Service) -> None:
    hung, healthy = strict.workers
    hung.suspend()
    strict.wait_for("percepnet_worker_restarts_total", 1)
    strict.wait_for("percepnet_workers", 2)
    assert hung not in strict.workers
    assert healthy in strict.workers
    line = json.loads(next(text for text in strict.log if "hangs" in text))
    assert (line["level"], line["worker"]) == ("error", 0)


def test_a_worker_that_never_comes_to_serve_is_given_up_later_than_one_that_served() -> None:
    looks = {}
    for ready in (0, 1):
        supervisor = Supervisor(Settings(), {}, 1)
        worker, supervisor._board.slots[0].ready = supervisor._workers[0], ready
        with subprocess.Popen(["sleep", "1000"]) as worker.process:
            looks[ready] = 0
            while worker.process.poll() is None and looks[ready] < 1000:
                supervisor._look_at(worker)
                looks[ready] += 1
                time.sleep(0.001)
            worker.process.kill()
    assert 8 <= looks[1] < looks[0] < 1000


def test_sigterm_lets_live_streams_end_and_refuses_new_ones(tmp_path: Path) -> None:
    with serving(tmp_path) as service:
        workers = service.workers
        with service.channel() as channel, service.channel() as late:
            stream = opened(channel)
            service.process.send_signal(signal.SIGTERM)
            eventually(lambda: "stopping" in next(service.log), "the end")
            with pytest.raises(grpc.RpcError) as refused:
                Stream(late)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
            push(10 * [stream])
            stream.end()
            assert service.process.wait(TIMEOUT_SECONDS) == 0
    assert not any(worker.is_running() for worker in workers)


def test_it_starts_in_a_folder_whose_files_are_named_as_its_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `percepnet serve` does, which looks for no modules there itself."""
    for name in ("service", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not the service')")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-P", *COMMAND[1:], *ANYWHERE, "--workers", "2", "--max-streams", "8"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            Service(process).http.close()
        finally:
            process.terminate()


def test_a_service_that_cannot_start_tells_why_once(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(b"no model")
    model.with_name("model.json").write_text("{}")
    command = [*COMMAND, *ANYWHERE, "--workers", "2", "--log-level", "error", "--model", str(model)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    assert ended.returncode == 1
    assert ended.stderr.startswith("percepnet serve: ")
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("flag", ["--http-listen", "--grpc-listen"])
@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
def test_an_address_that_cannot_be_had_is_told(host: str, flag: str, workers: str) -> None:
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as taken:
        address = f"{host}:{taken.getsockname()[1]}"
        command = [*COMMAND, *ANYWHERE, flag, address, "--workers", workers]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    told = "cannot listen; --http-listen and --grpc-listen choose where: "
    assert json.loads(line)["message"].startswith(f"{told}{address}: ")


def test_workers_end_with_their_supervisor(service: Service) -> None:
    """The last test of this file: it ends the service of the others. A stream may end first, and costs no
    more than before."""
    workers = service.workers
    with service.channel() as channel:
        stream = opened(channel)
        service.process.kill()
        eventually(lambda: sum(worker.is_running() for worker in workers) == 1, "the end of the idle one")
        (busy,) = (worker for worker in workers if worker.is_running())
        used_before = sum(busy.cpu_times()[:2])
        time.sleep(1)
        assert sum(busy.cpu_times()[:2]) - used_before < 0.2
        push([stream])
        stream.end()
    _, alive = psutil.wait_procs(workers, TIMEOUT_SECONDS)
    assert not alive
