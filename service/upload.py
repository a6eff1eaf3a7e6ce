"""From a request's body to a file on disk, within the limits of the deployment."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from itertools import chain
from tempfile import SpooledTemporaryFile
from typing import Any, BinaryIO, cast

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive

from service.errors import BodyError, ClientGoneError, MediaTypeError, TooLargeError, UploadTimeoutError
from service.settings import Settings

MIB = 1024 * 1024

FILE_FIELD = "file"
RAW_TYPES = ("audio/*", "application/ogg", "application/octet-stream")
UNSAID_TYPE = "application/x-www-form-urlencoded"
"""What curl and urllib call any body if they are not told: its content decides."""

DOCUMENTATION: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "description": "The parameters of the query may stand here instead, each in one place only.",
                "required": [FILE_FIELD],
                "additionalProperties": False,
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
"""The body as OpenAPI describes it."""


@dataclass(frozen=True)
class Upload:
    """What a caller sent."""

    file: BinaryIO
    """At its start."""
    name: str
    """The caller's name for it; may be empty."""
    fields: list[tuple[str, str]]
    """The other fields of a multipart form, in their order."""


def spooled_file() -> BinaryIO:
    """A file in memory that moves to the disk when it grows; nameless there, so nothing can stay behind."""
    return cast(BinaryIO, SpooledTemporaryFile(max_size=MIB))


async def read_upload(request: Request, settings: Settings, resources: ExitStack) -> Upload:
    """Read the body of a request, a multipart form or the bare file, and stop at the limit.

    resources: closes the file in the end.

    Raises:
        MediaTypeError: the content type is never audio.
        TooLargeError: the body is beyond the limit, whatever its declared length.
        UploadTimeoutError: the next piece did not come in time.
        BodyError: the body is empty, or no complete form with a file.
        ClientGoneError: the caller hung up.
    """
    kind = request.headers.get("content-type", "application/octet-stream").partition(";")[0].strip().lower()
    if "content-encoding" in request.headers:
        raise MediaTypeError("content encodings are not accepted; send the file as it is")
    limit = settings.max_upload_mib * MIB
    if int(request.headers.get("content-length", 0)) > limit:  # spares both sides the transfer
        raise TooLargeError(f"the upload is larger than {settings.max_upload_mib} MiB")
    limited = Request(request.scope, _limited(request.receive, settings))
    try:
        if kind == "multipart/form-data":
            upload = await _read_form(limited, resources)
            "".join([upload.name, *chain(*upload.fields)]).encode()  # some charsets decode to half characters
        elif kind.startswith("audio/") or kind in (*RAW_TYPES, UNSAID_TYPE):
            upload = await _read_raw(limited, resources)
        else:
            raise MediaTypeError(f"{kind} is never audio; send {', '.join(RAW_TYPES)} or multipart/form-data")
    except ClientDisconnect as error:
        raise ClientGoneError("the caller hung up during the upload") from error
    except UnicodeError as error:
        raise BodyError(
            f"{request.headers['content-type']}: the form is no text in this charset; send UTF-8"
        ) from error
    if not upload.file.read(1):
        raise BodyError("the file is empty")
    upload.file.seek(0)
    return upload


def _limited(receive: Receive, settings: Settings) -> Receive:
    """The same messages, counted and timed."""
    received = 0

    async def limited() -> Message:
        nonlocal received
        try:
            async with asyncio.timeout(settings.transfer_timeout_seconds):
                message = await receive()
        except TimeoutError as error:
            raise UploadTimeoutError(
                f"nothing came for {settings.transfer_timeout_seconds:g} s in the middle of the upload"
            ) from error
        received += len(message.get("body", b""))
        if received > settings.max_upload_mib * MIB:
            raise TooLargeError(f"the upload is larger than {settings.max_upload_mib} MiB")
        return message

    return limited


class _FormParser(MultiPartParser):
    """Starlette's parser, which takes a form that breaks off for a whole one, but for this flag."""

    complete = False

    def on_end(self) -> None:
        """The closing boundary was read."""
        self.complete = True


async def _read_form(request: Request, resources: ExitStack) -> Upload:
    async def pieces() -> AsyncGenerator[bytes, None]:
        async for piece in request.stream():
            yield piece
        if not parser.complete:  # told from inside, so that the parser closes its files
            raise MultiPartException("The form ends before its closing boundary.")

    try:
        async with aclosing(pieces()) as stream:
            parser = _FormParser(request.headers, stream, max_files=1, max_fields=16, max_part_size=1024)
            form = await parser.parse()
    except MultiPartException as error:
        raise BodyError(error.message) from error
    files = [(name, value) for name, value in form.multi_items() if isinstance(value, UploadFile)]
    for _, upload in files:
        resources.callback(upload.file.close)
    if [name for name, _ in files] != [FILE_FIELD]:
        raise BodyError(f"the form needs exactly one file, in its field {FILE_FIELD!r}")
    [(_, upload)] = files
    fields = [(name, value) for name, value in form.multi_items() if isinstance(value, str)]
    return Upload(upload.file, upload.filename or "", fields)


async def _read_raw(request: Request, resources: ExitStack) -> Upload:
    upload = UploadFile(resources.enter_context(spooled_file()))
    async for piece in request.stream():
        await upload.write(piece)
    await upload.seek(0)
    return Upload(upload.file, "", [])
