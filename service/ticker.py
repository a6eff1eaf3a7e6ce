"""When the engine runs: on the event loop, at a beat that lets frames of many streams come together."""

import asyncio
import math
import os
import time
from collections.abc import Callable
from functools import partial

from service.arrivals import LOOK_SECONDS
from service.engine import Engine

AIM_SECONDS = 0.007
"""In what time a frame should be answered: what is left of it, the loop waits for more frames. A round's cost
for each stream falls steeply up to 8 of them, and to wake the process for a message costs as much as the
message. The rest of the 10 ms is for the pauses of a shared machine."""

_YIELDS = 3
"""Of the core, until gRPC's threads, which wait while the loop is busy, have brought what is there: one takes
it from the network, one tells the loop, and the first one may have more. A sleep of 200 µs in their place
took a tenth of the time at 32 streams, for the core was idle when they were done."""

_TURNS = 4
"""Of the loop, until what gRPC's threads have brought is with the engine: its reader, the RPC's task, that of
a session."""

_LOOKS = 4
"""At what gRPC's threads bring, before a round at most."""


_yield_core = getattr(os, "sched_yield", partial(time.sleep, 0))


def _give_way() -> None:
    """Let other threads have the core, if they want it."""
    for _ in range(_YIELDS):
        _yield_core()


class Ticker:
    """Runs the rounds of an engine. clock, sleep, give_way: other ones for a test.

    The rounds block the event loop on purpose: on one core a thread of their own would have to take turns
    with the transport all the same, for the core and for the interpreter. In each beat the loop takes what
    has come, enhances it in a round, and writes the answers; with several streams it then sleeps, so that it
    wakes once for all the messages that come meanwhile (if not all streams share theirs). A frame that just
    misses a beat is answered by the next one, so the time from beat to beat is what the work of a beat leaves
    of the aim. gRPC's threads, and messages behind the first of a stream, need the loop to give way: a beat
    looks again until no more come. There is no sleep over frames that a round has left.
    """

    def __init__(
        self,
        engine: Engine,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        give_way: Callable[[], None] = _give_way,
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._sleep = sleep
        self._give_way = give_way
        self._work = asyncio.Event()
        self._busy_seconds = AIM_SECONDS / 2  # that beats lately took
        self._next_look: asyncio.TimerHandle | None = None
        engine.on_work = self._work.set
        self._task = asyncio.create_task(self._run())

    def close(self) -> None:
        """Run no further round."""
        self._task.cancel()
        self._stop_looking()

    async def _run(self) -> None:
        while True:
            self._work.clear()
            self._look()
            await self._work.wait()
            self._stop_looking()
            while await self._beat():
                pass

    def _look(self) -> None:
        """Between beats, tell the engine now and then that the loop turns, while there are streams."""
        now = self._clock()
        self._engine.arrivals.looked(now, now + LOOK_SECONDS if self._engine.active else math.inf)
        if self._engine.active:
            self._next_look = asyncio.get_running_loop().call_later(LOOK_SECONDS, self._look)

    def _stop_looking(self) -> None:
        if self._next_look is not None:
            self._next_look.cancel()

    async def _beat(self) -> bool:
        """Whether there was work."""
        begun = self._clock()
        await self._take()
        self._engine.arrivals.looked(self._clock())
        if not self._engine.has_work:
            return False
        self._engine.run_round(self._clock())
        is_behind = self._engine.has_work
        await asyncio.sleep(0)  # the answers are written
        if self._engine.n_apart > 1:
            busy = self._clock() - begun
            self._busy_seconds += 0.2 * (busy - self._busy_seconds)
            left = 0 if is_behind else AIM_SECONDS - self._busy_seconds - busy
            if left > 0:
                self._sleep(left)
            else:
                self._give_way()
        return True

    async def _take(self) -> None:
        """Let the messages come that are there."""
        await self._turn()
        for _ in range(_LOOKS if self._engine.active > 1 else 0):
            n_frames = self._engine.queued_frames
            self._give_way()
            await self._turn()
            if self._engine.queued_frames == n_frames:
                break

    async def _turn(self) -> None:
        for _ in range(_TURNS):
            await asyncio.sleep(0)
