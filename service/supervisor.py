"""One service of many processes: starts a worker for each core, replaces those that are lost, stops them all.

Light on purpose: what a worker needs is imported by the workers alone.
"""

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from types import FrameType
from typing import Any, Self

from percepnet.errors import reason
from service import board
from service.board import Board
from service.logs import logger
from service.settings import Address, Settings

STEADY_SECONDS = 10.0
"""A worker that was lost after so long is replaced at once; sooner, after a pause that doubles each time."""

LONGEST_PAUSE_SECONDS = 30.0

CANNOT_LISTEN = "cannot listen; --http-listen and --grpc-listen choose where: %s"

_GRACE_SECONDS = 5.0
"""What a worker gets beyond the grace that it was told, before it is killed."""

_WORKER = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from service import worker
sys.exit(worker.main(sys.argv[2]))
"""
"""It finds modules where the supervisor does, and not, as `-m` would, in the current directory first."""

_LOOKS = 8
"""A worker that hangs is looked at so often before it is killed."""

_START_PATIENCE = 6
"""Times as often if it has not begun to serve."""


@dataclass(frozen=True)
class Seat:
    """What a worker needs to know: which one it is, and what it shares with the others."""

    worker: int
    n_workers: int
    grpc_listen: str
    """With the port that all of them listen on."""
    flags: dict[str, str]
    """The command line of the service; the environment comes by itself."""
    board: int
    """File descriptor of the board."""
    http: int
    """File descriptor of the socket that all of them take HTTP connections from."""
    alive: int
    """File descriptor of a pipe that ends with the supervisor."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `str` wrote."""
        return cls(**json.loads(text))

    def __str__(self) -> str:
        return json.dumps(asdict(self))


class Supervisor:
    """Runs a number of workers until it is told to stop.

    flags: the command line, as the settings were read from it; the workers read them again.
    """

    def __init__(self, settings: Settings, flags: Mapping[str, Any], n_workers: int) -> None:
        self._settings = settings
        self._flags = {name: text for name, text in flags.items() if isinstance(text, str)}
        self._board_file = board.shared_file(n_workers)
        self._board = Board(n_workers, fd=self._board_file)
        self._workers = [_Worker(i) for i in range(n_workers)]

    def run(self) -> int:
        """Serve until told to stop; returns the exit status of the process."""
        with ExitStack() as held:
            try:
                self._open(held)
            except OSError as error:
                logger.error(CANNOT_LISTEN, reason(error))
                return 1
            for worker in self._workers:
                self._start(worker)
            return self._watch(held.enter_context(_Signals()))

    def _open(self, held: ExitStack) -> None:
        """Take both ports, and a pipe whose end tells the workers that this process is gone."""
        # HTTP has one queue of connections, from which the workers that are idle take them.
        self._http = listening(self._settings, held)
        # For gRPC each worker listens itself; this socket only keeps the port theirs.
        self._grpc = held.enter_context(_bound(self._settings.grpc_listen, shared=True))
        self._alive, kept = os.pipe()
        held.callback(os.close, kept)
        http, grpc = (
            replace(address, port=taken.getsockname()[1])
            for address, taken in (
                (self._settings.http_listen, self._http),
                (self._settings.grpc_listen, self._grpc),
            )
        )
        self._grpc_listen = str(grpc)
        logger.info("%d workers, running on http://%s and gRPC on %s", len(self._workers), http, grpc)

    def _start(self, worker: "_Worker") -> None:
        seat = Seat(
            worker.index,
            len(self._workers),
            self._grpc_listen,
            self._flags,
            self._board_file,
            self._http.fileno(),
            self._alive,
        )
        worker.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _WORKER, json.dumps(sys.path), str(seat)],
            pass_fds=(seat.board, seat.http, seat.alive),
            stdin=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C is for the supervisor, which passes it on in good order
        )
        worker.started = time.monotonic()
        worker.start_again = None
        worker.looks = 0

    def _watch(self, signals: "_Signals") -> int:
        """Replace what is lost or hangs until a signal comes; then wait for all to end."""
        pause = self._settings.hang_seconds / _LOOKS
        look = time.monotonic() + pause
        while not signals.stop:
            now = time.monotonic()
            if now >= look:
                # Looks count, not time: that the whole machine stood still is one look, however long it did.
                look = now + pause
                for worker in self._workers:
                    self._look_at(worker)
            for worker in self._workers:
                if worker.process is not None and worker.process.poll() is not None:
                    status = self._lost(worker)
                    if status is not None:
                        self._end(signals)
                        return status
                if worker.start_again is not None and worker.start_again <= now:
                    self._start(worker)
            due = [worker.start_again for worker in self._workers if worker.start_again is not None]
            signals.wait(max(0.0, min([look, *due]) - time.monotonic()))
        self._end(signals)
        return 0

    def _look_at(self, worker: "_Worker") -> None:
        """Kill a worker whose event loop does not turn, or that does not come to serve: `_lost` finds it."""
        slot = self._board.slots[worker.index]
        if worker.process is None:
            return
        sign = slot.ready, slot.beats
        worker.looks = worker.looks + 1 if sign == worker.sign else 0
        worker.sign = sign
        patience = 1 if slot.ready else _START_PATIENCE
        if worker.looks >= patience * _LOOKS:
            fields = {"worker": worker.index, "silent_seconds": patience * self._settings.hang_seconds}
            logger.error("worker hangs, and is killed", extra={"fields": fields})
            worker.process.kill()
            worker.looks = 0

    def _lost(self, worker: "_Worker") -> int | None:
        """A worker ended unasked; tells the exit status if the service cannot start at all."""
        assert worker.process is not None
        code, slot = worker.process.returncode, self._board.slots[worker.index]
        worker.process = None
        if slot.ready:
            worker.proved = True
        slot.vacate()
        if not worker.proved:
            failure = slot.snapshot
            # So it is with all of them; their message is told once.
            told = (
                failure if isinstance(failure, str) else f"a worker ended with status {code} when it started"
            )
            print(f"percepnet serve: {told}", file=sys.stderr)
            return max(1, code)
        lived = time.monotonic() - worker.started
        worker.pause = (
            0.0 if lived >= STEADY_SECONDS else min(LONGEST_PAUSE_SECONDS, max(1.0, 2 * worker.pause))
        )
        worker.start_again = time.monotonic() + worker.pause
        slot.restarts += 1
        fields = {
            "worker": worker.index,
            "status": code,
            "lived_seconds": round(lived, 3),
            "pause_seconds": worker.pause,
        }
        logger.error("worker lost", extra={"fields": fields})
        return None

    def _end(self, signals: "_Signals") -> None:
        """Let all workers end in good order; kill those that take longer than they may."""
        running = [worker.process for worker in self._workers if worker.process is not None]
        for process in running:
            process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + self._settings.shutdown_grace_seconds + _GRACE_SECONDS
        while any(process.poll() is None for process in running):
            for worker in self._workers:
                if worker.process is not None and worker.process.poll() is not None:
                    self._board.slots[worker.index].vacate()
            left = deadline - time.monotonic()
            if left <= 0 or signals.count > 1:
                for process in running:
                    process.kill()
                    process.wait()
                return
            signals.wait(left)


@dataclass
class _Worker:
    """A place among the workers, and who has it."""

    index: int
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    proved: bool = False  # that a worker can start here
    pause: float = 0.0
    start_again: float | None = None
    sign: tuple[float, float] | None = None  # of life, at the last look: whether it serves, and its beats
    looks: int = 0  # that found no new beat


class _Signals:
    """Waits for signals to this process; those that stop it are counted."""

    def __init__(self) -> None:
        self.count = 0

    @property
    def stop(self) -> bool:
        """Whether to stop."""
        return self.count > 0

    def __enter__(self) -> Self:
        self._awake, wake = socket.socketpair()
        self._wake = wake
        for end in (self._awake, wake):
            end.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._awake, selectors.EVENT_READ)
        self._before = {
            kind: signal.signal(kind, self._came) for kind in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
        }
        self._fd_before = signal.set_wakeup_fd(wake.fileno())
        return self

    def __exit__(self, *exception: object) -> None:
        signal.set_wakeup_fd(self._fd_before)
        for kind, handler in self._before.items():
            signal.signal(kind, handler)
        self._selector.close()
        self._awake.close()
        self._wake.close()

    def wait(self, seconds: float | None) -> None:
        """Return after a signal, a child's end included, or after a time."""
        if self._selector.select(seconds):
            self._awake.recv(4096)

    def _came(self, kind: int, frame: FrameType | None) -> None:
        self.count += kind != signal.SIGCHLD


def listening(settings: Settings, held: ExitStack) -> socket.socket:
    """A socket that listens for HTTP; raises OSError with the address if a port cannot be had."""
    http = held.enter_context(_bound(settings.http_listen))
    http.listen(2048)
    # Binding it without sharing shows whether somebody else has gRPC's port, who might share it too.
    with _bound(settings.grpc_listen) as probe:
        probe.listen()
    return http


def _bound(address: Address, *, shared: bool = False) -> socket.socket:
    """A socket that has a TCP port; raises OSError with the address if it cannot be had."""
    try:
        family, kind, protocol, _, at = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        taken = socket.socket(family, kind, protocol)
        try:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shared:
                taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            taken.bind(at)
        except OSError:
            taken.close()
            raise
    except OSError as error:
        raise OSError(error.errno, f"{address}: {error.strerror}") from error
    return taken
