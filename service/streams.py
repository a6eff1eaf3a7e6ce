"""Live streams, whatever carries them: one caller's messages go into a session, its answers come out."""

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

from percepnet.errors import ParameterError
from percepnet.model import Manifest
from service import errors, messages
from service.access import Access
from service.callers import Caller
from service.engine import DEADLINE_SECONDS, Engine, Session
from service.errors import BusyError, ClientGoneError, IdleError, LimitError, SlowReaderError, StoppingError
from service.handover import Seals
from service.logs import logger
from service.messages import pb
from service.metrics import Metrics
from service.settings import Settings

MAX_NOT_BEGUN = 32
"""Callers that may be waited for to begin: they take no place, but memory, each as much as a message may have
if it sends one and does not end it. Of more, those give way that were silent for longest."""

PROMPT_SECONDS = 1.0
"""In which a caller begins that comes in a crowd of them, and is not sent away before."""

MAX_CROWD = 256
"""Callers waited for, however prompt they are: what the network brings of their messages in that second is
held, too."""

MAX_UNREAD = 32
"""Streams over one connection that have ended while their caller does not read: each keeps half a megabyte in
gRPC, which cannot but wait."""

MAX_UNANSWERED = 1024
"""Messages of a stream that may be unanswered, however short they are: 480 of one sample each may have to
wait for the rest of their frame."""

_BURST = 16
"""Unanswered messages from which on all others have a turn before the next one is taken: a wire may bring
thousands at once."""

_GIVES_WAY = (
    f"more than {MAX_NOT_BEGUN} callers are waited for to begin, and this one was silent for longest; "
    "open it again, and begin at once"
)
_STOPPING = "the server is stopping; open the stream elsewhere"


class Wire(Protocol):
    """What carries one stream: gRPC or WebSocket."""

    listener: Callable[[pb.EnhanceStreamRequest], bool] | None = None
    """While `read` waits, a message may be brought here first; tells whether it was taken."""

    async def read(self) -> pb.EnhanceStreamRequest | None:
        """The next message; None at the end. Raises ParameterError for what is none."""

    async def write(self, response: pb.EnhanceStreamResponse) -> None:
        """Send a message, and wait while too many are under way. Raises ClientGoneError."""

    @property
    def has_room(self) -> bool:
        """Whether a message can be sent without waiting, by `write_now`."""
        return False

    def write_now(self, response: pb.EnhanceStreamResponse) -> None:
        """Send a message while there is room."""
        raise AssertionError("there is never room")

    def release(self, writer: asyncio.Task[None]) -> None:
        """The stream is over: a writer that waits to send may be cancelled."""


class Member(ABC):
    """What must not outlive its caller or the process; made by the task that serves it."""

    def __init__(self) -> None:
        self._reader = asyncio.current_task()
        self.error: Exception | None = None
        """What it was told to end with."""
        self._heard = time.monotonic()  # when something last came

    @property
    @abstractmethod
    def begun(self) -> bool:
        """Whether there is something to bring to an end."""

    @property
    def waiting_since(self) -> float | None:
        """Since when it is waited for to begin; None if it has begun or has to end."""
        return None if self.begun or self.error is not None else self._heard

    def fail(self, error: Exception) -> None:
        """End with an error."""
        if self.error is None and self._reader is not None:
            self.error = error
            self._reader.cancel()

    def check(self, oldest: float, limit: str) -> None:
        """Fail if nothing moved since a time, which is a limit ago."""
        if self._heard < oldest:
            self.fail(IdleError(f"nothing was sent for {limit}"))


class Streams:
    """All live streams of one process; its methods are called on the event loop.

    settings: limits of the deployment. access: limits of each caller. manifest: of the model that serves.
    Raises FilesError if the keys for hand-over cannot be used.
    """

    def __init__(
        self, settings: Settings, access: Access, engine: Engine, manifest: Manifest, metrics: Metrics
    ) -> None:
        self.settings = settings
        self.access = access
        self.engine = engine
        self.manifest = manifest
        self.metrics = metrics
        self.seals = Seals(settings)
        self.stopping: Callable[[], bool] = lambda: False
        self._opened: Callable[[], None] = lambda: None
        self._members: set[Member] = set()
        self._unread = Counter[str]()  # of each connection

    def start(self, stopping: Callable[[], bool], opened: Callable[[], None]) -> None:
        """Watch over the streams. stopping: whether new ones are refused. opened: told of each that comes."""
        self.stopping = stopping
        self._opened = opened
        self._sweeper = asyncio.create_task(self._sweep())

    async def stop(self) -> None:
        """Refuse those that have not begun, let the others end within the grace, cut off what remains."""
        for member in self._members:
            if not member.begun:
                member.fail(StoppingError(_STOPPING))
        deadline = time.monotonic() + self.settings.shutdown_grace_seconds
        while self._members and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        for member in self._members:
            member.fail(StoppingError("the server stopped before the stream ended; open it elsewhere"))
        self._sweeper.cancel()

    async def converse(self, wire: Wire, caller: Caller, *, shares_messages: bool = False) -> None:
        """Serve one stream to its end; raises what ended it early. shares_messages: with other streams."""
        self._opened()
        await Conversation(self, wire, caller, shares_messages).run()

    @contextmanager
    def watched(self, member: Member) -> Iterator[None]:
        """End it when it is silent for too long, or when the process stops; raises what it was told then."""
        self._members.add(member)
        self._disperse()
        try:
            yield
        except asyncio.CancelledError:
            if member.error is not None:
                raise member.error from None
            raise
        finally:
            self._members.discard(member)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Wait for a caller of whom nothing is known yet, as for a stream; raises what ended that."""
        with self.watched(_Unknown()):
            yield

    def refused(self, caller: Caller, error: Exception) -> None:
        """Write the books of a stream that never began."""
        ending = errors.logged(error)
        self.metrics.streams.labels(ending["outcome"]).inc()
        logger.info("stream refused", extra={"fields": caller.fields | ending})

    @contextmanager
    def place(self, caller: Caller) -> Iterator[None]:
        """Hold one of the streams that a caller may have; raises LimitError, StoppingError."""
        if self.stopping():
            raise StoppingError(_STOPPING)
        self.check_read(caller)
        with self.access.connection_streams.hold(caller.peer), self.access.streams.hold(caller.key):
            yield

    def check_read(self, caller: Caller) -> None:
        """Raise LimitError if too much that has ended over the caller's connection is not read."""
        if self._unread[caller.peer] >= MAX_UNREAD:
            raise LimitError(
                f"{MAX_UNREAD} streams over this connection have ended and their answers are not read; "
                "read or cancel them first"
            )

    async def leave(self, caller: Caller, writer: asyncio.Task[None]) -> None:
        """Wait for the writer of a stream that has ended, whose caller may take any time to read."""
        _, unread = await asyncio.wait([writer], timeout=1)
        if unread:
            self._unread[caller.peer] += 1
            try:
                await asyncio.wait(unread)
            finally:
                self._unread[caller.peer] -= 1
                self._unread = +self._unread  # without connections of which nothing is left

    def _disperse(self) -> None:
        """Send away who was silent for longest, if too many are waited for."""
        waiting = {member: since for member in self._members if (since := member.waiting_since) is not None}
        crowd = sorted(waiting, key=waiting.__getitem__, reverse=True)
        for place, member in enumerate(crowd[MAX_NOT_BEGUN:], MAX_NOT_BEGUN):
            if place >= MAX_CROWD or waiting[member] <= time.monotonic() - PROMPT_SECONDS:
                member.fail(BusyError(_GIVES_WAY))

    async def _sweep(self) -> None:
        """End the streams that went silent."""
        seconds = self.settings.stream_idle_seconds
        while True:
            await asyncio.sleep(min(1, seconds / 4))
            self._disperse()
            for member in self._members:
                member.check(time.monotonic() - seconds, f"{seconds:g} s")


class _Unknown(Member):
    """A caller of whom nothing is known yet."""

    begun = False


class Conversation(Member):
    """One live stream: reads messages into a session, writes its answers."""

    def __init__(self, streams: Streams, wire: Wire, caller: Caller, shares_messages: bool) -> None:
        super().__init__()
        self._streams = streams
        self._wire = wire
        self._caller = caller
        self._shares_messages = shares_messages
        self._engine = streams.engine
        self._metrics = streams.metrics
        self._writer: asyncio.Task[None] | None = None
        self._opened = self._heard
        self._writing: float | None = None  # since when an answer waits to be taken
        self._session: Session | None = None
        self._answered = asyncio.Event()  # there are answers to write, or nothing more will come
        self._room = asyncio.Event()  # the reader may go on
        self._ending = False
        self._begins = True  # nothing came after the config
        self._longest_queue = 0.0  # samples that may be unanswered
        self._misses = 0
        self._challenge = b""  # that a state must be made for
        self._outcome = "ok"

    @property
    def begun(self) -> bool:
        """Whether its first message came."""
        return self._session is not None

    def check(self, oldest: float, limit: str) -> None:
        """Fail if nothing was sent, or an answer waits to be taken, since a time."""
        if self._writing is None:
            super().check(oldest, limit)
        elif self._writing < oldest:
            self.fail(SlowReaderError(f"the answers were not read for {limit}"))

    async def run(self) -> None:
        """Serve the stream to its end; raises what ended it early."""
        error: BaseException | None = None
        try:
            with self._streams.place(self._caller), self._streams.watched(self):
                await self._converse()
        except (Exception, asyncio.CancelledError) as raised:
            error = self.error or raised
        self._close(error)
        self._reader = None  # its end is settled, and nothing may cut it short
        if self._writer is not None:
            self._wire.release(self._writer)
            await self._streams.leave(self._caller, self._writer)
        if error is not None:
            raise error

    async def _converse(self) -> None:
        request = await self._read()
        if request is None:
            return
        options = replace(messages.opening(request), shares_messages=self._shares_messages)
        self._session = session = self._engine.open(options, self._answers_came)
        self._longest_queue = self._streams.settings.stream_queue_seconds * options.sample_rate
        self._log("stream opened", sample_rate_hz=session.options.sample_rate)
        self._challenge = self._streams.seals.challenge()
        idle_seconds = self._streams.settings.stream_idle_seconds
        await self._write(messages.started(session, self._streams.manifest, idle_seconds, self._challenge))
        self._writer = asyncio.create_task(self._write_answers(session))
        self._writer.add_done_callback(self._writer_ended)
        self._wire.listener = self._take_audio
        hand_over = await self._read_messages(session)
        while session.n_frames:
            await asyncio.sleep(DEADLINE_SECONDS)
        self._ending = True
        self._answered.set()
        await asyncio.shield(self._writer)
        if hand_over is not None:
            state = self._streams.seals.seal(self._engine.save(session), hand_over.challenge)
            await self._write(messages.handed_over(session, state))
            self._outcome = "handed_over"

    def _close(self, error: BaseException | None) -> None:
        """Give the place back, and write the books."""
        ending = {"outcome": self._outcome} if error is None else errors.logged(error)
        self._metrics.streams.labels(ending["outcome"]).inc()
        session = self._session
        if session is None:
            left = error is None or ending["outcome"] == "client_gone"
            self._log("stream left before its config" if left else "stream refused", **ending)
            return
        self._engine.close(session)
        session.answers.clear()
        self._ending = True
        self._answered.set()
        audio_seconds = session.n_samples / session.options.sample_rate
        self._metrics.stream_audio.inc(audio_seconds)
        self._log(
            "stream closed",
            **ending,
            sample_rate_hz=session.options.sample_rate,
            audio_seconds=round(audio_seconds, 3),
            open_seconds=round(time.monotonic() - self._opened, 3),
            deadline_misses=self._misses,
            dry_frames=session.n_dry,
        )

    async def _read_messages(self, session: Session) -> pb.HandOver | None:
        """Take messages up to the end, or to what asks for the stream's state."""
        ended = False
        while not ended:
            request = await self._read()
            now = time.monotonic()
            kind = "end" if request is None else request.WhichOneof("payload")
            if kind == "audio":
                assert request is not None
                session.push(messages.audio(request, session.options), now)
                await self._keep_up(session)
            elif kind == "parameters":
                assert request is not None
                session.update(messages.controls(request.parameters, "parameters"), now)
                await self._keep_up(session)
            elif kind in ("flush", "end"):
                passages = session.n_passages
                session.flush(now)
                while session.n_passages == passages:
                    await self._wait_for_room()
                ended = kind == "end"
            elif kind == "hand_over":
                assert request is not None
                return request.hand_over
            elif kind == "resume" and self._begins:
                assert request is not None
                self._engine.restore(session, self._streams.seals.open(request.resume.state, self._challenge))
                await self._write(messages.resumed(session))
                self._metrics.streams_resumed.inc()
            else:
                raise ParameterError(
                    f"payload: {messages.payload(request)} came; after the config accepted are audio, "
                    "parameters, flush, hand_over and end, and first of all resume"
                )
            self._begins = False
        return None

    def _take_audio(self, request: pb.EnhanceStreamRequest) -> bool:
        """Take audio without a turn of the loop, unless something is wrong with it or much is unanswered."""
        session = self._session
        if session is None or session.n_unanswered + 1 >= _BURST or request.WhichOneof("payload") != "audio":
            return False
        try:
            samples = messages.audio(request, session.options)
        except ParameterError:
            return False
        if session.queued_samples + len(samples) > self._longest_queue:
            return False
        self._heard = time.monotonic()
        self._begins = False
        session.push(samples, self._heard)
        return True

    async def _keep_up(self, session: Session) -> None:
        """Wait while too much of what came is not answered."""
        if session.n_unanswered >= _BURST:
            await asyncio.sleep(0)
        while session.queued_samples > self._longest_queue or session.n_unanswered > MAX_UNANSWERED:
            await self._wait_for_room()

    async def _wait_for_room(self) -> None:
        self._room.clear()
        await self._room.wait()
        self._heard = time.monotonic()

    async def _read(self) -> pb.EnhanceStreamRequest | None:
        """The next message; None at the end."""
        request = await self._wire.read()
        self._heard = time.monotonic()
        return request

    async def _write(self, response: pb.EnhanceStreamResponse) -> None:
        """Send a response."""
        self._writing = time.monotonic()
        await self._wire.write(response)
        self._writing = None

    def _answers_came(self) -> None:
        """Write those that the wire has room for; the writer has the others."""
        session = self._session
        while session is not None and session.answers and self._writing is None and self._wire.has_room:
            response, since = self._next_answer(session)
            took = time.monotonic() - since
            self._wire.write_now(response)
            self._written(took)
        if session is None or session.answers or session.error is not None:
            self._answered.set()

    async def _write_answers(self, session: Session) -> None:
        while True:
            self._answered.clear()
            self._room.set()  # a flush may be done
            while session.answers:
                response, since = self._next_answer(session)
                took = time.monotonic() - since
                await self._write(response)
                self._written(took)
            if session.error is not None:
                raise session.error
            if self._ending:
                return
            await self._answered.wait()

    def _next_answer(self, session: Session) -> tuple[pb.EnhanceStreamResponse, float]:
        """The oldest answer as a message, and when the last sample that it needed came."""
        answer = session.take_answer()
        return messages.response(answer, session, self._streams.stopping()), answer.since

    def _written(self, took: float) -> None:
        """Count an answer and the seconds that it took."""
        self._metrics.stream_latency.observe(took)
        if took > DEADLINE_SECONDS:
            self._misses += 1
            self._metrics.deadline_misses.inc()
        self._room.set()

    def _writer_ended(self, writer: asyncio.Task[None]) -> None:
        if not writer.cancelled() and (error := writer.exception()) is not None:
            self.fail(error if isinstance(error, Exception) else ClientGoneError(str(error)))

    def _log(self, message: str, **values: Any) -> None:
        logger.log(logging.INFO, message, extra={"fields": self._caller.fields | values})
