"""When the engine runs: on the event loop, at a beat that lets frames of many streams come together."""

import asyncio
import time

from service.engine import Engine

AIM_SECONDS = 0.008
"""In what time a frame should be answered: what is left of it, the loop waits for more frames. A round's cost
for each stream falls steeply up to 8 of them, and to wake the process for a message costs as much as the
message. The rest of the 10 ms is for the pauses of a shared machine."""

NAP_SECONDS = 0.001
"""How long the loop sleeps between two looks at the network."""

_TURNS = 2
"""Of the loop, from a packet's coming to a session's having it: gRPC's reader, then the stream's task."""


class Ticker:
    """Runs the rounds of an engine.

    The rounds block the event loop on purpose: on one core a thread of their own would have to take turns
    with the transport all the same, for the core and for the interpreter, and to wake it with every answer.
    With several streams the loop sleeps after a round, too, so that it wakes once for all the messages that
    come meanwhile. A frame that comes as a round begins waits for it, for the sleep, and for its own round:
    so the loop may sleep for what two rounds leave of the aim.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._handle: asyncio.Handle | None = None
        self._loop = asyncio.get_running_loop()
        self._next = 0.0  # when the next round is due
        engine.on_work = self._wake

    def close(self) -> None:
        """Run no further round."""
        if self._handle is not None:
            self._handle.cancel()

    def _wake(self) -> None:
        if self._handle is None:
            self._handle = self._loop.call_soon(self._tick)

    def _tick(self) -> None:
        begun = time.monotonic()
        self._engine.run_round(begun)
        ended = time.monotonic()
        self._next = ended + AIM_SECONDS - 2 * (ended - begun)
        self._look(_TURNS)

    def _look(self, turns: int) -> None:
        """Let the loop read and write what can be before the next nap."""
        if turns:
            self._handle = self._loop.call_soon(self._look, turns - 1)
            return
        left = self._next - time.monotonic()
        if self._engine.active > 1 and left > 0:
            time.sleep(min(left, NAP_SECONDS))
            self._handle = self._loop.call_soon(self._look, _TURNS)
        elif self._engine.has_work:
            self._handle = self._loop.call_soon(self._tick)
        else:
            self._handle = None
