"""Who sends a request, and how much one caller may have at once."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import unquote

from service.board import Board
from service.errors import LimitError

_TRACEPARENT = re.compile(
    r"(00(?=.{53}$)|(?!00|ff)[0-9a-f]{2})-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-[!-~]{1,64})?"
)
"""W3C Trace Context: what is not so must be ignored. Versions after 00 may bring more fields."""


@dataclass(frozen=True)
class Caller:
    """Who sends a request, as far as the log tells."""

    peer: str
    """Address and port, as the interface that it came by writes them: one connection."""
    key: str | None = None
    """Name of the API key."""
    traceparent: str | None = None
    """The caller's trace."""
    session_id: int | None = None
    """Of the sessions that share an RPC, the one that asks."""

    @classmethod
    def of(cls, peer: str, key: str | None, headers: Mapping[str, str]) -> "Caller":
        """The caller behind some headers (names in lower case)."""
        traceparent = headers.get("traceparent", "")
        return cls(peer, key, traceparent if _TRACEPARENT.fullmatch(traceparent) else None)

    @property
    def fields(self) -> dict[str, str | int]:
        """What a log line tells of it."""
        told = {name: value for name, value in vars(self).items() if value is not None}
        return told | {"peer": _address(self.peer)}


def _address(peer: str) -> str:
    """A peer as HTTP writes it: gRPC has `ipv6:%5B::1%5D:53754` for `[::1]:53754`."""
    family, _, address = peer.partition(":")
    return unquote(address) if family in ("ipv4", "ipv6") else peer


class Quota:
    """How many of something each owner has at once, in all workers.

    limit: accepted; None for any number. what: names it in the message. board: of the workers.
    """

    def __init__(self, limit: int | None, what: str, board: Board | None = None) -> None:
        self._limit = limit
        self._what = what
        self._board = board or Board()

    @contextmanager
    def hold(self, owner: str | None) -> Iterator[None]:
        """Count one more of an owner's, nobody's aside; raises LimitError."""
        if self._limit is None or owner is None:
            yield
            return
        entry = f"{owner}: {self._what}"
        self._add(entry, 1)
        try:
            # Counted first, so that of two workers that look at once none overlooks the other.
            if sum((slot.held or {}).get(entry, 0) for slot in self._board.slots) > self._limit:
                raise LimitError(f"at most {self._limit} {self._what} at once; end one first")
            yield
        finally:
            self._add(entry, -1)

    def _add(self, entry: str, number: int) -> None:
        held = Counter(self._board.mine.held)
        held[entry] += number
        self._board.mine.held = +held  # without those of which nothing is left
