"""Many sessions over one RPC: each is a conversation as over an RPC of its own, on a wire that they share."""

import asyncio
import logging
import time
from collections import deque
from dataclasses import replace

import grpc

from percepnet.errors import ParameterError
from service import messages
from service.callers import Caller
from service.errors import (
    AheadError,
    BusyError,
    ClientGoneError,
    IdleError,
    SlowReaderError,
    StoppingError,
    UnauthenticatedError,
    answer_for,
    told,
)
from service.logs import logger
from service.messages import pb
from service.streams import Member, Streams, Wire

AHEAD_BYTES = 512 * 1024
"""Requests of one session that may wait besides what it may have unanswered: the 2.6 s, at 48 kHz in floats,
that our client sends at once when it takes a stream up again. HTTP/2 would hold an RPC of its own back; here
that would hold back all sessions."""

REQUEST_BYTES = 64
"""What each of them counts at least: memory is taken by the shortest one, too."""

SHARED_BYTES = 256 * 1024
"""A longer message does not stay in memory for the sake of one of its requests."""

MAX_REQUESTS_BYTES = 2 * 1024 * 1024
"""Requests of one message: our client sends 1 MiB and a little over."""

MAX_ANSWERS_BYTES = 1024 * 1024
"""Answers of one message, and those that may wait for the caller to read: callers take 4 MiB by default."""

_BURST = 256
"""Requests that are taken without a turn for all others: 2 MiB of the shortest ones take half a second."""

_REMEMBERED = 1024
"""Sessions that ended and for which requests may still be on their way."""


class Multiplex(Member):
    """One EnhanceStreams RPC."""

    def __init__(self, streams: Streams, context: grpc.aio.ServicerContext, caller: Caller) -> None:
        super().__init__()
        self._streams = streams
        self._context = context
        self._caller = caller
        self._wires: dict[int, _SessionWire] = {}
        self._ended: dict[int, None] = {}  # a set that keeps the order
        self._outbox: deque[bytes] = deque()  # each one a message that would do alone
        self._there = asyncio.Event()  # there are answers, or nothing more will come
        self._room = asyncio.Event()  # answers may be added
        self._room.set()
        self._ending = False
        self._waiting_bytes = 0
        self._writing: float | None = None  # since when a message waits to be taken

    @property
    def begun(self) -> bool:
        """Whether there are sessions, or answers, to bring to their end."""
        return bool(self._wires or self._outbox) or self._writing is not None

    @property
    def waiting_since(self) -> float | None:
        """Who does not read the last answers counts as one that does not begin: it takes memory, too."""
        return None if self._wires or self.error is not None else self._writing or self._heard

    def check(self, oldest: float, limit: str) -> None:
        """Fail if there was no session, or a message waits to be taken, since a time."""
        if self._writing is not None and self._writing < oldest:
            self.fail(SlowReaderError(f"the answers were not read for {limit}"))
        elif not self._wires and self._heard < oldest:
            self.fail(IdleError(f"no session was open for {limit}"))

    async def run(self) -> None:
        """Serve the RPC to its end; raises what ended it early."""
        self._streams.check_read(self._caller)
        writer = asyncio.create_task(self._write_answers())
        writer.add_done_callback(_is_known)
        try:
            with self._streams.watched(self):
                await self._read_messages()
                self._ending = True
                self._there.set()
                await writer
        finally:
            self._reader = None  # only the caller may cut the end short
            # gRPC sends no status while a message is in the way: that must be left to end, whatever comes.
            self._ending = True
            self._outbox.clear()
            self._there.set()
            tasks = [wire.task for wire in self._wires.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._streams.leave(self._caller, writer)

    async def _read_messages(self) -> None:
        """Take messages up to the end, and wait for that of all sessions."""
        while (data := await self._context.read()) is not grpc.aio.EOF:
            for i, request in enumerate(_parsed(data).sessions, 1):
                if self._take(request, len(data)) or i % _BURST == 0:
                    await asyncio.sleep(0)
                if not self.has_room:
                    await self._room.wait()
        for wire in self._wires.values():
            wire.feed(None)
        while self._wires:
            await asyncio.wait([wire.task for wire in self._wires.values()])

    def _take(self, request: pb.SessionRequest, message_bytes: int) -> bool:
        """Bring a request to its session; one that is not open yet begins with it, or is refused.

        Returns whether it begins: in a turn of the loop it takes a place, or is refused, before more come.
        """
        number = request.session_id
        self._heard = time.monotonic()
        wire = self._wires.get(number)
        begins = wire is None
        if wire is None:
            if request.request.WhichOneof("payload") != "config" and number in self._ended:
                return False
            if self._streams.stopping():
                self._end(number, StoppingError("the server is stopping; open the session elsewhere"))
                return False
            wire = self._wires[number] = _SessionWire(self, number)
            wire.task = asyncio.create_task(self._serve(number, wire))
        wire.feed(request.request, shared_bytes=message_bytes)
        return begins

    async def _serve(self, number: int, wire: "_SessionWire") -> None:
        error: Exception | None = None
        caller = replace(self._caller, session_id=number)
        try:
            self._check_key()
            await self._streams.converse(wire, caller, shares_messages=True)
        except UnauthenticatedError as raised:
            self._streams.refused(caller, raised)
            error = raised
        except Exception as raised:
            error = raised
        finally:
            self._heard = time.monotonic()
            del self._wires[number]
        self._end(number, error)

    def _check_key(self) -> None:
        """A key that opened the RPC opens no more sessions once it is not known any longer."""
        self._streams.access.caller("", dict(self._context.invocation_metadata() or ()))

    def _end(self, number: int, error: Exception | None) -> None:
        """Tell how a session ended."""
        ended = pb.SessionEnded()
        if error is not None:
            answer = answer_for(error)
            if answer.code == "internal":
                logger.log(logging.ERROR, "session failed", exc_info=error)
            ended.code = grpc.StatusCode[answer.grpc_code].value[0]
            ended.message = told(error)
            if isinstance(error, BusyError):
                ended.retry_seconds = error.retry_seconds
        self._ended[number] = None
        if len(self._ended) > _REMEMBERED:
            del self._ended[next(iter(self._ended))]
        self._put(pb.EnhanceStreamsResponse(sessions=[pb.SessionResponse(session_id=number, ended=ended)]))

    async def send(self, number: int, response: pb.EnhanceStreamResponse) -> None:
        """Add an answer of a session to the next message."""
        await self._room.wait()
        self.send_now(number, response)

    @property
    def has_room(self) -> bool:
        """Whether an answer may be added."""
        return self._room.is_set()

    def send_now(self, number: int, response: pb.EnhanceStreamResponse) -> None:
        """Add an answer while there is room."""
        message = pb.EnhanceStreamsResponse()
        message.sessions.add(session_id=number).response.CopyFrom(response)
        self._put(message)

    def _put(self, message: pb.EnhanceStreamsResponse) -> None:
        if self._ending:  # the RPC was cut short: its status tells
            return
        data = message.SerializeToString()
        self._waiting_bytes += len(data)
        if self._waiting_bytes > MAX_ANSWERS_BYTES:
            self._room.clear()
        self._outbox.append(data)
        self._there.set()

    async def _write_answers(self) -> None:
        """Send what is there: what a round of the engine brings lies there by the time this task runs."""
        while self._outbox or not self._ending:
            await self._there.wait()
            while self._outbox:
                responses, size = [], 0
                while self._outbox and size < MAX_ANSWERS_BYTES:
                    responses.append(self._outbox.popleft())
                    size += len(responses[-1])
                self._writing = time.monotonic()
                try:
                    await self._context.write(b"".join(responses))  # protobuf: one message with them all
                except Exception as error:  # gRPC's errors have no common base class
                    self.fail(ClientGoneError("the caller hung up"))
                    raise ClientGoneError("the caller hung up") from error
                self._writing = None
                self._waiting_bytes -= size
                self._room.set()
            self._there.clear()
            if self._ending:
                return


def _is_known(writer: asyncio.Task[None]) -> None:
    """Its error has ended the RPC, which may itself be cut short by gRPC before it looks at the writer."""
    if not writer.cancelled():
        writer.exception()


def _parsed(data: bytes) -> pb.EnhanceStreamsRequest:
    if len(data) > MAX_REQUESTS_BYTES:
        raise ParameterError(f"sessions: {len(data)} bytes; accepted are {MAX_REQUESTS_BYTES} in a message")
    return messages.parse(pb.EnhanceStreamsRequest, data)


class _SessionWire(Wire):
    """One session's part of the RPC."""

    task: "asyncio.Task[None]"

    def __init__(self, multiplex: Multiplex, number: int) -> None:
        self._multiplex = multiplex
        self._number = number
        self._requests: deque[bytes | None] = deque()  # that wait; parsed, each would keep its whole message
        self._waiting_bytes = 0
        self._is_ahead = False
        self._came: asyncio.Future[pb.EnhanceStreamRequest | None] | None = None

    def feed(self, request: pb.EnhanceStreamRequest | None, *, shared_bytes: int = 0) -> None:
        """Take the next request; None at the end. What is too far ahead is dropped, and ends the session.

        shared_bytes: of the message that the request is a part of, and keeps in memory.
        """
        self._is_ahead = self._is_ahead or self._waiting_bytes > AHEAD_BYTES
        if self._is_ahead:
            return
        if self._came is not None and not self._came.done():
            try:
                if request is not None and self.listener is not None and self.listener(request):
                    return
            except Exception as error:  # the session's, not that of the RPC, whose task this is
                self._came.set_exception(error)
                return
            if request is not None and shared_bytes > SHARED_BYTES:
                request = pb.EnhanceStreamRequest.FromString(request.SerializeToString())
            self._came.set_result(request)
            return
        data = None if request is None else request.SerializeToString()
        self._requests.append(data)
        self._waiting_bytes += _counted_bytes(data)

    async def read(self) -> pb.EnhanceStreamRequest | None:
        """The next request; None at the end."""
        if self._is_ahead:
            raise AheadError(f"more than {AHEAD_BYTES} bytes were sent ahead of the answers")
        if not self._requests:
            self._came = asyncio.get_running_loop().create_future()
            return await self._came
        data = self._requests.popleft()
        self._waiting_bytes -= _counted_bytes(data)
        return None if data is None else pb.EnhanceStreamRequest.FromString(data)

    async def write(self, response: pb.EnhanceStreamResponse) -> None:
        """Send a response."""
        await self._multiplex.send(self._number, response)

    @property
    def has_room(self) -> bool:
        """Whether a response can be sent without waiting."""
        return self._multiplex.has_room

    def write_now(self, response: pb.EnhanceStreamResponse) -> None:
        """Send a response while there is room."""
        self._multiplex.send_now(self._number, response)

    def release(self, writer: asyncio.Task[None]) -> None:
        """Let go of an answer that waits for room."""
        writer.cancel()


def _counted_bytes(data: bytes | None) -> int:
    return 0 if data is None else max(len(data), REQUEST_BYTES)
