"""When the engine runs, in simulated time: rounds take theirs, and sleeping lets messages come."""

import asyncio
from collections.abc import Callable

import pytest

from service.arrivals import Arrivals
from service.engine import DEADLINE_SECONDS
from service.ticker import Ticker

GIVEN_SECONDS = 50e-6
"""What other threads take when the ticker gives way."""


class Simulation:
    """An engine, and a clock that only its rounds, the ticker's sleep and its giving way move on.

    messages: when each one comes and of which stream. As over gRPC, the next one of a stream is there only
    after the loop has slept since it took the last one.
    """

    def __init__(self, messages: list[tuple[float, int]], n_apart: int) -> None:
        self.active = len({stream for _, stream in messages})
        self.n_apart = n_apart
        self.arrivals = Arrivals()
        self.now = 0.0
        self.slept: list[tuple[float, int]] = []  # and how many frames waited
        self.latencies: list[float] = []
        self.rounds: list[int] = []
        self.on_work: Callable[[], None]
        self._coming = sorted(messages)
        self._waiting: list[tuple[float, int]] = []

    @property
    def has_work(self) -> bool:
        return bool(self._waiting)

    @property
    def queued_frames(self) -> int:
        return len(self._waiting)

    def run_round(self, now: float) -> None:
        assert now == self.now
        taken = {stream: came for came, stream in reversed(self._waiting)}  # the oldest of each
        self._waiting = [(came, stream) for came, stream in self._waiting if taken[stream] != came]
        self.now += 0.001 + 0.0001 * len(taken)
        self.rounds.append(len(taken))
        self.latencies += [self.now - came for came in taken.values()]

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept.append((seconds, len(self._waiting) + len(self._coming)))
        self.take()

    def give_way(self) -> None:
        self.sleep(GIVEN_SECONDS)

    def take(self) -> None:
        """Bring a message of each stream that has one."""
        brought: set[int] = set()
        for came, stream in list(self._coming):
            if came <= self.now and stream not in brought:
                brought.add(stream)
                self._coming.remove((came, stream))
                if not self._waiting:
                    self.on_work()
                self._waiting.append((came, stream))

    async def run(self) -> None:
        """Until all messages are answered; while nothing waits, time passes up to the next one."""
        ticker = Ticker(self, lambda: self.now, self.sleep, self.give_way)  # type: ignore[arg-type]
        while self._coming or self._waiting:
            for _ in range(20):
                await asyncio.sleep(0)
            if not self._waiting and self._coming:
                self.now = max(self.now, self._coming[0][0])
                self.take()
        ticker.close()


def simulated(messages: list[tuple[float, int]], n_apart: int) -> Simulation:
    simulation = Simulation(messages, n_apart)
    asyncio.run(simulation.run())
    return simulation


@pytest.mark.parametrize("n_streams", [2, 8, 24])
def test_frames_share_rounds_and_are_answered_in_time(n_streams: int) -> None:
    messages = [(0.01 * i + 0.01 * s / n_streams, s) for i in range(50) for s in range(n_streams)]
    simulation = simulated(messages, n_streams)
    assert len(simulation.latencies) == len(messages)
    assert max(simulation.latencies) < DEADLINE_SECONDS
    assert len(simulation.rounds) < 125  # some two in 10 ms


def test_a_lone_stream_does_not_wait() -> None:
    simulation = simulated([(0.01 * i, 0) for i in range(20)], 1)
    assert simulation.slept == []
    assert max(simulation.latencies) == pytest.approx(0.0011)


def test_streams_that_share_their_messages_are_not_waited_for() -> None:
    simulation = simulated([(0.01 * i, s) for i in range(20) for s in range(16)], 0)
    assert {seconds for seconds, _ in simulation.slept} == {GIVEN_SECONDS}
    assert simulation.rounds == [16] * 20


def test_what_has_piled_up_is_worked_off_without_a_pause() -> None:
    """Five frames of each stream are there at once, one of which gRPC shows at a time."""
    simulation = simulated([(1e-7 * i, s) for i in range(5) for s in range(16)], 16)
    assert len(simulation.latencies) == 80
    assert {seconds for seconds, n_waiting in simulation.slept if n_waiting} == {GIVEN_SECONDS}
