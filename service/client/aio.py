"""The client for asyncio: the same as `service.client.sync`, with `await`."""

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np

from percepnet.synthesis import Controls
from service import pcm
from service.client.base import BaseClient, BaseStream
from service.client.conversation import (
    SERVICE,
    Answer,
    Conversation,
    EndedError,
    Item,
    Mark,
    Pace,
    Request,
    Response,
    clip_request,
)
from service.client.multiplex import AsyncTrunk
from service.client.pods import (
    ANSWER_SECONDS,
    CLOSED_SECONDS,
    LOOK_UP_SECONDS,
    MOVE_SECONDS,
    Attempts,
    CallError,
)
from service.pb.percepnet_service.v1 import enhancement_pb2 as pb


class _Connection:
    """One RPC at one server, which holds a place there until it is dropped."""

    def __init__(self, client: "AsyncClient", address: str, timeout_seconds: float | None) -> None:
        self.address = address
        self._write_failed = False
        self._pods = client.pods
        self._dropped = False
        self.call: Any
        if client.multiplex:
            self.call = client.session(address, timeout_seconds)
            return
        method = client.pods.channel(address).stream_stream(
            f"{SERVICE}/EnhanceStream", Request.SerializeToString, Response.FromString
        )
        self.call = method(timeout=timeout_seconds, metadata=client.metadata)

    async def write(self, request: Request) -> None:
        """Send a message; that the call is over shows where answers are read."""
        try:
            with _only_own_cancellation():
                await self.call.write(request)
        except (grpc.RpcError, asyncio.InvalidStateError):
            self._write_failed = True

    async def write_all(self, requests: list[Request]) -> None:
        """Send messages, one after another."""
        for request in requests:
            await self.write(request)

    async def answer(self) -> Response:
        """The next message; raises grpc.RpcError, EndedError, or InvalidStateError after `drop`."""
        try:
            with _only_own_cancellation():
                response = await self.call.read()
        except grpc.aio.AioRpcError as error:
            if not self._write_failed or error.code() is not grpc.StatusCode.INTERNAL:
                raise
            # What gRPC makes of a message that it could not write.
            raise CallError(grpc.StatusCode.UNAVAILABLE, "the connection broke") from error
        if response is grpc.aio.EOF:
            raise EndedError("the server ended the stream before its end was asked for")
        return response

    def drop(self) -> None:
        """Hang up; may be called again."""
        self.call.cancel()
        if not self._dropped:
            self._dropped = True
            self._pods.release(self.address)


class AsyncLiveStream(BaseStream[_Connection]):
    """One live speaker; leave its `async with` block, or call `end`, to give its place back.

    `push`, `update`, `flush` and `end` wait for their answer; tasks that call them take turns. With `pipe`,
    or with `send` and `receive` from two tasks, audio flows both ways at once; then `send` also takes
    parameters and marks, and methods that would take answers away from `pipe` or `receive`, or that are still
    to be received, raise TurnError. A connection that is lost is taken up again where it broke, at whatever
    server has room. All methods raise CallError when that fails, or when the server refuses: `code()` and
    `details()` say why.
    """

    def __init__(self, client: "AsyncClient", talk: Conversation, timeout_seconds: float | None) -> None:
        super().__init__(client, talk, timeout_seconds)
        self._client = client
        self._writing = asyncio.Lock()  # whoever has it may write, or put another connection in place
        self._room = asyncio.Event()
        self._turn = asyncio.Lock()  # to speak: until the answer is there, or with one message
        self._sending = asyncio.Lock()  # an item whole
        self._receiving: asyncio.Task[Answer | None] | None = None

    async def open(self) -> Self:
        """Find a server; `AsyncClient.stream` does it."""
        await self._connect(self._attempts)
        return self

    async def push(self, samples: np.ndarray) -> np.ndarray:
        """Send samples, float32 (n,) with full scale ±1, and wait for the answer: (n,) float32.

        Raises ParameterError if n is no multiple of a stated `message_samples`: the answer would wait for
        samples that nobody sends meanwhile. If it is cancelled, what comes back for its samples is dropped.
        """
        return np.concatenate([answer.samples for answer in await self._ask(samples)])

    async def update(self, controls: Controls) -> int:
        """Change the parameters; returns the number of the first input sample that they apply to."""
        return (await self._ask(controls))[0].position

    async def flush(self) -> np.ndarray:
        """Return the tail of all that was sent; the next samples begin a new passage."""
        return (await self._ask(Mark.FLUSH))[0].samples

    async def end(self) -> np.ndarray:
        """Return the tail and end the stream."""
        return (await self._ask(Mark.END))[0].samples

    async def pipe(
        self, items: Iterable[Item] | AsyncIterable[Item], *, realtime: bool = False
    ) -> AsyncIterator[np.ndarray]:
        """Send all items and then the end; yields what comes back meanwhile, one array for each (see `send`).

        items: arrays of samples, and parameters in between; read in a task of its own. realtime: send every
        array when its last sample would have been spoken.
        """

        async def speak() -> None:
            pace = Pace(self._talk.sample_rate)
            try:
                async for item in _each(items):
                    if realtime:
                        await asyncio.sleep(pace.seconds_until_spoken(item))
                    await self.send(item)
                await self.send(Mark.END)
            except Exception as error:
                self._fail(error)

        with self._listen():
            speaker = asyncio.create_task(speak())
            try:
                async with self:
                    while (answer := await self._next_answer()) is not None:
                        yield answer.samples
            finally:
                speaker.cancel()

    async def send(self, item: Item) -> None:
        """Send one item; waits while a whole window of audio is unanswered, but with parameters.

        Samples of more than a second go in several messages, each with an answer of its own.
        """
        pieces = self._talk.pieces(item)
        if isinstance(item, Controls):  # never behind audio: who waits here may be who receives
            async with self._turn:
                await self._write(item)
            return
        async with self._sending:
            for piece in pieces:
                while not (self._talk.has_room or self._error):
                    self._room.clear()
                    with suppress(TimeoutError):
                        async with asyncio.timeout(CLOSED_SECONDS):
                            await self._room.wait()
                    self._pods.check_open()
                async with self._turn:
                    await self._write(piece)

    async def receive(self) -> Answer | None:
        """Wait for the answer to the oldest item that has none; None when the end was answered.

        If it is cancelled, as `asyncio.wait_for` does, the next call waits for the same answer.
        """
        with self._listen():
            return await self._next_answer()

    def close(self) -> None:
        """Hang up, whatever is under way."""
        self._fail(EndedError("the stream was closed"))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def _next_answer(self) -> Answer | None:
        await self._drop_unwanted()
        return await self._oldest()

    async def _drop_unwanted(self) -> None:
        while self._n_unwanted:
            await self._oldest()
            self._n_unwanted -= 1

    async def _oldest(self) -> Answer | None:
        """`_next_answer`, for unwanted answers too."""
        if self._receiving is None:
            self._receiving = asyncio.create_task(self._receive())
        await asyncio.wait([self._receiving])
        received, self._receiving = self._receiving, None
        if received.cancelled() and self._error:
            raise self._error
        answer = received.result()
        return answer and self._tell(answer)

    async def _receive(self) -> Answer | None:
        while self._answers or not self._talk.ended:
            if self._answers:
                return self._answers.popleft()
            if self._spent:
                await self._resume(None)
                continue
            try:
                response = await self._connection.answer()
            except grpc.RpcError as error:
                await self._resume(error)
                continue
            except asyncio.InvalidStateError:
                await self._resume(None)
                continue
            answer = self._talk.take(response)
            self._room.set()
            if answer is not None:
                if self._talk.ended:
                    await self._hang_up(self._connection)
                elif answer.message.audio.draining:
                    await self._move()
                return answer
        return None

    async def _ask(self, item: Item) -> list[Answer]:
        """Send an item, each message of it when the one before is answered."""
        async with self._turn:
            with self._listen():
                self._check_received(sending=self._sending.locked())
                if not self._talk.has_room:
                    await self._drop_unwanted()
                return [await self._answer_to(piece) for piece in self._talk.pieces(item)]

    async def _answer_to(self, item: Item) -> Answer:
        n_asked = self._talk.n_asked
        try:
            await self._write(item)
            answer = await self._next_answer()
        except asyncio.CancelledError:
            self._n_unwanted += self._talk.n_asked - n_asked
            raise
        if answer is None:
            raise EndedError("the stream was ended")
        return answer

    async def _write(self, item: Item) -> None:
        async with self._writing:
            if self._error:
                raise self._error
            await self._connection.write(self._talk.ask(item))

    async def _connect(self, attempts: Attempts) -> None:
        """Find a server."""
        while True:
            await self._client.refresh(attempts)
            address = attempts.choose()
            if address is None:
                await asyncio.sleep(attempts.pause_seconds())
                if self._error:
                    raise self._error
                continue
            try:
                self._connection = await self._open(address)
                return
            except grpc.RpcError as error:
                attempts.failed(address, error)
            except asyncio.InvalidStateError:
                continue  # the client was closed, as `choose` will tell

    async def _open(self, address: str) -> _Connection:
        """Begin, or go on, at a server."""
        opening = self._talk.opening()
        connection, response = await self._call(address, opening.messages)
        try:
            self._talk.opened(opening, response)
        except BaseException:
            connection.drop()
            raise
        return connection

    async def _call(self, address: str, messages: list[Request]) -> tuple[_Connection, Response]:
        """Send messages to a server; returns what it answers to the first."""
        connection = _Connection(self._client, address, self._timeout_seconds)
        # Reading tells that the client was closed; a write that waits for the server never hears of it.
        writing = asyncio.create_task(connection.write_all(messages))
        try:
            response = await connection.answer()
            await writing
        except BaseException:
            writing.cancel()
            connection.drop()
            raise
        self._client.pods.succeeded(address)
        return connection, response

    async def _resume(self, lost: grpc.RpcError | None) -> None:
        """Go on after a connection was lost, or is of no use (None); raises the error if that is none."""
        self._connection.drop()
        async with self._writing:
            try:
                await self._connect(self._lost(self._connection.address, lost))
                self.reconnections += 1
                self._spent = False
            except Exception as error:
                self._error = error
                self._room.set()
                raise

    async def _move(self) -> None:
        """Leave a server that is about to stop, as soon as another one takes the stream."""
        if time.monotonic() < self._may_move:
            return
        self._may_move = time.monotonic() + MOVE_SECONDS
        pods, old = self._client.pods, self._connection
        async with self._writing:
            if self._talk.ending:  # soon, and with all of its memory
                return
            pods.avoid(old.address, LOOK_UP_SECONDS)
            await self._client.refresh(Attempts(pods, 0))
            address = pods.choose()
            if address is None:
                return
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    if not self._talk.movable:
                        self._connection = await self._open(address)
                        old.drop()
                        self.reconnections += 1
                        return
                    found = await self._call(address, self._talk.opening().messages[:1])
            except (grpc.RpcError, TimeoutError) as error:
                pods.avoid(address, LOOK_UP_SECONDS if isinstance(error, TimeoutError) else None)
                return
            await self._hand_over(*found)

    async def _hand_over(self, new: _Connection, response: Response) -> None:
        """Let another server, which answered the config, go on with the stream's state."""
        old, self._spent = self._connection, True
        try:
            await old.write(self._talk.hand_over(response))
            while not (given := await old.answer()).HasField("handed_over"):
                if (answer := self._talk.take(given)) is not None:
                    self._answers.append(answer)
            await new.write(self._talk.moved(response, given))
            await new.answer()
        except (grpc.RpcError, EndedError, asyncio.InvalidStateError):
            new.drop()
            return
        except BaseException:
            new.drop()
            raise
        self._connection, self._spent = new, False
        await self._hang_up(old)
        self.handovers += 1
        self._room.set()

    @staticmethod
    async def _hang_up(connection: _Connection) -> None:
        """The last answer came: wait for the status, whatever it is."""
        with suppress(grpc.RpcError, asyncio.InvalidStateError):
            await connection.call.done_writing()
            await connection.call.code()
        connection.drop()

    def _fail(self, error: Exception) -> None:
        """End the stream, from any task."""
        self._error = self._error or error
        if self._receiving:
            self._receiving.cancel()  # then asyncio does not complain of its error either
        self._connection.drop()
        self._room.set()


class _Opening:
    """A stream that is being opened: `await` it, or enter it with `async with`."""

    def __init__(self, stream: AsyncLiveStream) -> None:
        self._stream = stream

    def __await__(self) -> Generator[Any, None, AsyncLiveStream]:
        return self._stream.open().__await__()

    async def __aenter__(self) -> AsyncLiveStream:
        return await self._stream.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()


class AsyncClient(BaseClient[grpc.aio.Channel, _Opening]):
    """`Client` for the tasks of one event loop: a stream is opened with `async with` or `await`."""

    _maker = grpc.aio
    _trunk = AsyncTrunk

    async def enhance(
        self, samples: np.ndarray, sample_rate: int, *, controls: Controls = Controls()
    ) -> np.ndarray:
        """Enhance a clip, float32 (n,) with full scale ±1; as long, and not delayed.

        It may have a minute, at 48 kHz 21 s; raises ParameterError for a longer one.
        """
        request = clip_request(samples, sample_rate, controls)
        response = await self._unary("EnhanceClip", request, pb.EnhanceClipResponse)
        return pcm.decode(response.audio, pcm.F32LE)

    async def status(self) -> pb.GetStatusResponse:
        """The model, the load and the capacity of one of the servers."""
        return await self._unary("GetStatus", pb.GetStatusRequest(), pb.GetStatusResponse)

    async def refresh(self, attempts: Attempts) -> None:
        """Look the name up, if it is time to."""
        if self.pods.stale:
            try:
                await asyncio.to_thread(self.pods.look_up)
            except OSError as error:
                attempts.not_found(error)
            for channel in self.pods.forget():
                await channel.close()

    async def close(self) -> None:
        """Hang up, whatever is under way: the streams end with EndedError."""
        for channel in self.pods.close():
            await channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _begin(self, talk: Conversation, timeout_seconds: float | None) -> _Opening:
        return _Opening(AsyncLiveStream(self, talk, timeout_seconds))

    async def _unary(self, method: str, request: Any, response: Any) -> Any:
        attempts = Attempts(self.pods, self.patience_seconds)
        while True:
            await self.refresh(attempts)
            address = attempts.choose()
            if address is None:
                await asyncio.sleep(attempts.pause_seconds())
                continue
            call = self.pods.channel(address).unary_unary(
                f"{SERVICE}/{method}", type(request).SerializeToString, response.FromString
            )
            try:
                with _only_own_cancellation():
                    return await call(request, timeout=self._timeout_seconds, metadata=self.metadata)
            except grpc.RpcError as error:
                attempts.failed(address, error)
            except asyncio.InvalidStateError:
                continue  # the client was closed, as `choose` will tell
            finally:
                self.pods.release(address)


@contextmanager
def _only_own_cancellation() -> Iterator[None]:
    """gRPC raises CancelledError for a call that was hung up; only the task's own may pass as one."""
    try:
        yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise asyncio.InvalidStateError("the call was hung up") from None


async def _each(items: Iterable[Item] | AsyncIterable[Item]) -> AsyncIterator[Item]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item
