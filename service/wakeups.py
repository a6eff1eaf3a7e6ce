"""gRPC's calls for the event loop's attention: fewer, and all taken at once.

grpc.aio has a thread that writes a byte to a socket for each event, and on the loop a reader that takes one
byte, then handles all events there are. The other bytes cost a turn of the loop each; with a loop that turns
less often than events come, they fill the socket's buffer, some 280 of them, and then gRPC's thread stands
still: 16 live streams lagged behind by a second, for ever.
"""

import asyncio
import os
import socket
from collections.abc import Callable
from typing import Any

_MANY = 4096


def read_directly() -> None:
    """Let gRPC, started from here on, read the network in the thread that tells the loop.

    By default a thread of its event engine reads, and wakes that one: at 32 streams another 3 % of a core.
    """
    os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")


def gather(loop: asyncio.AbstractEventLoop) -> None:
    """Let gRPC, started on this loop from here on, take all bytes at once."""
    add_reader = loop.add_reader

    def add(fd: Any, callback: Callable[..., Any], *args: Any) -> Any:
        if isinstance(fd, socket.socket) and "grpc" in _module(callback):
            return add_reader(fd, _with_the_last_byte, fd, callback, *args)
        return add_reader(fd, callback, *args)

    loop.add_reader = add  # type: ignore[method-assign, assignment]


def _with_the_last_byte(read: socket.socket, callback: Callable[..., Any], *args: Any) -> None:
    """Take all bytes but one before the reader looks for events: so it sees those of all the bytes taken."""
    try:
        n_bytes = len(read.recv(_MANY, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        if n_bytes > 1:
            read.recv(n_bytes - 1, socket.MSG_DONTWAIT)
    except BlockingIOError:  # another loop of this process was quicker
        return
    callback(*args)


def _module(callback: Callable[..., Any]) -> str:
    function = getattr(callback, "func", callback)
    return str(getattr(function, "__module__", "")) + type(getattr(function, "__self__", None)).__module__
