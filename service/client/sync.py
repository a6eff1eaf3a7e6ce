"""The client for plain Python: blocking calls, from any number of threads."""

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from queue import SimpleQueue
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
from service.client.multiplex import Session, Trunk
from service.client.pods import (
    ANSWER_SECONDS,
    CLOSED_SECONDS,
    LOOK_UP_SECONDS,
    MOVE_SECONDS,
    Attempts,
)
from service.pb.percepnet_service.v1 import enhancement_pb2 as pb


class _Connection:
    """One RPC at one server, which holds a place there until it is dropped."""

    def __init__(self, client: "Client", address: str, timeout_seconds: float | None) -> None:
        self.address = address
        self.requests: SimpleQueue[Request | None] | Session
        self.call: Any
        self._pods = client.pods
        self._dropped = False
        if client.multiplex:
            self.requests = self.call = client.session(address, timeout_seconds)
            return
        self.requests = SimpleQueue()
        method = client.pods.channel(address).stream_stream(
            f"{SERVICE}/EnhanceStream", Request.SerializeToString, Response.FromString
        )
        requests = iter(self.requests.get, None)
        self.call = method(requests, timeout=timeout_seconds, metadata=client.metadata)

    def drop(self) -> None:
        """Hang up; may be called again."""
        self.call.cancel()
        if not self._dropped:
            self._dropped = True
            self.requests.put(None)
            self._pods.release(self.address)


class LiveStream(BaseStream[_Connection]):
    """One live speaker; leave its `with` block, or call `end`, to give its place back.

    `push`, `update`, `flush` and `end` wait for their answer; threads that call them take turns. With `pipe`,
    or with `send` and `receive` from two threads, audio flows both ways at once; then `send` also takes
    parameters and marks, and methods that would take answers away from `pipe` or `receive`, or that are still
    to be received, raise TurnError. A connection that is lost is taken up again where it broke, at whatever
    server has room. All methods raise CallError when that fails, or when the server refuses: `code()` and
    `details()` say why.
    """

    def __init__(self, client: "Client", talk: Conversation, timeout_seconds: float | None) -> None:
        super().__init__(client, talk, timeout_seconds)
        self._client = client
        self._changed = threading.Condition()
        # Who stands first has the turn.
        self._turns: deque[object] = deque()  # to speak: until the answer is there, or with one message
        self._sends: deque[object] = deque()  # to send an item whole
        with self._changed:
            self._connect(self._attempts)

    def push(self, samples: np.ndarray) -> np.ndarray:
        """Send samples, float32 (n,) with full scale ±1, and wait for the answer: (n,) float32.

        Raises ParameterError if n is no multiple of a stated `message_samples`: the answer would wait for
        samples that nobody sends meanwhile.
        """
        return np.concatenate([answer.samples for answer in self._ask(samples)])

    def update(self, controls: Controls) -> int:
        """Change the parameters; returns the number of the first input sample that they apply to."""
        return self._ask(controls)[0].position

    def flush(self) -> np.ndarray:
        """Return the tail of all that was sent; the next samples begin a new passage."""
        return self._ask(Mark.FLUSH)[0].samples

    def end(self) -> np.ndarray:
        """Return the tail and end the stream."""
        return self._ask(Mark.END)[0].samples

    def pipe(self, items: Iterable[Item], *, realtime: bool = False) -> Iterator[np.ndarray]:
        """Send all items and then the end; yields what comes back meanwhile, one array for each (see `send`).

        items: arrays of samples, and parameters in between; read in a thread of its own. realtime: send every
        array when its last sample would have been spoken.
        """

        def speak() -> None:
            pace = Pace(self._talk.sample_rate)
            try:
                for item in items:
                    if realtime:
                        time.sleep(pace.seconds_until_spoken(item))
                    self.send(item)
                self.send(Mark.END)
            except Exception as error:
                self._fail(error)

        with self._listen(), self:
            threading.Thread(target=speak, daemon=True).start()
            while (answer := self._next_answer()) is not None:
                yield answer.samples

    def send(self, item: Item) -> None:
        """Send one item; waits while a whole window of audio is unanswered, but with parameters.

        Samples of more than a second go in several messages, each with an answer of its own.
        """
        pieces = self._talk.pieces(item)
        if isinstance(item, Controls):  # never behind audio: who waits here may be who receives
            with self._in_line(self._turns):
                self._put(item)
            return
        with self._in_line(self._sends):
            for piece in pieces:
                with self._changed:
                    while not (self._talk.has_room or self._error):
                        self._changed.wait(CLOSED_SECONDS)
                        self._pods.check_open()
                with self._in_line(self._turns):
                    self._put(piece)

    def receive(self) -> Answer | None:
        """Wait for the answer to the oldest item that has none; None when the end was answered."""
        with self._listen():
            return self._next_answer()

    def close(self) -> None:
        """Hang up, whatever is under way."""
        self._fail(EndedError("the stream was closed"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, item: Item) -> list[Answer]:
        """Send an item, each message of it when the one before is answered."""
        with self._in_line(self._turns), self._listen():
            self._check_received(sending=bool(self._sends))
            return [self._answer_to(piece) for piece in self._talk.pieces(item)]

    def _answer_to(self, item: Item) -> Answer:
        self._put(item)
        answer = self._next_answer()
        if answer is None:
            raise EndedError("the stream was ended")
        return answer

    def _put(self, item: Item) -> None:
        with self._changed:
            if self._error:
                raise self._error
            self._connection.requests.put(self._talk.ask(item))

    @contextmanager
    def _in_line(self, line: deque[object]) -> Iterator[None]:
        """Wait for all who came before; a lock would let who had it have it again at once."""
        place = object()
        with self._changed:
            line.append(place)
        try:
            with self._changed:
                self._changed.wait_for(lambda: line[0] is place)
            yield
        finally:
            with self._changed:
                line.remove(place)
                self._changed.notify_all()

    def _next_answer(self) -> Answer | None:
        while self._answers or not self._talk.ended:
            if self._answers:
                return self._tell(self._answers.popleft())
            if self._spent:
                self._resume(None)
                continue
            try:
                response = next(self._connection.call, None)
            except grpc.RpcError as error:
                self._resume(error)
                continue
            if response is None:
                raise EndedError("the server ended the stream before its end was asked for")
            with self._changed:
                answer = self._talk.take(response)
                self._changed.notify_all()
            if answer is not None:
                if self._talk.ended:
                    self._hang_up(self._connection)
                elif answer.message.audio.draining:
                    self._move()
                return self._tell(answer)
        return None

    def _connect(self, attempts: Attempts) -> None:
        """Find a server; the lock is held, but for pauses."""
        while True:
            self._client.refresh(attempts)
            address = attempts.choose()
            if address is None:
                self._changed.wait(attempts.pause_seconds())
                if self._error:
                    raise self._error
                continue
            try:
                self._connection = self._open(address)
                return
            except grpc.RpcError as error:
                attempts.failed(address, error)

    def _open(self, address: str, limit_seconds: float | None = None) -> _Connection:
        """Begin, or go on, at a server."""
        opening = self._talk.opening()
        connection, response = self._call(address, opening.messages, limit_seconds)
        try:
            self._talk.opened(opening, response)
        except BaseException:
            connection.drop()
            raise
        return connection

    def _call(
        self, address: str, messages: list[Request], limit_seconds: float | None = None
    ) -> tuple[_Connection, Response]:
        """Send messages to a server; returns what it answers to the first, or is CANCELLED at the limit."""
        connection = _Connection(self._client, address, self._timeout_seconds)
        for request in messages:
            connection.requests.put(request)
        limit = threading.Timer(limit_seconds or 0, connection.call.cancel)
        if limit_seconds is not None:
            limit.start()
        try:
            response = next(connection.call, None)
            if response is None:
                raise EndedError("the server ended the stream before it began")
        except BaseException:
            connection.drop()
            raise
        finally:
            limit.cancel()
        self._client.pods.succeeded(address)
        return connection, response

    def _resume(self, lost: grpc.RpcError | None) -> None:
        """Go on after a connection was lost, or is of no use (None); raises the error if that is none."""
        with self._changed:
            self._connection.drop()
            try:
                self._connect(self._lost(self._connection.address, lost))
                self.reconnections += 1
                self._spent = False
            except Exception as error:
                self._error = error
                self._changed.notify_all()
                raise

    def _move(self) -> None:
        """Leave a server that is about to stop, as soon as another one takes the stream."""
        if time.monotonic() < self._may_move:
            return
        self._may_move = time.monotonic() + MOVE_SECONDS
        pods, old = self._client.pods, self._connection
        with self._changed:
            if self._talk.ending:  # soon, and with all of its memory
                return
            pods.avoid(old.address, LOOK_UP_SECONDS)
            self._client.refresh(Attempts(pods, 0))
            address = pods.choose()
            if address is None:
                return
            try:
                if self._talk.movable:
                    config = self._talk.opening().messages[:1]
                    self._hand_over(*self._call(address, config, ANSWER_SECONDS))
                    return
                self._connection = self._open(address, ANSWER_SECONDS)
            except grpc.RpcError as error:
                silent = error.code() is grpc.StatusCode.CANCELLED
                pods.avoid(address, LOOK_UP_SECONDS if silent else None)
                return
            old.drop()
            self.reconnections += 1

    def _hand_over(self, new: _Connection, response: Response) -> None:
        """Let another server, which answered the config, go on with the stream's state."""
        old, self._spent = self._connection, True
        try:
            old.requests.put(self._talk.hand_over(response))
            while not (given := next(old.call)).HasField("handed_over"):
                if (answer := self._talk.take(given)) is not None:
                    self._answers.append(answer)
            new.requests.put(self._talk.moved(response, given))
            next(new.call)
        except (grpc.RpcError, StopIteration):
            new.drop()
            return
        self._connection, self._spent = new, False
        self._hang_up(old)
        self.handovers += 1
        self._changed.notify_all()

    @staticmethod
    def _hang_up(connection: _Connection) -> None:
        """The last answer came: wait for the status, whatever it is."""
        connection.requests.put(None)
        with suppress(grpc.RpcError):
            for _ in connection.call:
                pass
        connection.drop()

    def _fail(self, error: Exception) -> None:
        """End the stream, from any thread."""
        self._error = self._error or error
        with self._changed:
            self._connection.drop()
            self._changed.notify_all()


class Client(BaseClient[grpc.Channel, LiveStream]):
    """Streams and clips at the servers behind one name, for any number of threads.

    The arguments are explained at `BaseClient`.
    """

    _maker = grpc
    _trunk = Trunk

    def enhance(
        self, samples: np.ndarray, sample_rate: int, *, controls: Controls = Controls()
    ) -> np.ndarray:
        """Enhance a clip, float32 (n,) with full scale ±1; as long, and not delayed.

        It may have a minute, at 48 kHz 21 s; raises ParameterError for a longer one.
        """
        response = self._unary(
            "EnhanceClip", clip_request(samples, sample_rate, controls), pb.EnhanceClipResponse
        )
        return pcm.decode(response.audio, pcm.F32LE)

    def status(self) -> pb.GetStatusResponse:
        """The model, the load and the capacity of one of the servers."""
        return self._unary("GetStatus", pb.GetStatusRequest(), pb.GetStatusResponse)

    def refresh(self, attempts: Attempts) -> None:
        """Look the name up, if it is time to."""
        if self.pods.stale:
            try:
                self.pods.look_up()
            except OSError as error:
                attempts.not_found(error)
            for channel in self.pods.forget():
                channel.close()

    def close(self) -> None:
        """Hang up, whatever is under way: the streams end with EndedError."""
        for channel in self.pods.close():
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self, talk: Conversation, timeout_seconds: float | None) -> LiveStream:
        return LiveStream(self, talk, timeout_seconds)

    def _unary(self, method: str, request: Any, response: Any) -> Any:
        attempts = Attempts(self.pods, self.patience_seconds)
        while True:
            self.refresh(attempts)
            address = attempts.choose()
            if address is None:
                time.sleep(attempts.pause_seconds())
                continue
            call = self.pods.channel(address).unary_unary(
                f"{SERVICE}/{method}", type(request).SerializeToString, response.FromString
            )
            try:
                return call(request, timeout=self._timeout_seconds, metadata=self.metadata)
            except grpc.RpcError as error:
                attempts.failed(address, error)
            finally:
                self.pods.release(address)
