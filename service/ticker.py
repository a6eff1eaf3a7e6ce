"""When the engine runs: on the event loop, a moment after the first frame came, so that others can join."""

import asyncio

from service.engine import Engine

COALESCE_SECONDS = 0.002
"""How long a frame waits for frames of other streams: a round's cost per stream falls steeply up to 8 of
them, and what comes in meanwhile is read, and later answered, in one go."""


class Ticker:
    """Runs the rounds of an engine.

    The rounds block the event loop on purpose: on one core a thread of their own would have to take turns
    with the transport all the same, for the core and for the interpreter, and to wake it with every answer.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._handle: asyncio.Handle | None = None
        self._loop = asyncio.get_running_loop()
        engine.on_work = self._wake

    def close(self) -> None:
        """Run no further round."""
        if self._handle is not None:
            self._handle.cancel()

    def _wake(self) -> None:
        if self._handle is None:
            self._handle = self._loop.call_later(COALESCE_SECONDS, self._tick)

    def _tick(self) -> None:
        self._engine.run_round()
        # What is left waits until the loop has looked at the network again.
        self._handle = self._loop.call_soon(self._tick) if self._engine.has_work else None
