"""The service on real sockets, in a thread of the tests."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from percepnet.enhancer import Enhancer
from service.main import Server
from service.settings import Address, Settings

TIMEOUT_SECONDS = 100


def eventually(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(0.005)


@contextmanager
def running(enhancer: Enhancer, **choices: Any) -> Iterator[Server]:
    """A started server on free ports; it stops when the block ends."""
    anywhere = Address("127.0.0.1", 0)
    server = Server(Settings(http_listen=anywhere, grpc_listen=anywhere, **choices), enhancer)
    thread = threading.Thread(target=server.run)
    thread.start()
    eventually(lambda: server.started, "the server")
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join()
