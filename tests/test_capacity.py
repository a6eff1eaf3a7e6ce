"""How many live streams a process says it can carry."""

import math
import os
from socket import socket
from types import SimpleNamespace

import numpy as np
import pytest

from percepnet.enhancer import Enhancer
from percepnet.model import Model
from service import board, capacity, cores, logs, main, worker
from service.engine import Engine, Options, Room
from service.errors import BusyError
from service.metrics import Metrics
from service.supervisor import Seat


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine whose rounds take 1 ms, and 0.1 ms more for each stream."""
    monkeypatch.setattr(
        capacity, "_round_seconds", lambda enhancer, batches: [1e-3 + 1e-4 * n for n in batches]
    )


@pytest.mark.usefixtures("steady")
@pytest.mark.parametrize(
    ("share", "expected"),
    [
        pytest.param(1.0, 25, id="7.5 ms · (1 − 2 · 1.6 / 8.5) / (0.1 ms + 0.085 ms)"),
        pytest.param(float("inf"), 25, id="more than a core"),
        pytest.param(0.5, 12, id="half a core"),
        pytest.param(0.01, 1, id="hardly any"),
    ],
)
def test_streams_fill_what_may_be_planned_for(random_model: Model, share: float, expected: int) -> None:
    assert capacity.measure(Enhancer(random_model), share).plain_streams == expected


def test_this_machine_carries_a_stream(random_model: Model) -> None:
    assert capacity.measure(Enhancer(random_model)).plain_streams >= 1


@pytest.mark.usefixtures("steady")
@pytest.mark.parametrize(
    ("milliseconds", "expected"),
    [pytest.param(0, 25, id="any length"), (10, 25), (20, 32), (100, 43), (5, 17)],
)
def test_fewer_messages_leave_room_for_more_streams(
    random_model: Model, milliseconds: int, expected: int
) -> None:
    enhancer = Enhancer(random_model)
    metrics = Metrics(random_model)
    engine = Engine(enhancer, capacity.measure(enhancer), metrics)
    options = Options(16_000, message_samples=16 * milliseconds)
    sessions = [engine.open(options, lambda: None) for _ in range(expected)]
    with pytest.raises(BusyError):
        engine.open(options, lambda: None)
    assert expected <= metrics.board.mine.capacity <= expected + 1
    for session in sessions:
        engine.close(session)
    assert metrics.board.mine.capacity == engine.capacity == 25


@pytest.mark.usefixtures("steady")
def test_shorter_messages_than_promised_cost_what_they_cost_without_a_promise(random_model: Model) -> None:
    enhancer = Enhancer(random_model)
    engine = Engine(enhancer, capacity.measure(enhancer), Metrics(random_model))
    promised, sent = Options(16_000, message_samples=16_000), np.zeros(160, np.float32)
    sessions = [engine.open(promised, lambda: None) for _ in range(46)]
    with pytest.raises(BusyError):
        engine.open(promised, lambda: None)
    for session in sessions[1:]:
        session.push(sent, 0.0)
    assert engine.capacity == engine.active
    while engine.active > 25:
        with pytest.raises(BusyError):
            engine.open(promised, lambda: None)
        engine.close(sessions.pop())
    engine.open(promised, lambda: None)
    for session in sessions:
        engine.close(session)
    assert engine.capacity == 25


@pytest.mark.usefixtures("steady")
def test_a_stream_of_the_shortest_messages_is_taken_alone(random_model: Model) -> None:
    enhancer = Enhancer(random_model)
    engine = Engine(enhancer, capacity.measure(enhancer, 0.5), Metrics(random_model))
    session = engine.open(Options(48_000, message_samples=1), lambda: None)
    assert engine.capacity == 1
    with pytest.raises(BusyError, match="all 1 live streams"):
        engine.open(Options(48_000, message_samples=480), lambda: None)
    engine.close(session)
    assert engine.capacity == 12


@pytest.mark.usefixtures("steady")
def test_sessions_that_share_messages_take_less(random_model: Model) -> None:
    room = capacity.measure(Enhancer(random_model))
    alone, sharing = Options(16_000, message_samples=160), Options(16_000, shares_messages=True)
    assert room.cost(sharing) < 0.8 * room.cost(alone)
    assert room.most_streams >= int(room.left / room.cost(sharing))


def test_workers_on_fewer_cores_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though, once it is pinned, each has a core for its own as far as the system tells."""
    cpus, shares = [0, 1], []

    def serve(*_: object, share: float, **__: object) -> SimpleNamespace:
        shares.append(share)
        return SimpleNamespace(run=lambda sockets: sockets[0].close())

    monkeypatch.setattr(cores, "usable", lambda: cpus)
    monkeypatch.setattr(cores, "quota", lambda: math.inf)
    monkeypatch.setattr(cores, "pin", lambda *_: cpus.pop())
    monkeypatch.setattr(main, "Server", serve)
    for module, name in ((main, "load_enhancer"), (logs, "configure"), (cores, "share_calmly")):
        monkeypatch.setattr(module, name, lambda *_: None)
    file = board.shared_file(3)
    assert worker.main(str(Seat(0, 3, "127.0.0.1:0", {}, file, socket().detach(), -1))) == 0
    os.close(file)
    assert shares == [pytest.approx(2 / 3)]


def test_room_is_what_is_left() -> None:
    assert Room(8).plain_streams == Room(8).most_streams == 8
    assert Room(1.0, 0.1, 0.1).plain_streams == 5
    assert Room(1.0, 0.1, 0.1, 0.05).most_streams == 20
