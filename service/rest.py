"""The HTTP interface: a file in, the enhanced file out, and what describes the service."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import ExitStack, asynccontextmanager
from dataclasses import asdict
from importlib.metadata import version
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, Request, Response, Security, WebSocket
from fastapi.security import APIKeyHeader, HTTPBearer
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from percepnet.constants import LATENCY_SAMPLES, SAMPLE_RATE
from service import download, health, upload
from service import websocket as websocket_stream
from service.access import Access
from service.callers import Caller
from service.download import Download
from service.errors import (
    ANSWERS,
    NOT_ABOUT_FILES,
    ClientGoneError,
    StoppingError,
    UnauthenticatedError,
    documented_problems,
    problem_response,
)
from service.files import Files
from service.metrics import Metrics
from service.observe import Observe
from service.parameters import Parameters
from service.settings import Settings
from service.streams import Streams
from service.upload import read_upload, spooled_file

_DESCRIPTION = """\
Removes noise and reverberation from speech. Post a recording to `/enhance`, get the enhanced recording back:
the same rate, the same channels, the same length to the sample, no delay.
"""

_ENHANCE_DESCRIPTION = """\
Send WAV, FLAC, Ogg (Vorbis, Opus) or MP3, 8 to 192 kHz, as the `file` of a multipart form or as
the bare body, whose content decides: it may also come as `application/x-www-form-urlencoded`, what curl and
urllib call any body. Each channel is enhanced on its own. The parameters may stand in the query or in the
form.
"""

_BEARER = HTTPBearer(auto_error=False, description="An API key, if the deployment has keys.")
_API_KEY = APIKeyHeader(name="x-api-key", auto_error=False, description="The same, in a header of its own.")

_Result = TypeVar("_Result")


async def while_connected(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
    """Await some work, and cancel it if the caller hangs up first (ClientGoneError)."""

    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        task.cancel()

    task = asyncio.create_task(work)
    watcher = asyncio.create_task(hung_up())
    try:
        return await task
    except asyncio.CancelledError:
        if watcher.done():
            raise ClientGoneError("the caller hung up while the file was being enhanced") from None
        raise
    finally:
        watcher.cancel()


def create_app(
    settings: Settings,
    access: Access,
    files: Files,
    streams: Streams,
    state: health.Health,
    metrics: Metrics,
) -> FastAPI:
    """The application that serves one engine.

    settings: limits of the deployment. access: who may call. files: works on the uploads.
    streams: of WebSockets and gRPC. state: what `/readyz` tells. metrics: what `/metrics` tells.
    """
    model = files.enhancer.model

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await files.close()

    app = FastAPIOffline(
        title="PercepNet",
        version=version("percepnet"),
        description=_DESCRIPTION,
        redoc_url=None,
        redirect_slashes=False,  # a file would be sent twice, or not at all
        lifespan=lifespan,
        swagger_ui_parameters={"tryItOutEnabled": True, "defaultModelsExpandDepth": -1},
    )
    app.add_middleware(Observe, metrics=metrics)
    if settings.cors_origins is not None:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins.names,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "x-api-key", "traceparent"],
            expose_headers=["*"],
        )

    @app.exception_handler(HTTPException)
    async def no_such_route(request: Request, error: HTTPException) -> Response:
        request.state.line["error"] = code = error.detail.lower().replace(" ", "_")
        return problem_response(
            error.status_code, code, f"{request.method} {request.url.path}", dict(error.headers or {})
        )

    async def known(
        request: Request,
        bearer: Annotated[object, Security(_BEARER)],
        api_key: Annotated[object, Security(_API_KEY)],
    ) -> Caller:
        """The caller, who may use the service; the two schemes only document how a key is sent."""
        caller = access.http_caller(request)
        request.state.line |= caller.fields
        return caller

    async def place(caller: Annotated[Caller, Depends(known)]) -> AsyncIterator[ExitStack]:
        """A place among the files, and the temporary files of its holder, until the answer is sent."""
        if state.stopping:
            raise StoppingError("the service is stopping; try again, and another one answers")
        with files.place(caller), ExitStack() as resources:
            yield resources

    @app.post(
        "/enhance",
        tags=["enhancement"],
        summary="Enhance a recording",
        description=_ENHANCE_DESCRIPTION,
        response_class=Response,
        responses={
            200: download.DOCUMENTATION,
            **documented_problems(kind for kind in ANSWERS if kind not in NOT_ABOUT_FILES),
        },
        openapi_extra={"parameters": Parameters.documentation(), "requestBody": upload.DOCUMENTATION},
    )
    async def enhance(request: Request, resources: Annotated[ExitStack, Depends(place)]) -> Response:
        in_query = request.query_params.multi_items()
        parameters = Parameters.parse(in_query)
        source = await read_upload(request, settings, resources)
        if source.fields:
            parameters = Parameters.parse(in_query + source.fields)
        target = resources.enter_context(spooled_file())
        work = files.enhance(source.file, target, parameters.format, parameters.controls)
        summary, cpu_seconds = await while_connected(request, work)
        request.state.line |= {
            "audio_seconds": round(summary.seconds, 6),
            "sample_rate_hz": summary.sample_rate,
            "channels": summary.channels,
            "processing_seconds": round(summary.processing_seconds, 6),
            "cpu_seconds": round(cpu_seconds, 6),
        }
        return Download(
            target,
            source.name,
            parameters.format,
            summary,
            model.manifest,
            settings.transfer_timeout_seconds,
        )

    @app.get(
        "/v1/model",
        tags=["enhancement"],
        summary="What model serves, and its delay",
        responses=documented_problems([UnauthenticatedError]),
        dependencies=[Depends(known)],
    )
    async def describe_model() -> dict[str, Any]:
        described = {
            name: value for name, value in asdict(model.manifest).items() if isinstance(value, str | int)
        }
        return described | {
            "precision": model.precision,
            "latency_seconds": LATENCY_SAMPLES / SAMPLE_RATE,
        }

    @app.get(
        "/metrics", tags=["operation"], summary="Metrics in Prometheus' text format", response_class=Response
    )
    async def exposition(request: Request) -> Response:
        content, content_type = metrics.render(request.headers.get("accept", ""))
        return Response(content, headers={"Content-Type": content_type})

    @app.websocket("/v1/stream")
    async def stream(websocket: WebSocket) -> None:
        await websocket_stream.serve(websocket, streams, access)

    @app.websocket("/{path:path}")
    async def no_such_stream(websocket: WebSocket) -> None:
        detail = f"{websocket.url.path} is no WebSocket; /v1/stream is"
        await websocket.send_denial_response(problem_response(404, "not_found", detail, {}))

    app.include_router(health.routes(state))
    return app
