"""Files being worked on: how many are accepted, and whose turn it is on the CPU.

Every accepted file has a thread, but only `workers` of them run at an instant. After each block of audio a
file passes its turn to the one that has waited longest, so a short file never waits for a long one to end.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Self, TypeVar

from service import cores
from service.board import Board
from service.cpu import CpuStages
from service.errors import BusyError, ClientGoneError

Result = TypeVar("Result")
Checkpoint = Callable[[], None]


class Turns:
    """At most `n` holders at an instant; whoever waits is served in order of arrival."""

    def __init__(self, n: int) -> None:
        self._lock = threading.Lock()
        self._free = n
        self._waiting: deque[threading.Event] = deque()

    def __enter__(self) -> Self:
        with self._lock:
            if self._free:
                self._free -= 1
                return self
            turn = threading.Event()
            self._waiting.append(turn)
        turn.wait()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._free += 1

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def pass_on(self) -> None:
        """Go to the end of the queue, if there is one."""
        with self._lock:
            if not self._waiting:
                return
            self._waiting.popleft().set()
            turn = threading.Event()
            self._waiting.append(turn)
        turn.wait()


class FileJobs:
    """Admission of files, and the CPU turns of those of one process.

    workers: files worked on at an instant, in this process. limit: files held at once, by all processes on
    the board. cpu: keeps the books of what they take.
    """

    def __init__(
        self, workers: int, limit: int, board: Board | None = None, *, cpu: CpuStages | None = None
    ) -> None:
        self.limit = limit
        self._cpu = cpu or CpuStages()
        self._board = board or Board()
        self._turns = Turns(workers)
        self._threads = ThreadPoolExecutor(limit, "file", initializer=cores.stand_back)

    @property
    def accepted(self) -> int:
        """Files that this process holds."""
        return int(self._board.mine.files)

    @property
    def waiting(self) -> int:
        """Files that could go on if they had the CPU."""
        return self._turns.waiting

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold one of the places, from upload to answer.

        Raises:
            BusyError: all are taken.
        """
        if self._board.total("files") >= self.limit:
            raise BusyError(f"all {self.limit} places for files are taken")
        self._board.mine.files += 1
        try:
            yield
        finally:
            self._board.mine.files -= 1

    async def run(self, work: Callable[[Checkpoint], Result]) -> Result:
        """Run `work` in a thread of its own; it calls the checkpoint it is given after every block.

        Cancelling the awaiting task ends the work at its next checkpoint, and returns only then.
        """
        cancelled = threading.Event()

        def checkpoint() -> None:
            self._turns.pass_on()
            if cancelled.is_set():
                raise ClientGoneError("nobody waits for this file any more")

        def in_turn() -> Result:
            with self._turns:
                try:
                    return work(checkpoint)
                finally:
                    self._cpu.count_file()

        job = asyncio.get_running_loop().run_in_executor(self._threads, in_turn)
        try:
            return await asyncio.shield(job)
        except asyncio.CancelledError:
            cancelled.set()
            await asyncio.gather(job, return_exceptions=True)
            raise
        finally:
            del job  # whose error's traceback leads back here, and to the audio

    async def close(self) -> None:
        """Wait until all places are given back, and end the threads."""
        while self.accepted:
            await asyncio.sleep(0.01)
        self._threads.shutdown()
