"""The gRPC interface: live streams and short clips, health and reflection."""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from percepnet.enhancer import Enhancer
from percepnet.errors import ParameterError
from percepnet.stream import enhance
from percepnet.synthesis import Controls
from service import pcm
from service.engine import DEADLINE_SECONDS, Answer, Engine, Options, Session
from service.errors import (
    BusyError,
    ClientGoneError,
    IdleError,
    SlowReaderError,
    StoppingError,
    answer_for,
)
from service.health import Health
from service.jobs import Checkpoint, FileJobs
from service.logs import logger
from service.metrics import Metrics
from service.pb.percepnet_service.v1 import enhancement_pb2 as pb
from service.settings import Settings
from service.ticker import Ticker

SERVICE = pb.DESCRIPTOR.services_by_name["EnhancementService"].full_name

MIN_RATE_HZ, MAX_RATE_HZ = 8_000, 48_000
MAX_MESSAGE_SECONDS = 1
MAX_CLIP_SECONDS = 60
MAX_CLIPS = 4
"""Clips held at once: they are short, and worked on in turn."""

RETRY_MILLISECONDS = 1_000
"""When to come back if there is no room: calls end all the time."""

_TRANSPORT_LIMIT_BYTES = 12 * 1024 * 1024  # a clip of MAX_CLIP_SECONDS as floats at 48 kHz
_ENCODINGS: dict[pb.Encoding, Any] = {pb.ENCODING_S16LE: pcm.S16LE, pb.ENCODING_F32LE: pcm.F32LE}

_OPTIONS = (
    ("grpc.so_reuseport", 0),  # a second server on the port must fail, not take half of the calls
    ("grpc.max_receive_message_length", _TRANSPORT_LIMIT_BYTES),
    ("grpc.max_send_message_length", _TRANSPORT_LIMIT_BYTES),
    ("grpc.http2.bdp_probe", 0),  # windows that grow would let a caller pile up audio in the transport
    ("grpc.keepalive_time_ms", 20_000),  # notices callers that vanished
    ("grpc.keepalive_timeout_ms", 10_000),
)

_Parsed = TypeVar("_Parsed", bound=Message)


class GrpcServer:
    """The gRPC side of one process; all methods are called on the event loop.

    settings: limits of the deployment. engine: of the live streams. clips: enhances clips; stands back.
    """

    def __init__(self, settings: Settings, engine: Engine, clips: Enhancer, metrics: Metrics) -> None:
        self._settings = settings
        self._engine = engine
        self._clip_enhancer = clips
        self._metrics = metrics
        self._jobs = FileJobs(1, MAX_CLIPS)
        self._calls: set[_Call] = set()
        self._health = health_aio.HealthServicer()
        self.stopping: Callable[[], bool] = lambda: False
        self.port = 0

    async def start(self, state: Health) -> None:
        """Listen; raises RuntimeError if the address cannot be had. state: whether the process stops."""
        self.stopping = lambda: state.stopping
        self._ticker = Ticker(self._engine)
        self._server = grpc.aio.server(options=_OPTIONS)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME),
            self._server,
        )
        # Bytes in and out: what does not parse is then ours to answer.
        handlers = {
            "EnhanceStream": grpc.stream_stream_rpc_method_handler(self._enhance_stream),
            "EnhanceClip": grpc.unary_unary_rpc_method_handler(self._enhance_clip),
            "GetStatus": grpc.unary_unary_rpc_method_handler(self._get_status),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        self.port = self._server.add_insecure_port(str(self._settings.grpc_listen))
        for service in ("", SERVICE):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        await self._server.start()
        self._sweeper = asyncio.create_task(self._sweep())

    async def stop(self) -> None:
        """Stop being healthy, let live streams end within the grace, cut off those that remain."""
        await self._health.enter_graceful_shutdown()
        deadline = time.monotonic() + self._settings.shutdown_grace_seconds
        while (self._engine.active or self._jobs.accepted) and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        for call in list(self._calls):
            call.fail(StoppingError("the server stopped before the stream ended; open it elsewhere"))
        await self._server.stop(1)
        self._sweeper.cancel()
        self._ticker.close()
        await self._jobs.close()

    async def _sweep(self) -> None:
        """End the streams that went silent."""
        limit = self._settings.stream_idle_seconds
        while True:
            await asyncio.sleep(min(1, limit / 4))
            for call in list(self._calls):
                call.check(time.monotonic() - limit)

    async def _enhance_stream(self, _: Any, context: grpc.aio.ServicerContext) -> None:
        call = _Call(self, context)
        self._calls.add(call)
        try:
            await self._guard(context, call.run())
        finally:
            self._calls.discard(call)

    async def _enhance_clip(self, data: bytes, context: grpc.aio.ServicerContext) -> bytes:
        return (await self._guard(context, self._clip(data))).SerializeToString()

    async def _clip(self, data: bytes) -> pb.EnhanceClipResponse:
        request = _parse(pb.EnhanceClipRequest, data)
        if self.stopping():
            raise StoppingError("the server is stopping; try another one")
        rate = _rate(request.sample_rate_hz, "sample_rate_hz")
        encoding = _encoding(request.encoding, "encoding")
        controls = _controls(request.parameters, "parameters")
        samples = _samples(request.audio, encoding, rate * MAX_CLIP_SECONDS)
        if not len(samples):
            raise ParameterError("audio: empty; at least one sample is needed")

        def work(_: Checkpoint) -> bytes:
            clean = enhance(samples, rate, controls=controls, enhancer=self._clip_enhancer)
            return pcm.encode(clean, encoding).tobytes()

        with self._jobs.place():
            audio = await self._jobs.run(work)
        manifest = self._clip_enhancer.model.manifest
        return pb.EnhanceClipResponse(audio=audio, model_name=manifest.name, model_version=manifest.version)

    async def _get_status(self, data: bytes, context: grpc.aio.ServicerContext) -> bytes:
        model, engine = self._clip_enhancer.model, self._engine
        return pb.GetStatusResponse(
            model_name=model.manifest.name,
            model_version=model.manifest.version,
            precision=model.precision,
            active_streams=engine.active,
            stream_capacity=engine.capacity,
            accepting=not self.stopping() and engine.active < engine.capacity,
        ).SerializeToString()

    async def _guard(self, context: grpc.aio.ServicerContext, work: Awaitable[Any]) -> Any:
        """Await some work; a failure becomes the RPC's status."""
        try:
            return await work
        except Exception as error:
            answer = answer_for(error)
            if answer.code == "internal":
                logger.error("rpc failed", exc_info=error)
            detail = answer.meaning if answer.code == "internal" else str(error)
            hint = (
                (("grpc-retry-pushback-ms", str(RETRY_MILLISECONDS)),) if isinstance(error, BusyError) else ()
            )
            await context.abort(grpc.StatusCode[answer.grpc_code], detail, hint)


class _Call:
    """One EnhanceStream RPC: reads messages into a session, writes its answers."""

    def __init__(self, server: GrpcServer, context: grpc.aio.ServicerContext) -> None:
        self._server = server
        self._context = context
        self._engine = server._engine
        self._metrics = server._metrics
        self._error: Exception | None = None
        self._reader = asyncio.current_task()
        self._writer: asyncio.Task[None] | None = None
        self._opened = self._heard = time.monotonic()
        self._writing: float | None = None  # since when an answer waits to be taken
        self._session: Session | None = None
        self._answered = asyncio.Event()  # there are answers to write, or nothing more will come
        self._room = asyncio.Event()  # the reader may go on
        self._ending = False
        self._misses = 0

    def fail(self, error: Exception) -> None:
        """End the RPC with an error."""
        if self._error is None and self._reader is not None:
            self._error = error
            self._reader.cancel()

    def check(self, oldest: float) -> None:
        """Fail if nothing was sent, or an answer waits to be taken, since a time."""
        limit = f"{self._server._settings.stream_idle_seconds:g} s"
        if self._writing is not None:
            if self._writing < oldest:
                self.fail(SlowReaderError(f"the answers were not read for {limit}"))
        elif self._heard < oldest:
            self.fail(IdleError(f"nothing was sent for {limit}"))

    async def run(self) -> None:
        """Serve the RPC to its end; raises what ended it early."""
        error: BaseException | None = None
        try:
            await self._converse()
        except (Exception, asyncio.CancelledError) as raised:
            error = self._error or raised
        self._close(error)
        if self._writer is not None:
            # gRPC sends no status while a response waits in the way: a caller that does not read holds up its
            # own status, but no place any more.
            await asyncio.wait([self._writer])
        if error is not None:
            raise error

    async def _converse(self) -> None:
        request = await self._read()
        if request is None:
            return
        if request.WhichOneof("payload") != "config":
            raise ParameterError(f"payload: the first message is {_payload(request)}; it must be config")
        options = _options(request.config)
        if self._server.stopping():
            raise StoppingError("the server is stopping; open the stream elsewhere")
        self._session = session = self._engine.open(options, self._answered.set)
        self._log("stream opened", sample_rate_hz=options.sample_rate)
        await self._write(pb.EnhanceStreamResponse(started=self._started(session)))
        self._writer = asyncio.create_task(self._write_answers(session))
        self._writer.add_done_callback(self._writer_ended)
        await self._read_messages(session)
        self._ending = True
        self._answered.set()
        await asyncio.shield(self._writer)

    def _close(self, error: BaseException | None) -> None:
        """Give the place back, and write the books."""
        outcome = "ok"
        if error is not None:
            outcome = answer_for(error if isinstance(error, Exception) else ClientGoneError()).code
        self._metrics.streams.labels(outcome).inc()
        session = self._session
        if session is None:
            self._log("stream refused", outcome=outcome)
            return
        self._engine.close(session)
        session.answers.clear()
        self._ending = True
        self._answered.set()
        audio_seconds = session.n_samples / session.options.sample_rate
        self._metrics.stream_audio.inc(audio_seconds)
        self._log(
            "stream closed",
            outcome=outcome,
            sample_rate_hz=session.options.sample_rate,
            audio_seconds=round(audio_seconds, 3),
            open_seconds=round(time.monotonic() - self._opened, 3),
            deadline_misses=self._misses,
        )

    async def _read_messages(self, session: Session) -> None:
        limit = round(self._server._settings.stream_queue_seconds * session.options.sample_rate)
        longest = session.options.sample_rate * MAX_MESSAGE_SECONDS
        ended = False
        while not ended:
            request = await self._read()
            now = time.monotonic()
            kind = "end" if request is None else request.WhichOneof("payload")
            if kind == "audio":
                assert request is not None
                session.push(_samples(request.audio, session.options.encoding, longest), now)
                while session.queued_samples > limit:
                    await self._wait_for_room()
            elif kind == "parameters":
                assert request is not None
                session.update(_controls(request.parameters, "parameters"), now)
            elif kind in ("flush", "end"):
                passages = session.n_passages
                session.flush(now)
                while session.n_passages == passages:
                    await self._wait_for_room()
                ended = kind == "end"
            else:
                raise ParameterError(
                    f"payload: {_payload(request)} came; after the config accepted are audio, parameters, "
                    "flush and end"
                )

    async def _wait_for_room(self) -> None:
        self._room.clear()
        await self._room.wait()
        self._heard = time.monotonic()

    async def _read(self) -> pb.EnhanceStreamRequest | None:
        """The next message; None at the end."""
        data = await self._context.read()
        self._heard = time.monotonic()
        return None if data is grpc.aio.EOF else _parse(pb.EnhanceStreamRequest, data)

    async def _write(self, response: pb.EnhanceStreamResponse) -> float:
        """Send a response; returns when it was on its way."""
        self._writing = time.monotonic()
        try:
            await self._context.write(response.SerializeToString())
        except Exception as error:  # gRPC's errors have no common base class
            raise ClientGoneError("the caller hung up") from error
        self._writing = None
        return time.monotonic()

    async def _write_answers(self, session: Session) -> None:
        while True:
            self._answered.clear()
            self._room.set()  # a flush may be done
            while session.answers:
                answer = session.answers.popleft()
                took = await self._write(self._response(answer, session)) - answer.since
                self._metrics.stream_latency.observe(took)
                if took > DEADLINE_SECONDS:
                    self._misses += 1
                    self._metrics.deadline_misses.inc()
                self._room.set()
            if session.error is not None:
                raise session.error
            if self._ending:
                return
            await self._answered.wait()

    def _writer_ended(self, writer: asyncio.Task[None]) -> None:
        if not writer.cancelled() and (error := writer.exception()) is not None:
            self.fail(error if isinstance(error, Exception) else ClientGoneError(str(error)))

    def _response(self, answer: Answer, session: Session) -> pb.EnhanceStreamResponse:
        if answer.controls is not None:
            updated = pb.ParametersUpdated(parameters=_parameters(answer.controls), position=answer.position)
            return pb.EnhanceStreamResponse(parameters=updated)
        audio = pb.EnhancedAudio(audio=answer.audio, position=answer.position, flushed=answer.flushed)
        if answer.report is not None:
            report = answer.report
            audio.report.speech_probability = report.speech_probability
            audio.report.pitch_hz = report.pitch_hz
            audio.report.mean_gain = report.mean_gain
        if session.answers:
            audio.queued_samples = session.queued_samples
        audio.draining = self._server.stopping()
        return pb.EnhanceStreamResponse(audio=audio)

    def _started(self, session: Session) -> pb.StreamStarted:
        options, manifest = session.options, self._server._clip_enhancer.model.manifest
        return pb.StreamStarted(
            delay_samples=session.delay_samples,
            model_name=manifest.name,
            model_version=manifest.version,
            config=pb.StreamConfig(
                sample_rate_hz=options.sample_rate,
                encoding=next(name for name, dtype in _ENCODINGS.items() if dtype == options.encoding),
                parameters=_parameters(options.controls),
                message_samples=options.message_samples,
                compensate_delay=options.compensate_delay,
                report=options.report,
            ),
            idle_timeout_seconds=self._server._settings.stream_idle_seconds,
        )

    def _log(self, message: str, **values: Any) -> None:
        metadata = dict(self._context.invocation_metadata() or ())
        trace = {"traceparent": metadata["traceparent"]} if "traceparent" in metadata else {}
        fields = {"peer": self._context.peer(), **trace, **values}
        logger.log(logging.INFO, message, extra={"fields": fields})


def _parse(kind: type[_Parsed], data: bytes) -> _Parsed:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise ParameterError(f"the message is no {kind.DESCRIPTOR.full_name}") from error


def _payload(request: pb.EnhanceStreamRequest | None) -> str:
    return (request.WhichOneof("payload") if request is not None else None) or "nothing"


def _options(config: pb.StreamConfig) -> Options:
    rate = _rate(config.sample_rate_hz, "config.sample_rate_hz")
    longest = rate * MAX_MESSAGE_SECONDS
    if config.message_samples > longest:
        raise ParameterError(f"config.message_samples: {config.message_samples}; accepted are 0 to {longest}")
    return Options(
        rate,
        _encoding(config.encoding, "config.encoding"),
        _controls(config.parameters, "config.parameters"),
        config.message_samples,
        config.compensate_delay,
        config.report,
    )


def _rate(rate_hz: int, field: str) -> int:
    if not MIN_RATE_HZ <= rate_hz <= MAX_RATE_HZ:
        raise ParameterError(f"{field}: {rate_hz}; accepted are {MIN_RATE_HZ} to {MAX_RATE_HZ}")
    return rate_hz


def _encoding(encoding: pb.Encoding, field: str) -> Any:
    if encoding not in _ENCODINGS:
        accepted = " and ".join(pb.Encoding.Name(name) for name in _ENCODINGS)
        raise ParameterError(f"{field}: {encoding}; accepted are {accepted}")
    return _ENCODINGS[encoding]


def _controls(parameters: pb.Parameters, field: str) -> Controls:
    has = parameters.HasField
    limit = parameters.attenuation_limit_db if has("attenuation_limit_db") else None
    mix = parameters.mix if has("mix") else 1.0
    if limit is not None and not 0 <= limit < math.inf:
        raise ParameterError(f"{field}.attenuation_limit_db: {limit:g}; accepted are 0 and more")
    if not 0 <= mix <= 1:
        raise ParameterError(f"{field}.mix: {mix:g}; accepted are 0 to 1")
    return Controls(limit, mix, parameters.postfilter if has("postfilter") else True)


def _parameters(controls: Controls) -> pb.Parameters:
    return pb.Parameters(
        attenuation_limit_db=controls.attenuation_limit_db, mix=controls.mix, postfilter=controls.postfilter
    )


def _samples(data: bytes, encoding: Any, longest: int) -> Any:
    """The samples of a message; raises ParameterError for pieces of samples and too many of them."""
    if len(data) % encoding.itemsize:
        raise ParameterError(f"audio: {len(data)} bytes; samples have {encoding.itemsize} bytes each")
    if len(data) > longest * encoding.itemsize:
        raise ParameterError(
            f"audio: {len(data) // encoding.itemsize} samples; accepted are {longest} in a message"
        )
    return pcm.decode(data, encoding)
