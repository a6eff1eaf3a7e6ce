"""The HTTP interface: a file in, the enhanced file out, and what describes the service."""

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import ExitStack, asynccontextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import PurePosixPath
from typing import Annotated, Any, BinaryIO, Literal, Self, TypeVar
from urllib.parse import quote

from fastapi import Depends, FastAPI, Request, Response
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from percepnet.audio import AudioReader
from percepnet.constants import LATENCY_SAMPLES, SAMPLE_RATE
from percepnet.enhancer import Enhancer
from percepnet.errors import AudioError, ParameterError, UnsupportedAudioError
from percepnet.stream import Summary, enhance_file
from percepnet.synthesis import Controls
from service import health
from service.errors import (
    BodyError,
    BusyError,
    ClientGoneError,
    MediaTypeError,
    StoppingError,
    TooLargeError,
    UploadTimeoutError,
    documented_problems,
    problem_response,
)
from service.jobs import Checkpoint, FileJobs
from service.metrics import Metrics
from service.observe import Observe
from service.settings import Settings
from service.upload import FILE_FIELD, MIB, Upload, read_upload, spooled_file

MEDIA_TYPES = {"wav": "audio/wav", "flac": "audio/flac", "ogg": "audio/ogg", "opus": "audio/ogg"}
"""What can be asked for."""

_DESCRIPTION = """\
Removes noise and reverberation from speech. Post a recording to `/enhance`, get the enhanced recording back:
the same rate, the same channels, the same length to the sample, no delay.
"""

_ENHANCE_DESCRIPTION = """\
Send WAV, FLAC, Ogg (Vorbis, Opus) or MP3, 8 to 192 kHz, as the `file` of a multipart form or as
the bare body. Each channel is enhanced on its own. The parameters may stand in the query or in the form.
"""

_ENHANCED: dict[str, Any] = {
    "description": "The enhanced file.",
    "content": {
        kind: {"schema": {"type": "string", "format": "binary"}}
        for kind in dict.fromkeys(MEDIA_TYPES.values())
    },
    "headers": {
        name: {"description": description, "schema": {"type": kind}}
        for name, kind, description in (
            ("Content-Disposition", "string", "A name for the file, made from the uploaded one."),
            ("PercepNet-Model", "string", "Name of the model."),
            ("PercepNet-Model-Version", "string", "Version of the model."),
            ("PercepNet-Audio-Seconds", "number", "Duration of the recording."),
            ("PercepNet-Processing-Seconds", "number", "Time from the start of the work to its end."),
            (
                "PercepNet-Real-Time-Factor",
                "number",
                "Processing time by duration; below 1 is faster than real time.",
            ),
        )
    },
}

_UPLOAD: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": [FILE_FIELD],
                "properties": {
                    FILE_FIELD: {"type": "string", "format": "binary", "description": "The recording."},
                },
            }
        },
        **{
            kind: {"schema": {"type": "string", "format": "binary"}}
            for kind in ("audio/wav", "audio/flac", "audio/ogg", "audio/mpeg", "application/octet-stream")
        },
    },
}

_PROBLEMS = (
    AudioError,
    BodyError,
    UploadTimeoutError,
    TooLargeError,
    MediaTypeError,
    UnsupportedAudioError,
    ParameterError,
    Exception,
    BusyError,
    StoppingError,
)

_Result = TypeVar("_Result")


class Parameters(BaseModel):
    """What a caller may choose for one file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["wav", "flac", "ogg", "opus"] = Field("wav", description="Format of the enhanced file.")
    attenuation_limit_db: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="Lower the noise by at most this many dB (≥ 0; default: no limit).",
    )
    mix: float = Field(
        1.0,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Share of the enhanced signal: 0 is the input, 1 all enhanced.",
    )
    postfilter: bool = Field(True, description="Remove more of the residual noise.")

    @classmethod
    def parse(cls, given: list[tuple[str, str]]) -> Self:
        """Check names and texts as they came in a query and a form; raises ParameterError."""
        names = [name for name, _ in given]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ParameterError(f"given more than once: {', '.join(twice)}")
        try:
            return cls.model_validate(dict(given))
        except ValidationError as error:
            raise ParameterError("; ".join(_complaint(detail) for detail in error.errors())) from error

    @classmethod
    def documentation(cls) -> list[dict[str, Any]]:
        """OpenAPI's `parameters`, one a field."""
        properties = cls.model_json_schema()["properties"]
        return [
            {"name": name, "in": "query", "description": schema.pop("description"), "schema": schema}
            for name, schema in properties.items()
        ]


def _complaint(detail: Any) -> str:
    name = str(detail["loc"][0])[:64]
    if detail["type"] == "extra_forbidden":
        return f"{name}: no such parameter; there are {', '.join(Parameters.model_fields)}"
    return f"{name}={str(detail['input'])[:64]!r}: {detail['msg']}"


class SpooledFileResponse(Response):
    """A temporary file as the answer, read piece by piece off the event loop."""

    def __init__(self, file: BinaryIO, size: int, timeout_seconds: float, headers: dict[str, str]) -> None:
        super().__init__(headers={**headers, "Content-Length": str(size)})
        self.file = file
        self.timeout_seconds = timeout_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; ClientGoneError if the caller does not take the next piece in time."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            while piece := await run_in_threadpool(self.file.read, MIB):
                async with asyncio.timeout(self.timeout_seconds):
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
        except TimeoutError as error:
            raise ClientGoneError("the caller stopped taking the answer") from error
        await send({"type": "http.response.body"})


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


def download_name(name: str, format: str) -> str:
    """`Content-Disposition` for the enhanced version of a file that the caller called `name`."""
    stem = PurePosixPath(name.replace("\\", "/")).stem or "audio"
    printable = "".join(c for c in stem if c.isprintable())[:100]
    plain = "".join(c if c.isascii() and c not in '"\\%;' else "_" for c in printable)
    return (
        f'attachment; filename="{plain}-enhanced.{format}"; '
        f"filename*=UTF-8''{quote(f'{printable}-enhanced.{format}', safe='')}"
    )


def _enhance(
    upload: Upload,
    target: BinaryIO,
    parameters: Parameters,
    enhancer: Enhancer,
    settings: Settings,
    checkpoint: Checkpoint,
) -> tuple[Summary, float]:
    """Enhance one file in the calling thread; returns the summary and the CPU seconds it took."""
    cpu_started = time.thread_time()
    with AudioReader(upload.file) as header:
        sample_rate = header.sample_rate
        if header.channels > settings.max_channels:
            raise TooLargeError(
                f"the recording has {header.channels} channels; accepted are {settings.max_channels}"
            )

    def progress(n_done: int, n_expected: int) -> None:
        """Between blocks; a header may promise any length, so what was decoded counts as well."""
        if max(n_done, n_expected) > settings.max_duration_seconds * sample_rate:
            raise TooLargeError(f"the recording is longer than {settings.max_duration_seconds:g} s")
        if target.tell() > settings.max_result_mib * MIB:
            raise TooLargeError(f"the enhanced file is larger than {settings.max_result_mib} MiB")
        checkpoint()

    summary = enhance_file(
        upload.file,
        target,
        format=parameters.format,
        controls=Controls(parameters.attenuation_limit_db, parameters.mix, parameters.postfilter),
        enhancer=enhancer,
        progress=progress,
    )
    return summary, time.thread_time() - cpu_started


def create_app(settings: Settings, enhancer: Enhancer, state: health.Health) -> FastAPI:
    """The application that serves one engine.

    settings: limits of the deployment. enhancer: shared by all requests. state: what `/readyz` tells.
    """
    jobs = FileJobs(settings.file_workers, settings.max_requests)
    manifest = enhancer.model.manifest
    metrics = Metrics(enhancer.model)
    metrics.files_capacity.set(settings.max_requests)
    metrics.files_accepted.set_function(lambda: jobs.accepted)
    metrics.files_waiting.set_function(lambda: jobs.waiting)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await jobs.close()

    app = FastAPIOffline(
        title="PercepNet",
        version=version("percepnet"),
        description=_DESCRIPTION,
        redoc_url=None,
        lifespan=lifespan,
        swagger_ui_parameters={"tryItOutEnabled": True, "defaultModelsExpandDepth": -1},
    )
    app.add_middleware(Observe, metrics=metrics)
    app.include_router(health.routes(state))

    @app.exception_handler(HTTPException)
    async def no_such_route(request: Request, error: HTTPException) -> Response:
        request.state.line["error"] = code = error.detail.lower().replace(" ", "_")
        return problem_response(
            error.status_code, code, f"{request.method} {request.url.path}", dict(error.headers or {})
        )

    async def place() -> AsyncIterator[ExitStack]:
        """A place among the files, and the temporary files of its holder, until the answer is sent."""
        with jobs.place(), ExitStack() as resources:
            yield resources

    @app.post(
        "/enhance",
        tags=["enhancement"],
        summary="Enhance a recording",
        description=_ENHANCE_DESCRIPTION,
        response_class=Response,
        responses={200: _ENHANCED, **documented_problems(_PROBLEMS)},
        openapi_extra={"parameters": Parameters.documentation(), "requestBody": _UPLOAD},
    )
    async def enhance(request: Request, resources: Annotated[ExitStack, Depends(place)]) -> Response:
        in_query = request.query_params.multi_items()
        parameters = Parameters.parse(in_query)
        upload = await read_upload(request, settings, resources)
        if upload.fields:
            parameters = Parameters.parse(in_query + upload.fields)
        target = resources.enter_context(spooled_file())

        def work(checkpoint: Checkpoint) -> tuple[Summary, float]:
            return _enhance(upload, target, parameters, enhancer, settings, checkpoint)

        summary, cpu_seconds = await while_connected(request, jobs.run(work))
        metrics.file_audio.inc(summary.seconds * summary.channels)
        metrics.file_cpu.inc(cpu_seconds)
        request.state.line |= {
            "audio_seconds": round(summary.seconds, 6),
            "sample_rate_hz": summary.sample_rate,
            "channels": summary.channels,
            "processing_seconds": round(summary.processing_seconds, 6),
            "cpu_seconds": round(cpu_seconds, 6),
        }
        size = target.seek(0, 2)
        target.seek(0)
        headers = {
            "Content-Type": MEDIA_TYPES[parameters.format],
            "Content-Disposition": download_name(upload.name, parameters.format),
            "PercepNet-Model": manifest.name,
            "PercepNet-Model-Version": manifest.version,
            "PercepNet-Audio-Seconds": f"{summary.seconds:.6f}",
            "PercepNet-Processing-Seconds": f"{summary.processing_seconds:.6f}",
            "PercepNet-Real-Time-Factor": f"{summary.real_time_factor:.6f}",
        }
        return SpooledFileResponse(target, size, settings.transfer_timeout_seconds, headers)

    @app.get("/v1/model", tags=["enhancement"], summary="What model serves, and its delay")
    async def model() -> dict[str, Any]:
        described = {name: value for name, value in asdict(manifest).items() if isinstance(value, str | int)}
        return described | {
            "precision": enhancer.model.precision,
            "latency_seconds": LATENCY_SAMPLES / SAMPLE_RATE,
        }

    @app.get(
        "/metrics", tags=["operation"], summary="Metrics in Prometheus' text format", response_class=Response
    )
    async def exposition(request: Request) -> Response:
        content, content_type = metrics.render(request.headers.get("accept", ""))
        return Response(content, headers={"Content-Type": content_type})

    return app
