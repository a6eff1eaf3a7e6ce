"""As much of gRPC over HTTP/2 (RFC 9113) as a load generator needs, at a fiftieth of a core for 32 streams.

A gRPC client costs as much CPU as the server under test. This one speaks to servers that are known: one core
drives a hundred streams and still tells when each answer came. It keeps to flow control: what does not fit
the server's window waits here, so that a late server does not slow the sender.
"""

import socket
import struct
import time
from collections.abc import Callable

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM = _ACK = 0x1
_END_HEADERS = 0x4
_ENABLE_PUSH, _INITIAL_WINDOW_SIZE = 2, 4
_DEFAULT_WINDOW = 65_535
_LARGEST_WINDOW = 2**31 - 1
"""What the server may send without asking again: minutes of a hundred streams."""

_RECEIVE_BYTES = 1 << 18
_FRAME_BYTES = 16_384  # that every server takes
_MOST_WAITING_BYTES = 1 << 20


class WireError(Exception):
    """The server ended a connection or a stream that should go on."""


class WireStream:
    """One RPC. on_message: called with each message and the time at which it was read."""

    def __init__(
        self, connection: "Connection", number: int, on_message: Callable[[bytes, float], None]
    ) -> None:
        self.on_message = on_message
        self.ended = False
        self.window = connection.initial_window
        self._connection = connection
        self._number = number
        self._rest = b""
        self._waiting = bytearray()
        self._closing = False

    def send(self, message: bytes) -> bool:
        """Send a message as soon as the server's windows let it; False if too much waits already."""
        if len(self._waiting) > _MOST_WAITING_BYTES:
            return False
        self._waiting += b"\0" + len(message).to_bytes(4) + message
        self.push()
        return True

    def close(self) -> None:
        """Tell that no more messages come."""
        self._closing = True
        self.push()

    def push(self) -> None:
        """Send what waits, as far as the windows go."""
        connection = self._connection
        while self._waiting and (size := min(self.window, connection.window, _FRAME_BYTES)) > 0:
            piece = bytes(self._waiting[:size])
            del self._waiting[:size]
            self.window -= len(piece)
            connection.window -= len(piece)
            connection.write(_frame(_DATA, 0, self._number, piece))
        if self._closing and not self._waiting:
            self._closing = False
            connection.write(_frame(_DATA, _END_STREAM, self._number, b""))

    def feed(self, data: bytes, now: float) -> None:
        """Take a piece of the answers."""
        if self._rest:
            data = self._rest + data
        start = 0
        while len(data) >= start + 5 and len(data) >= (
            end := start + 5 + int.from_bytes(data[start + 1 : start + 5])
        ):
            self.on_message(data[start + 5 : end], now)
            start = end
        self._rest = data[start:]


class Connection:
    """One connection to HOST:PORT; raises OSError and WireError."""

    def __init__(self, host: str, port: int) -> None:
        self.initial_window = self.window = _DEFAULT_WINDOW
        self._authority = f"{host}:{port}"
        self._streams: dict[int, WireStream] = {}
        self._next = 1
        self._rest = b""
        self.socket = socket.create_connection((host, port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        settings = struct.pack(">HIHI", _ENABLE_PUSH, 0, _INITIAL_WINDOW_SIZE, _LARGEST_WINDOW)
        wider = (_LARGEST_WINDOW - _DEFAULT_WINDOW).to_bytes(4)
        self.write(_PREFACE + _frame(_SETTINGS, 0, 0, settings) + _frame(_WINDOW_UPDATE, 0, 0, wider))

    def open(self, path: str, on_message: Callable[[bytes, float], None]) -> WireStream:
        """Begin an RPC of a method, /package.Service/Method."""
        fields = {
            ":method": "POST",
            ":scheme": "http",
            ":path": path,
            ":authority": self._authority,
            "content-type": "application/grpc",
            "te": "trailers",
        }
        stream = self._streams[self._next] = WireStream(self, self._next, on_message)
        headers = b"".join(b"\0" + _text(name) + _text(value) for name, value in fields.items())
        self.write(_frame(_HEADERS, _END_HEADERS, self._next, headers))
        self._next += 2
        return stream

    def write(self, data: bytes) -> None:
        """Send bytes; they fit the socket's buffer, which is larger than the window."""
        self.socket.sendall(data)

    def receive(self) -> None:
        """Read what is there, at least something."""
        data = self.socket.recv(_RECEIVE_BYTES)
        now = time.monotonic()
        if not data:
            raise WireError("the server closed the connection")
        if self._rest:
            data = self._rest + data
        start, there = 0, len(data)
        while there >= start + 9:
            kind, flags = data[start + 3], data[start + 4]
            body = start + 9
            end = body + int.from_bytes(data[start : start + 3])
            if there < end:
                break
            number = int.from_bytes(data[start + 5 : body])
            if kind == _DATA:
                if number in self._streams:
                    self._streams[number].feed(data[body:end], now)
            else:
                self._control(kind, flags, number, data[body:end])
            if flags & _END_STREAM and kind in (_DATA, _HEADERS):
                self._end(number)
            start = end
        self._rest = data[start:]

    def close(self) -> None:
        """Hang up."""
        self.socket.close()

    def _end(self, number: int) -> None:
        stream = self._streams.pop(number, None)
        if stream is not None:  # a reset may follow the status
            stream.ended = True

    def _push(self) -> None:
        for stream in self._streams.values():
            stream.push()

    def _control(self, kind: int, flags: int, number: int, body: bytes) -> None:
        if kind == _WINDOW_UPDATE:
            if not number:
                self.window += int.from_bytes(body)
            elif number in self._streams:
                self._streams[number].window += int.from_bytes(body)
            self._push()
        elif kind == _SETTINGS and not flags & _ACK:
            for name, value in struct.iter_unpack(">HI", body):
                if name == _INITIAL_WINDOW_SIZE:
                    for stream in self._streams.values():
                        stream.window += value - self.initial_window
                    self.initial_window = value
            self._push()
            self.write(_frame(_SETTINGS, _ACK, 0, b""))
        elif kind == _PING and not flags & _ACK:
            self.write(_frame(_PING, _ACK, 0, body))
        elif kind == _RST_STREAM:
            self._end(number)
        elif kind == _GOAWAY:
            raise WireError("the server said that it goes away")


def _frame(kind: int, flags: int, number: int, body: bytes) -> bytes:
    return len(body).to_bytes(3) + bytes((kind, flags)) + number.to_bytes(4) + body


def _text(text: str) -> bytes:
    """A string of HPACK (RFC 7541) of less than 127 bytes, as it is."""
    return bytes((len(text),)) + text.encode()
