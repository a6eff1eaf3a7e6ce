"""uvicorn's connections, and what this service needs beyond: who is at the other end, and when to end."""

import asyncio
import logging
import socket
import time
from asyncio import constants, sslproto
from functools import partial
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame

MAX_WEBSOCKET_MESSAGE_BYTES = 1024 * 1024
"""Of a WebSocket: above all that is accepted, so that what is a little too long gets a declared error."""

_SEND_BUFFER_BYTES = 128 * 1024  # two thirds of a second at most, more than is under way on any healthy line

_PIECE_BYTES = 1024  # 10 ms of a call, or 170 frames at most
_TURN_SECONDS = 0.001  # of CPU time for parsing, seldom used up by a call
_REST_SECONDS = 0.01  # after a turn that was
_MAX_FRAGMENTS = 1024  # of a message, held as such

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
    Tens of thousands of frames may be read at once: they are parsed in pieces, each after the messages of the
    one before are taken, and a flood of them gets a tenth of the process or so.
    """

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        # The stream's own lines tell of it, and nothing may log headers or queries, and API keys with them.
        self.logger = self.conn.logger = _LOGGER
        self.conn.debug = False
        self._unparsed = bytearray()
        self._next_turn: asyncio.Handle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._next_turn is not None:
            self._next_turn.cancel()

    def data_received(self, data: bytes) -> None:
        self._unparsed += data
        if self._next_turn is None:
            self._parse()

    async def receive(self) -> Any:
        message = await super().receive()
        self._go_on()
        return message

    async def send(self, message: Any) -> None:
        await super().send(message)
        self._go_on()

    def handle_cont(self, event: Frame) -> None:
        super().handle_cont(event)
        if len(self.frames) > _MAX_FRAGMENTS:
            self.frames = [b"".join(self.frames)]

    def shutdown(self) -> None:
        if self.close_sent or not self.handshake_complete:
            super().shutdown()

    def _go_on(self) -> None:
        """Parse the rest, if that waited for a message to be taken, after all others had a turn."""
        if self._unparsed and not self.read_paused and self._next_turn is None:
            self._next_turn = self.loop.call_soon(self._parse)
        if self._next_turn is not None:
            self.transport.pause_reading()

    def _parse(self) -> None:
        """Take what was read, up to a message or to the end of the turn, and read on if nothing is left."""
        self._next_turn = None
        start = time.thread_time()
        took = 0.0
        while self._unparsed and not self.read_paused and took < _TURN_SECONDS:
            if self.transport.is_closing():
                return
            piece = bytes(self._unparsed[:_PIECE_BYTES])
            del self._unparsed[:_PIECE_BYTES]
            super().data_received(piece)
            took = time.thread_time() - start
        if took >= _TURN_SECONDS:
            self._next_turn = self.loop.call_later(_REST_SECONDS, self._parse)
        if self._unparsed or self._next_turn is not None:
            self.transport.pause_reading()
        elif not self.read_paused:
            self.transport.resume_reading()


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
