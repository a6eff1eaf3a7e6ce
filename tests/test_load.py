"""The load generator: it counts what it sent, late answers included, and never waits for a slow server."""

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import closing
from functools import partial

import numpy as np
import pytest
from running import TIMEOUT_SECONDS, Service, running

from percepnet import cli
from percepnet.enhancer import Enhancer
from percepnet.model import Model
from percepnet.stream import enhance
from service import load, wakeups
from service.load import EXAMPLE, LoadError, Plan, Process, Result, messages_of, put_on, row, search, speech
from service.loadwire import Connection, WireError
from service.main import Server

RATE = 16_000


@pytest.fixture(scope="module")
def server(random_model: Model) -> Iterator[Server]:
    with running(Enhancer(random_model), max_streams=4) as server:
        yield server


@pytest.fixture(autouse=True)
def any_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow machine answers late."""
    monkeypatch.setattr(load, "WARM_UP_SECONDS", 0.1)
    monkeypatch.setattr(load, "PATIENCE_SECONDS", TIMEOUT_SECONDS)


@pytest.fixture
def messages() -> list[bytes]:
    return messages_of(bytes(2 * RATE), RATE, 10)


def result(latency: list[float], streams: int = 1) -> Result:
    return Result(Plan(streams, 1, 10, 1), np.array(latency), np.zeros(1), 0.5, 1e5, 0.1)


@pytest.mark.parametrize("connections", [1, 4])
def test_every_message_of_every_stream_is_answered_and_counted(server, messages, connections):
    plan = Plan(streams=3, seconds=0.3, message_ms=10, connections=connections)
    found = put_on(plan, ("127.0.0.1", server.grpc.port), messages, RATE, Process(os.getpid()))
    assert found.latency.shape == (3 * 30,)
    assert np.isfinite(found.latency).all()
    assert (found.latency > 0).all()
    assert found.cores is not None
    assert found.cores > 0


def test_a_streams_output_is_compared_with_that_of_a_file(server, random_model, monkeypatch):
    noise = np.random.default_rng(0).integers(-9000, 9000, RATE).astype("<i2")
    plan = Plan(streams=2, seconds=0.3, message_ms=10, connections=1, compared=True)
    found = []
    for model in (Model.load(), random_model):
        monkeypatch.setattr(load, "enhance", partial(enhance, enhancer=Enhancer(model)))
        sent = messages_of(noise.tobytes(), RATE, 10)
        found.append(put_on(plan, ("127.0.0.1", server.grpc.port), sent, RATE, None).differences)
    assert found[0]  # of another model
    assert found[1] == 0


def test_the_streams_of_a_mixer_are_answered_and_counted_though_they_do_not_fit_a_window(server):
    """A bundle is 77 kB, and so is its answer."""
    messages = messages_of(bytes(2 * 48_000), 48_000, 200)
    plan = Plan(streams=4, seconds=0.6, message_ms=200, connections=1, multiplexed=True)
    found = put_on(plan, ("127.0.0.1", server.grpc.port), messages, 48_000, None)
    assert found.latency.shape == (4 * 3,)
    assert np.isfinite(found.latency).all()


def test_a_mixer_is_told_of_more_streams_than_the_server_takes(server, messages):
    with pytest.raises(LoadError, match="no more than 4 streams"):
        put_on(Plan(5, 0.1, 10, 1, True), ("127.0.0.1", server.grpc.port), messages, RATE, None)


def test_more_streams_than_the_server_takes_are_told(server, messages):
    with closing(Service(server)) as service:
        service.wait_for("percepnet_streams_active", 0)  # those of the test before are gone
    with pytest.raises(LoadError, match="no more than 4 streams"):
        put_on(Plan(5, 0.1, 10, 2), ("127.0.0.1", server.grpc.port), messages, RATE, None)


def test_the_example_is_cut_into_messages_at_any_rate():
    audio = speech(EXAMPLE, 8_000)
    cut = messages_of(audio, 8_000, 20)
    assert len(cut) == len(audio) // (2 * 160)


def test_what_came_late_or_never_is_a_miss():
    found = result([0.001, 0.009, 0.011, np.inf])
    assert found.misses == 2
    assert not found.passed
    assert row(found)[-2:] == ["2", "100"]


@pytest.mark.parametrize("limit", [0, 5, 16, 37, 100])
def test_the_search_ends_near_the_limit(limit):
    found = list(search(lambda n: result([0.02 if n > limit else 0.001], n), 64))
    passed = [r.plan.streams for r in found if r.passed]
    assert max(passed, default=0) >= min(limit, 64) - max(1, limit // 16)
    assert max(passed, default=0) <= limit
    assert len(found) < 12


def test_a_server_that_hangs_up_is_told():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        connection = Connection(*listening.getsockname())
        listening.accept()[0].close()
        with pytest.raises((WireError, ConnectionResetError)):
            connection.receive()
        connection.close()


def test_the_command_refuses_what_is_no_measurement(capsys):
    assert cli.main(["load", "--streams", "5000"]) == 2
    assert "accepted are up to 500 streams" in capsys.readouterr().err


def test_all_bytes_of_grpc_are_taken_at_once():
    async def take() -> tuple[int, bytes]:
        loop = asyncio.get_running_loop()
        wakeups.gather(loop)
        read, write = socket.socketpair()
        read.setblocking(False)
        calls = []

        def handle() -> None:
            calls.append(read.recv(1))

        handle.__module__ = "grpc._cython.cygrpc"
        loop.add_reader(read, handle)
        write.send(b"1" * 300)
        await asyncio.sleep(0.01)
        loop.remove_reader(read)
        try:
            return len(calls), read.recv(1)
        except BlockingIOError:
            return len(calls), b""
        finally:
            read.close()
            write.close()

    assert asyncio.run(take()) == (1, b"")
