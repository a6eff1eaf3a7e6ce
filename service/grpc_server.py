"""The gRPC interface: live streams and short clips, health and reflection."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from percepnet.errors import ParameterError
from service import clips, maxine, messages, wakeups
from service.access import Access
from service.callers import Caller
from service.clips import Clips
from service.errors import (
    BusyError,
    ClientGoneError,
    ServiceError,
    UnauthenticatedError,
    answer_for,
    logged,
    outcome,
    told,
)
from service.files import Files
from service.health import Health
from service.limits import MAX_GRPC_MESSAGE_BYTES
from service.listener import Listener
from service.logs import logger
from service.maxine import Maxine
from service.messages import pb
from service.metrics import Metrics
from service.multiplex import Multiplex
from service.settings import Settings
from service.streams import Streams, Wire
from service.ticker import Ticker

SERVICE = pb.DESCRIPTOR.services_by_name["EnhancementService"].full_name

CONNECTION_AGE_SECONDS = 5
"""After this time a caller is asked for a new connection, which may reach another worker of this service; the
streams it has go on."""

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_GRPC_MESSAGE_BYTES),
    ("grpc.http2.bdp_probe", 0),  # windows that grow would let a caller pile up audio in the transport
    ("grpc.keepalive_time_ms", 20_000),  # notices callers that vanished
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    # Callers ask as well, many every 10 s; gRPC hangs up on those that do more often than every 5 min.
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.max_connection_idle_ms", 600_000),  # of callers that hold connections without a call
)

_HEALTH = "/grpc.health.v1.Health/"
_OURS = tuple(f"/{service}/" for service in (SERVICE, *maxine.SERVICES))
_STREAMS = ("EnhanceStream", "EnhanceStreams", "EnhanceAudio")
_known: ContextVar[Caller] = ContextVar("_known")  # gRPC keeps it from the interceptor to the handler


class GrpcServer:
    """The gRPC side of one process; all methods are called on the event loop.

    settings: where to listen. access: who may call. files: work that stands back.
    """

    def __init__(self, settings: Settings, access: Access, streams: Streams, files: Files) -> None:
        self._settings = settings
        self._access = access
        self._model = files.enhancer.model
        self._streams = streams
        self._engine = streams.engine
        self._maxine = Maxine(streams, files)
        self._clips = Clips(streams, access, files)
        self._metrics = streams.metrics
        self._board = streams.metrics.board
        self._health = health_aio.HealthServicer()
        self.port = 0

    async def start(self, state: Health) -> None:
        """Listen; raises RuntimeError if the address cannot be had. state: whether the process stops."""
        self._listener = Listener(self._build, self._board)
        self._streams.start(lambda: state.stopping, self._listener.stream_opened)
        self._ticker = Ticker(self._engine)
        wakeups.gather(asyncio.get_running_loop())
        await self._listener.start()
        for service in ("", SERVICE, *maxine.SERVICES):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)

    def _build(self) -> grpc.aio.Server:
        """A server that is to be started; raises RuntimeError if the address cannot be had."""
        # Without workers that share it, a second server on the port must fail, not take half of the calls.
        shared = len(self._board.slots) > 1
        age = self._settings.connection_age_seconds or (CONNECTION_AGE_SECONDS if shared else None)
        server = grpc.aio.server(
            options=(
                *_OPTIONS,
                ("grpc.so_reuseport", int(shared)),
                ("grpc.server_handshake_timeout_ms", round(1000 * self._settings.transfer_timeout_seconds)),
                *((("grpc.max_connection_age_ms", round(1000 * age)),) if age else ()),
            ),
            interceptors=[_Gate(self._access, self._streams)],
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(
            (
                SERVICE,
                maxine.SERVICE,
                health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
                reflection.SERVICE_NAME,
            ),
            server,
        )
        # Bytes in and out: what does not parse is then ours to answer.
        handlers = {
            "EnhanceStream": grpc.stream_stream_rpc_method_handler(self._enhance_stream),
            "EnhanceStreams": grpc.stream_stream_rpc_method_handler(self._enhance_streams),
            # As if they were streams, whose messages are read when there is a place for them.
            "EnhanceClip": grpc.stream_stream_rpc_method_handler(self._enhance_clip),
            "GetStatus": grpc.stream_stream_rpc_method_handler(self._get_status),
        }
        enhance_audio = {"EnhanceAudio": grpc.stream_stream_rpc_method_handler(self._enhance_audio)}
        services = {SERVICE: handlers, **dict.fromkeys(maxine.SERVICES, enhance_audio)}
        server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler(*service) for service in services.items()]
        )
        address, tls = str(self._settings.grpc_listen), self._access.tls
        if tls is None:
            self.port = server.add_insecure_port(address)
        else:
            self.port = server.add_secure_port(address, tls.grpc_credentials())
        return server

    async def stop(self) -> None:
        """Stop being healthy, let streams, files and clips end within the grace, cut off the others."""
        deadline = time.monotonic() + self._settings.shutdown_grace_seconds
        await self._health.enter_graceful_shutdown()
        await self._streams.stop()
        while (self._maxine.n_files or self._clips.accepted) and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        await self._listener.stop(1)
        self._ticker.close()
        await self._clips.close()

    async def _enhance_stream(self, _: Any, context: grpc.aio.ServicerContext) -> None:
        work = self._streams.converse(_GrpcWire(context), _caller(context))
        await _guard(context, "EnhanceStream", self._metrics, work)

    async def _enhance_streams(self, _: Any, context: grpc.aio.ServicerContext) -> None:
        work = Multiplex(self._streams, context, _caller(context)).run()
        await _guard(context, "EnhanceStreams", self._metrics, work)

    async def _enhance_audio(self, _: Any, context: grpc.aio.ServicerContext) -> None:
        work = self._maxine.enhance_audio(context, _caller(context))
        await _guard(context, "EnhanceAudio", self._metrics, work)

    async def _enhance_clip(self, _: Any, context: grpc.aio.ServicerContext) -> None:
        work = self._clips.enhance_clip(context, _caller(context))
        await _guard(context, "EnhanceClip", self._metrics, work)

    async def _get_status(self, _: Any, context: grpc.aio.ServicerContext) -> None:
        await _guard(context, "GetStatus", self._metrics, self._tell_status(context))

    async def _tell_status(self, context: grpc.aio.ServicerContext) -> None:
        messages.parse(pb.GetStatusRequest, await _only_request(context, self._streams))
        model, board = self._model, self._board
        active, capacity = int(board.total("streams")), int(board.total("capacity"))
        response = pb.GetStatusResponse(
            model_name=model.manifest.name,
            model_version=model.manifest.version,
            precision=model.precision,
            active_streams=active,
            stream_capacity=capacity,
            accepting=not self._streams.stopping() and active < capacity,
        )
        await _send(context, response)


class _GrpcWire(Wire):
    """One EnhanceStream RPC."""

    def __init__(self, context: grpc.aio.ServicerContext) -> None:
        self._context = context

    async def read(self) -> pb.EnhanceStreamRequest | None:
        """The next message; None at the end."""
        data = await self._context.read()
        return None if data is grpc.aio.EOF else messages.parse(pb.EnhanceStreamRequest, data)

    async def write(self, response: pb.EnhanceStreamResponse) -> None:
        """Send a response."""
        await _send(self._context, response)

    def release(self, writer: asyncio.Task[None]) -> None:
        """Let it wait: gRPC sends no status while a response is in the way.

        A caller that does not read holds up its own status, but no place any more; `Streams` counts how many.
        """


async def _send(context: grpc.aio.ServicerContext, response: Message) -> None:
    try:
        await context.write(response.SerializeToString())
    except Exception as error:  # gRPC's errors have no common base class
        raise ClientGoneError("the caller hung up") from error


async def _guard(
    context: grpc.aio.ServicerContext, method: str, metrics: Metrics, work: Awaitable[None]
) -> None:
    """Await the work of an RPC and count it; a failure becomes its status."""
    try:
        await work
        metrics.rpcs.labels(method, "ok").inc()
        return
    except asyncio.CancelledError as error:
        metrics.rpcs.labels(method, outcome(error)).inc()
        raise
    except Exception as error:
        metrics.rpcs.labels(method, outcome(error)).inc()
        if outcome(error) == "internal":
            logger.error("rpc failed", exc_info=error)
        status = _status(error)
    # Not above: what `abort` raises would keep the error, and with its traceback the caller's audio.
    await context.abort(*status)


def _status(error: Exception) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]:
    """A failure as `abort` tells it."""
    hint: tuple[tuple[str, str], ...] = ()
    if isinstance(error, BusyError):
        hint = (("grpc-retry-pushback-ms", f"{1000 * error.retry_seconds:.0f}"),)
    return grpc.StatusCode[answer_for(error).grpc_code], told(error), hint


async def _request(context: grpc.aio.ServicerContext, streams: Streams) -> Any:
    """The next request, waited for as those of streams are: gRPC waits for any number."""
    with streams.waiting():
        return await context.read()


async def _only_request(context: grpc.aio.ServicerContext, streams: Streams) -> bytes:
    if (data := await _request(context, streams)) is grpc.aio.EOF:
        raise ParameterError("the call ended without a request; there must be one")
    return data


def _waited_for(handler: grpc.RpcMethodHandler, streams: Streams) -> grpc.RpcMethodHandler:
    """The same, but its requests are waited for, and read, as those of streams are."""

    def parsed(data: bytes) -> Any:
        try:
            return handler.request_deserializer(data)
        except DecodeError as error:
            raise ParameterError("the request is no message of its kind") from error

    async def requests(context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        while (data := await _request(context, streams)) is not grpc.aio.EOF:
            yield parsed(data)

    async def serve(_: Any, context: grpc.aio.ServicerContext) -> None:
        try:
            if handler.request_streaming:
                async for response in handler.stream_stream(requests(context), context):
                    await context.write(response)
                return
            request = parsed(await _only_request(context, streams))
            if handler.response_streaming:
                await handler.unary_stream(request, context)
            else:
                await context.write(await handler.unary_unary(request, context))
        except (ParameterError, ServiceError) as error:
            await context.abort(*_status(error))

    return grpc.stream_stream_rpc_method_handler(serve, None, handler.response_serializer)


class _Gate(grpc.aio.ServerInterceptor):
    """Refuses the RPCs of unknown callers before a handler hears of them; everybody may ask for health."""

    def __init__(self, access: Access, streams: Streams) -> None:
        self._access = access
        self._streams = streams

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Let a known caller through to the handler."""
        handler = await continuation(details)
        if handler is None:
            return handler
        try:
            if not details.method.startswith(_HEALTH):
                _known.set(self._access.caller("", dict(details.invocation_metadata or ())))
        except UnauthenticatedError as error:
            refuse = partial(self._refuse, error, details.method.rpartition("/")[2])
            return grpc.stream_stream_rpc_method_handler(refuse)
        return handler if details.method.startswith(_OURS) else _waited_for(handler, self._streams)

    async def _refuse(self, error: Exception, method: str, _: Any, context: grpc.aio.ServicerContext) -> None:
        caller = Caller(context.peer())
        if method == "EnhanceClip":
            clips.log(caller, logged(error))
        elif method in _STREAMS:
            self._streams.refused(caller, error)

        async def fail() -> None:
            raise error

        await _guard(context, method, self._streams.metrics, fail())


def _caller(context: grpc.aio.ServicerContext) -> Caller:
    return replace(_known.get(), peer=context.peer())
