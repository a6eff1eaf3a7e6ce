"""Many streams over one RPC to each server: what `Client(…, multiplex=True)` does.

A session stands in for the RPC that a stream would have of its own, so all the rest is the same: balancing,
taking up broken streams, limits and errors of each stream. What is sent at about the same time goes in one
message.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from queue import Empty, SimpleQueue
from typing import Any, TypeAlias

import grpc

from service.client.conversation import SERVICE, Request, Response
from service.client.pods import CallError, is_full
from service.pb.percepnet_service.v1 import enhancement_pb2 as pb

METHOD = f"{SERVICE}/EnhanceStreams"

MESSAGE_BYTES = 1024 * 1024
"""Requests that go in one message, at most and a little over."""

_CODES = {code.value[0]: code for code in grpc.StatusCode}


class _HungUpError(CallError):
    """We hung up ourselves."""

    def __init__(self) -> None:
        super().__init__(grpc.StatusCode.CANCELLED, "the stream was hung up")


def _broke() -> CallError:
    return CallError(grpc.StatusCode.UNAVAILABLE, "the connection broke")


def _late() -> CallError:
    return CallError(grpc.StatusCode.DEADLINE_EXCEEDED, "the stream's time is over")


_Told: TypeAlias = Response | grpc.RpcError | None
"""What comes for a session: an answer, the error or (None) the good end that is the last."""


class _Batches:
    """Requests on their way into messages."""

    def __init__(self) -> None:
        self._waiting: deque[pb.SessionRequest] = deque()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, number: int, request: Request) -> None:
        self._waiting.append(pb.SessionRequest(session_id=number, request=request))

    def take(self) -> pb.EnhanceStreamsRequest:
        """The next message."""
        message, size = pb.EnhanceStreamsRequest(), 0
        while self._waiting and size < MESSAGE_BYTES:
            message.sessions.append(self._waiting.popleft())
            size += message.sessions[-1].ByteSize()
        return message


def _told(response: pb.SessionResponse) -> _Told:
    if response.HasField("response"):
        return response.response
    ended = response.ended
    if not ended.code:
        return None
    return CallError(_CODES.get(ended.code, grpc.StatusCode.UNKNOWN), ended.message, ended.retry_seconds)


class Trunk:
    """The RPC that the sessions with one server share, for threads; `start` it with its first session."""

    def __init__(self, channel: grpc.Channel, metadata: Any) -> None:
        self._channel = channel
        self._metadata = metadata
        self._sessions: dict[int, Session] = {}
        self._numbers = count()
        self._batches = _Batches()
        self._changed = threading.Condition()
        self._over = False
        self._full = False

    def start(self) -> None:
        """Call the server."""
        method = self._channel.stream_stream(
            METHOD, pb.EnhanceStreamsRequest.SerializeToString, pb.EnhanceStreamsResponse.FromString
        )
        self._call: Any = method(self._messages(), metadata=self._metadata)
        threading.Thread(target=self._listen, daemon=True).start()

    def session(self, timeout_seconds: float | None) -> "Session | None":
        """Open a session; None if this RPC is over, or the worker at its other end full."""
        with self._changed:
            if self._over or self._full:
                return None
            number = next(self._numbers)
            session = self._sessions[number] = Session(self, number, timeout_seconds)
            return session

    def send(self, number: int, request: Request) -> None:
        """Put a request into the next message."""
        with self._changed:
            self._batches.add(number, request)
            self._changed.notify()

    def _messages(self) -> Iterator[pb.EnhanceStreamsRequest]:
        while True:
            with self._changed:
                while not (self._batches or self._over):
                    self._changed.wait()
                if self._over:
                    return
                message = self._batches.take()
            yield message

    def _listen(self) -> None:
        error: grpc.RpcError = _broke()
        try:
            for message in self._call:
                for response in message.sessions:
                    self._tell(response.session_id, _told(response))
        except grpc.RpcError as raised:
            error = raised
        self._end()
        for number in list(self._sessions):
            self._tell(number, error)

    def _tell(self, number: int, told: _Told) -> None:
        with self._changed:
            session = self._sessions.get(number)
            if session is None:
                return
            self._full = self._full or is_full(told)
            session.told.put(told)
            if not isinstance(told, Response):
                del self._sessions[number]
            if self._sessions:
                return
        self._end()

    def _end(self) -> None:
        """Hang up after the last session."""
        with self._changed:
            self._over = True
            self._changed.notify()


class Session:
    """One stream's part of a trunk, used like the requests and the call of an RPC of its own."""

    def __init__(self, trunk: Trunk, number: int, timeout_seconds: float | None) -> None:
        self.told: SimpleQueue[_Told] = SimpleQueue()
        self._trunk = trunk
        self._number = number
        self._deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        self._ending = False

    def put(self, request: Request | None) -> None:
        """Send a request; None: there are no more."""
        if not self._ending:
            request = request or Request(end=pb.End())
            self._ending = _is_last(request)
            self._trunk.send(self._number, request)

    def cancel(self) -> None:
        """Hang up: tell the server, and whoever waits here."""
        self.put(None)
        self.told.put(_HungUpError())

    def __iter__(self) -> Iterator[Response]:
        return self

    def __next__(self) -> Response:
        """The next answer; raises grpc.RpcError."""
        try:
            pause = None if self._deadline is None else max(0, self._deadline - time.monotonic())
            told = self.told.get(timeout=pause)
        except Empty:
            told = _late()
            self.put(None)
        if isinstance(told, Response):
            return told
        self.told.put(told)  # for whoever asks again
        if told is None:
            raise StopIteration
        raise told


class AsyncTrunk:
    """The RPC that the sessions with one server share, for asyncio; `start` it with its first session."""

    def __init__(self, channel: grpc.aio.Channel, metadata: Any) -> None:
        self._channel = channel
        self._metadata = metadata
        self._sessions: dict[int, AsyncSession] = {}
        self._numbers = count()
        self._batches = _Batches()
        self._there = asyncio.Event()
        self._over = False
        self._full = False

    def start(self) -> None:
        """Call the server."""
        method = self._channel.stream_stream(
            METHOD, pb.EnhanceStreamsRequest.SerializeToString, pb.EnhanceStreamsResponse.FromString
        )
        self._call: Any = method(metadata=self._metadata)
        self._speaking = asyncio.create_task(self._speak())
        self._listening = asyncio.create_task(self._listen())

    def session(self, timeout_seconds: float | None) -> "AsyncSession | None":
        """Open a session; None if this RPC is over, or the worker at its other end full."""
        if self._over or self._full:
            return None
        number = next(self._numbers)
        session = self._sessions[number] = AsyncSession(self, number, timeout_seconds)
        return session

    def send(self, number: int, request: Request) -> None:
        """Put a request into the next message."""
        self._batches.add(number, request)
        self._there.set()

    async def _speak(self) -> None:
        # That the call is over shows where answers are read.
        with suppress(grpc.RpcError, asyncio.InvalidStateError, asyncio.CancelledError):
            while not self._over:
                await self._there.wait()
                self._there.clear()
                while self._batches:
                    await self._call.write(self._batches.take())
            await self._call.done_writing()

    async def _listen(self) -> None:
        error: grpc.RpcError = _broke()
        try:
            while (message := await self._call.read()) is not grpc.aio.EOF:
                for response in message.sessions:
                    self._tell(response.session_id, _told(response))
        except grpc.RpcError as raised:
            # INTERNAL is what gRPC makes of a message that it could not write: sessions have their own.
            if raised.code() is not grpc.StatusCode.INTERNAL:
                error = raised
        except asyncio.CancelledError:
            error = _HungUpError()
        finally:
            self._end()
            self._speaking.cancel()  # a write that waits for the server never hears of it
            for number in list(self._sessions):
                self._tell(number, error)

    def _tell(self, number: int, told: _Told) -> None:
        session = self._sessions.get(number)
        if session is None:
            return
        self._full = self._full or is_full(told)
        session.told.put_nowait(told)
        if not isinstance(told, Response):
            del self._sessions[number]
        if not self._sessions:
            self._end()

    def _end(self) -> None:
        """Hang up after the last session."""
        self._over = True
        self._there.set()


class AsyncSession:
    """One stream's part of a trunk, used like an RPC of its own."""

    def __init__(self, trunk: AsyncTrunk, number: int, timeout_seconds: float | None) -> None:
        self.told: asyncio.Queue[_Told] = asyncio.Queue()
        self._trunk = trunk
        self._number = number
        self._deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        self._ending = False

    async def write(self, request: Request) -> None:
        """Send a request."""
        self._put(request)

    async def done_writing(self) -> None:
        """There are no more requests."""
        self._put(None)

    def cancel(self) -> None:
        """Hang up: tell the server, and whoever waits here."""
        self._put(None)
        self.told.put_nowait(_HungUpError())

    async def read(self) -> Any:
        """The next answer, EOF at the end; raises grpc.RpcError, InvalidStateError after `cancel`."""
        try:
            pause = None if self._deadline is None else max(0, self._deadline - time.monotonic())
            async with asyncio.timeout(pause):
                told = await self.told.get()
        except TimeoutError:
            told = _late()
            self._put(None)
        if isinstance(told, Response):
            return told
        self.told.put_nowait(told)  # for whoever asks again
        if told is None:
            return grpc.aio.EOF
        if isinstance(told, _HungUpError):
            raise asyncio.InvalidStateError("the session was hung up")
        raise told

    async def code(self) -> grpc.StatusCode:
        """Wait for the end."""
        while await self.read() is not grpc.aio.EOF:
            pass
        return grpc.StatusCode.OK

    def _put(self, request: Request | None) -> None:
        if not self._ending:
            request = request or Request(end=pb.End())
            self._ending = _is_last(request)
            self._trunk.send(self._number, request)


def _is_last(request: Request) -> bool:
    return request.HasField("end") or request.HasField("hand_over")
