"""From an enhanced file to the answer that carries it."""

import asyncio
import os
from pathlib import PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import quote

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from percepnet.model import Manifest
from percepnet.stream import Summary
from service.errors import ClientGoneError
from service.upload import MIB

MEDIA_TYPES = {"wav": "audio/wav", "flac": "audio/flac", "ogg": "audio/ogg", "opus": "audio/ogg"}
"""What can be asked for."""

DOCUMENTATION: dict[str, Any] = {
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
            ("PercepNet-Real-Time-Factor", "number", "Processing time by duration: below 1 is faster."),
        )
    },
}
"""The answer as OpenAPI describes it."""


class Download(Response):
    """The enhanced file as the answer, read piece by piece off the event loop.

    file: stays open. name: what the caller called the upload; may be empty. format: one of MEDIA_TYPES.
    timeout_seconds: longest wait for the caller to take a piece.
    """

    def __init__(
        self,
        file: BinaryIO,
        name: str,
        format: str,
        summary: Summary,
        manifest: Manifest,
        timeout_seconds: float,
    ) -> None:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        headers = {
            "Content-Type": MEDIA_TYPES[format],
            "Content-Length": str(size),
            "Content-Disposition": disposition(name, format),
            "PercepNet-Model": manifest.name,
            "PercepNet-Model-Version": manifest.version,
            "PercepNet-Audio-Seconds": f"{summary.seconds:.6f}",
            "PercepNet-Processing-Seconds": f"{summary.processing_seconds:.6f}",
            "PercepNet-Real-Time-Factor": f"{summary.real_time_factor:.6f}",
        }
        super().__init__(headers=headers)
        self._file = file
        self._timeout_seconds = timeout_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; ClientGoneError if the caller does not take the next piece in time."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            while piece := await run_in_threadpool(self._file.read, MIB):
                async with asyncio.timeout(self._timeout_seconds):
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
        except TimeoutError as error:
            raise ClientGoneError("the caller stopped taking the answer") from error
        await send({"type": "http.response.body"})


def disposition(name: str, format: str) -> str:
    """`Content-Disposition` for the enhanced version of what the caller called `name` (RFC 6266)."""
    stem = PurePosixPath(name.replace("\\", "/")).stem or "audio"
    printable = "".join(c for c in stem if c.isprintable())[:100]
    plain = "".join(c if c.isascii() and c not in '"\\%;' else "_" for c in printable)
    full = quote(f"{printable}-enhanced.{format}", safe="")
    return f"attachment; filename=\"{plain}-enhanced.{format}\"; filename*=UTF-8''{full}"
