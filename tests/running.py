"""The service on real sockets, in a thread of the tests."""

import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx
import pytest

from percepnet.cli import main
from percepnet.enhancer import Enhancer
from service import engine
from service.main import Server
from service.settings import Address, Settings

TIMEOUT_SECONDS = 100
"""Ends a test that hangs; nothing is measured with it."""


def eventually(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(0.005)


@contextmanager
def running(enhancer: Enhancer, **choices: Any) -> Iterator[Server]:
    """A started server on free ports; it stops when the block ends.

    It never sends a frame dry: its machine may be slow.
    """
    anywhere = Address("127.0.0.1", 0)
    server = Server(Settings(http_listen=anywhere, grpc_listen=anywhere, **choices), enhancer)
    thread = threading.Thread(target=server.run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "LATE_SECONDS", math.inf)
        thread.start()
        eventually(lambda: server.started, "the server")
        try:
            yield server
        finally:
            server.should_exit = True
            thread.join()


class Service:
    """A running server, and what it tells over HTTP."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.address: tuple[str, int] = server.servers[0].sockets[0].getsockname()
        self.http = httpx.Client(base_url="http://{}:{}".format(*self.address), timeout=TIMEOUT_SECONDS)

    def metric(self, name: str) -> float:
        """The present value of one metric, labels included in its name; 0 if there is none."""
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.removeprefix(name)) for line in lines if line.startswith(f"{name} "))

    def wait_for(self, name: str, value: float) -> None:
        """Return as soon as a metric has a value."""
        eventually(lambda: self.metric(name) == value, f"{name} = {value}")

    def close(self) -> None:
        """Hang up."""
        self.http.close()


Kind = TypeVar("Kind", bound=Service)


@contextmanager
def serving(kind: Callable[[Server], Kind], enhancer: Enhancer, **choices: Any) -> Iterator[Kind]:
    """A started server with the connections of a test to it, which outlive it."""
    with ExitStack() as after_the_server, running(enhancer, **choices) as server:
        service = kind(server)
        after_the_server.callback(service.close)
        yield service


def serve(flags: list[str], log: Path | None = None) -> None:
    """`percepnet serve` in this process, which never sends a frame dry: its machine may be slow.

    log: a file for it, in place of the standard error.
    """
    engine.LATE_SECONDS = math.inf
    if log is not None:
        with log.open("w") as file:
            os.dup2(file.fileno(), sys.stderr.fileno())
    main(["serve", *flags])


class Link:
    """A TCP connection to a server on this machine that can be cut, as a cable is."""

    def __init__(self, port: int) -> None:
        self._server = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._ends: list[socket.socket] = []
        self._carriers: list[threading.Thread] = []
        self._flows = threading.Event()
        self._flows.set()
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    def cut(self) -> None:
        """Break all connections; new ones are possible."""
        for end in self._ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def hold(self) -> None:
        """Carry nothing more, as if the server hung."""
        self._flows.clear()

    def release(self) -> None:
        """Carry what was held, and what comes."""
        self._flows.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._flows.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()
        self.cut()
        for carrier in self._carriers:
            carrier.join()
        for end in self._ends:
            end.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._server))
            self._ends += (near, far)
            for ends in ((near, far), (far, near)):
                self._carriers.append(threading.Thread(target=self._carry, args=ends))
                self._carriers[-1].start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                self._flows.wait()
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    serve(sys.argv[1:])
