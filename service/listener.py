"""Which worker takes the next gRPC connection: streams should not crowd on one core while another idles.

The system deals connections out to all workers that listen (`SO_REUSEPORT`), and a connection brings any
number of streams. Two things keep callers with few connections from crowding one worker. Connections have an
age, after which further streams come over new ones. And a worker that is full while another has room stops to
listen, and asks its callers to go (GOAWAY); the streams it has go on. 40 streams over one connection, to two
workers that carry 32 each, so became 20 and 20, or at worst 32 and 8; before, 32 and 8 refused for ever.
"""

import asyncio
import math
import time
from collections.abc import Callable, Coroutine
from typing import Any

import grpc

from service.board import Board

QUIET_SECONDS = 0.02
"""A full worker leaves when no stream was opened for so long: one that comes just then is cancelled, not told
when to come back."""

PATIENCE_SECONDS = 0.25
"""After this time it leaves all the same."""

CHECK_SECONDS = 0.25
"""How often it sees whether to come back."""

_AS_LONG_AS_IT_TAKES = 10 * 365 * 86_400.0


class Listener:
    """The gRPC port of one worker.

    build: makes a server that is to be started. board: tells how many streams the other workers have.
    """

    def __init__(self, build: Callable[[], grpc.aio.Server], board: Board) -> None:
        self._build = build
        self._board = board
        self._listening: grpc.aio.Server | None = None
        self._due: asyncio.TimerHandle | None = None  # the next check
        self._servers: set[grpc.aio.Server] = set()  # that have connections
        self._tasks: set[asyncio.Task[None]] = set()
        self._opened = -math.inf  # when the latest stream was
        self._full_since = math.inf
        self._stopped = False

    async def start(self) -> None:
        """Listen; raises RuntimeError if the address cannot be had."""
        await self._listen().start()

    async def stop(self, grace: float) -> None:
        """Take no more connections, and end those there are within the grace, in seconds."""
        self._stopped = True
        if self._due is not None:
            self._due.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*(server.stop(grace) for server in self._servers))

    def stream_opened(self) -> None:
        """A stream came in."""
        self._opened = time.monotonic()
        if len(self._board.slots) > 1:
            self._check_in(1.1 * QUIET_SECONDS)

    def _check_in(self, seconds: float) -> None:
        if self._due is None and not self._stopped:
            self._due = asyncio.get_running_loop().call_later(seconds, self._check)

    def _check(self) -> None:
        """Leave new connections to others, or take them again."""
        self._due = None
        mine, room_elsewhere, now = self._board.mine, self._board.room_elsewhere, time.monotonic()
        room = mine.capacity - mine.streams
        if room > 0:
            self._full_since = math.inf
        else:
            self._full_since = min(self._full_since, now)
        if self._listening is None:
            self._check_in(CHECK_SECONDS)
            if room > mine.capacity // 8 or not room_elsewhere:
                self._run(self._listen().start())
        elif room <= 0 and room_elsewhere:
            quiet = now - self._opened >= QUIET_SECONDS or now - self._full_since >= PATIENCE_SECONDS
            self._check_in(CHECK_SECONDS if quiet else QUIET_SECONDS)
            if quiet:
                server, self._listening = self._listening, None
                self._run(self._retire(server))

    def _listen(self) -> grpc.aio.Server:
        """A server that is to be started. From here on it is the one that listens: no check makes another."""
        server = self._listening = self._build()
        self._servers.add(server)
        return server

    async def _retire(self, server: grpc.aio.Server) -> None:
        await server.stop(_AS_LONG_AS_IT_TAKES)
        self._servers.discard(server)

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
