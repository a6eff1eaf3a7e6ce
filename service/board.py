"""What the workers of one service tell each other, in memory that they share.

Every worker writes into a slot of its own, so nothing is locked. Whatever a worker was doing when it was
killed, the others read whole numbers and whole snapshots.
"""

import json
import mmap
import os
import tempfile
from typing import Any

SHEET_BYTES = 512 * 1024
"""Room for what is written on a sheet, some 20 kB; pages that are never written take no memory."""

_NUMBERS_BYTES = mmap.PAGESIZE
_SLOT_BYTES = _NUMBERS_BYTES + 4 * SHEET_BYTES


class _Number:
    """A number in a slot: eight aligned bytes, written and read at once."""

    def __init__(self, index: int) -> None:
        self._index = index

    def __get__(self, slot: "Slot", owner: type) -> float:
        return slot.numbers[self._index]

    def __set__(self, slot: "Slot", value: float) -> None:
        slot.numbers[self._index] = value


class _Sheet:
    """Something that JSON can carry, replaced as a whole; None until it is written.

    Of two halves of its memory one counts, and the other one is written.
    """

    def __init__(self, place: int) -> None:
        self._place = place
        self._half = 8 + 3 * place  # the numbers that tell which one counts, and their lengths in bytes
        self._lengths = (self._half + 1, self._half + 2)

    def __get__(self, slot: "Slot", owner: type) -> Any:
        while True:
            half = int(slot.numbers[self._half])
            data = bytes(slot.sheets[self._place][half][: int(slot.numbers[self._lengths[half]])])
            try:
                return json.loads(data) if data else None
            except ValueError:  # it was replaced twice meanwhile
                continue

    def __set__(self, slot: "Slot", value: Any) -> None:
        data = json.dumps(value, separators=(",", ":")).encode()
        if len(data) > SHEET_BYTES:
            raise ValueError(f"{len(data)} bytes to tell the other workers; there is room for {SHEET_BYTES}")
        half = 1 - int(slot.numbers[self._half])
        slot.sheets[self._place][half][: len(data)] = data
        slot.numbers[self._lengths[half]] = len(data)
        slot.numbers[self._half] = half  # until here, readers see the one before


class Slot:
    """What one worker tells; a worker in the place of a lost one finds its predecessor's snapshot."""

    ready = _Number(0)
    """1 while it serves."""
    streams = _Number(1)
    """Live streams that are open."""
    capacity = _Number(2)
    """Live streams that may be open at once."""
    files = _Number(3)
    """Files held, from upload to answer."""
    cpu_seconds = _Number(4)
    """CPU time that its live streams took lately."""
    open_seconds = _Number(5)
    """Time that its live streams were open lately, summed over them."""
    restarts = _Number(6)
    """How often the worker was replaced; written by the supervisor."""
    beats = _Number(7)
    """Counts on, every second, as long as its event loop turns."""
    streams_lost = _Number(14)  # after those of both sheets
    """Live streams that ended with a worker; written by the supervisor."""
    snapshot = _Sheet(0)
    """The values of its metrics."""
    held = _Sheet(1)
    """What its callers hold: numbers, by limit and key."""

    def __init__(self, memory: memoryview) -> None:
        self.numbers = memory[:_NUMBERS_BYTES].cast("d")
        halves = [memory[_NUMBERS_BYTES:][i * SHEET_BYTES :][:SHEET_BYTES] for i in range(4)]
        self.sheets = (halves[:2], halves[2:])

    def vacate(self) -> None:
        """The worker is gone: what it held is free, what it counted stays, its streams are lost."""
        self.streams_lost += self.streams
        self.ready = self.streams = self.capacity = self.files = self.cpu_seconds = self.open_seconds = 0
        self.held = None


class Board:
    """The slots of all workers of one service; a service of one process has a board with one.

    mine: the slot of this process. fd: what `shared_file` made; without one, the board is for this process.
    """

    def __init__(self, n_slots: int = 1, mine: int = 0, fd: int = -1) -> None:
        memory = memoryview(mmap.mmap(fd, n_slots * _SLOT_BYTES))
        self.slots = [Slot(memory[i * _SLOT_BYTES :][:_SLOT_BYTES]) for i in range(n_slots)]
        self.mine = self.slots[mine]

    @property
    def others(self) -> list[Slot]:
        """The slots of the other workers that serve."""
        return [slot for slot in self.slots if slot is not self.mine and slot.ready]

    @property
    def room_elsewhere(self) -> bool:
        """Whether another worker could take a live stream."""
        return any(slot.streams < slot.capacity for slot in self.others)

    def total(self, name: str) -> float:
        """The sum of a number over all workers."""
        return sum(getattr(slot, name) for slot in self.slots)


def shared_file(n_slots: int) -> int:
    """The descriptor of a file for a board of so many slots, which ends with its last user."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("percepnet-board")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, n_slots * _SLOT_BYTES)
    return fd
