"""uvicorn's connections, and what this service needs beyond: who is at the other end, and when to end."""

import asyncio
import logging
import socket
from asyncio import constants, sslproto
from functools import partial
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

MAX_WEBSOCKET_MESSAGE_BYTES = 1024 * 1024
"""Of a WebSocket: above all that is accepted, so that what is a little too long gets a declared error."""

_SEND_BUFFER_BYTES = 128 * 1024  # two thirds of a second at most, more than is under way on any healthy line

_LOGGER = logging.getLogger("uvicorn.error.websocket")
_LOGGER.setLevel(logging.WARNING)


class _Http(H11Protocol):
    """HTTP/1.1 whose requests have the connection's transport in their state.

    Closes connections on which the head of a request, the first or a further one, does not come in time.
    """

    def __init__(self, *args: Any, head_seconds: float, **named: Any) -> None:
        super().__init__(*args, **named)
        self._head_seconds = head_seconds
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, "transport": transport}
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_waiting()

    def _await_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self._head_seconds, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


class _WebSocket(WebSocketsSansIOProtocol):
    """A WebSocket that is not cut when the server is told to stop: `Streams` lets it end, or tells it to.

    The system holds little of what its caller does not read, or it would take minutes to notice that.
    """

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        # The stream's own lines tell of it, and nothing may log headers or queries, and API keys with them.
        self.logger = self.conn.logger = _LOGGER
        self.conn.debug = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)

    def shutdown(self) -> None:
        if self.close_sent or not self.handshake_complete:
            super().shutdown()


def bound_handshakes(seconds: float) -> None:
    """Let TLS handshakes of this process end in time and take little: asyncio gives each 60 s and 256 KiB."""
    constants.SSL_HANDSHAKE_TIMEOUT = seconds  # uvicorn leaves it to asyncio
    sslproto.SSLProtocol.max_size = 16 * 1024  # that is read at once: a record of TLS


def options(head_seconds: float) -> dict[str, Any]:
    """What to pass to `uvicorn.Config`; head_seconds: longest wait for the head of a request."""
    return {
        "http": partial(_Http, head_seconds=head_seconds),
        "ws": _WebSocket,
        "ws_max_size": MAX_WEBSOCKET_MESSAGE_BYTES,
        "ws_per_message_deflate": False,  # audio with noise does not shrink
    }
