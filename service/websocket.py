"""Live streams over a WebSocket: the messages of gRPC, control as JSON texts and audio as binary messages."""

import asyncio
import json
from contextlib import suppress
from typing import Any

from fastapi import WebSocket
from google.protobuf.descriptor import Descriptor
from google.protobuf.json_format import MessageToDict, ParseDict

from percepnet.errors import ParameterError
from service.access import Access, peer_of
from service.callers import Caller
from service.connections import MAX_WEBSOCKET_MESSAGE_BYTES
from service.errors import BusyError, ClientGoneError, TooLargeError, UnauthenticatedError, answer_for, told
from service.logs import logger
from service.messages import pb
from service.streams import Streams, Wire

SUBPROTOCOL = "percepnet.v1"
KEY_PREFIX = "percepnet.key."
"""A browser sets no headers: it offers the subprotocols `percepnet.v1` and `percepnet.key.KEY`."""

CLOSE_CODES_FROM = 4000
"""A stream that fails is closed with this plus the error's HTTP status, codes for applications."""

_OK = 1000
_TOO_BIG = 1009  # what the WebSocket layer closes with when a message is over the limit
_REASON_BYTES = 123  # that a close frame may hold
_GOODBYE_SECONDS = 2
"""For a caller to take what it is told in the end; then its connection is cut."""


async def serve(websocket: WebSocket, streams: Streams, access: Access) -> None:
    """One connection: a stream from its config to its end, or to an error and its close code."""
    wire = _Wire(websocket)
    try:
        offered = websocket.scope["subprotocols"]
        await websocket.accept(SUBPROTOCOL if SUBPROTOCOL in offered else None)
        try:
            caller = _caller(websocket, access)
        except UnauthenticatedError as error:
            streams.refused(Caller(peer_of(websocket)), error)
            raise
        await streams.converse(wire, caller)
        ending = wire.close(_OK, "")
    except ClientGoneError:
        return
    except Exception as error:
        ending = wire.fail(error)
    transport = websocket.state.transport
    asyncio.get_running_loop().call_later(
        _GOODBYE_SECONDS, transport.abort
    )  # nothing happens if it is closed
    with suppress(ClientGoneError):
        await ending


class _Wire(Wire):
    """A WebSocket as a stream's wire."""

    def __init__(self, websocket: WebSocket) -> None:
        self._websocket = websocket
        self._drains = False  # whether the caller knows

    async def read(self) -> pb.EnhanceStreamRequest:
        """The next message."""
        message = await self._websocket.receive()
        if message["type"] == "websocket.disconnect":
            if message.get("code") == _TOO_BIG:
                raise TooLargeError(f"a message is larger than {MAX_WEBSOCKET_MESSAGE_BYTES} bytes")
            raise ClientGoneError("the caller hung up")
        if message.get("bytes") is not None:
            return pb.EnhanceStreamRequest(audio=message["bytes"])
        return _parse(message["text"])

    async def write(self, response: pb.EnhanceStreamResponse) -> None:
        """Send a message: audio in binary, after a text if there is more to tell than samples."""
        kind = response.WhichOneof("payload")
        if kind == "audio":
            audio = response.audio
            if audio.HasField("report") or audio.flushed or audio.dry or audio.draining > self._drains:
                self._drains = audio.draining
                await self._send(text=_text({"audio": _described(audio)}))
            await self._send(bytes=audio.audio)
        else:
            assert kind is not None
            message = getattr(response, kind)
            values = _values(message)
            if "position" in values:  # a text in protobuf's own JSON
                values["position"] = message.position
            await self._send(text=_text({kind: values}))

    def release(self, writer: asyncio.Task[None]) -> None:
        """Let go of a message that waits to be taken."""
        writer.cancel()

    async def close(self, code: int, reason: str) -> None:
        """End the connection."""
        text = reason.encode()[:_REASON_BYTES].decode(errors="ignore")
        await self._send_event({"type": "websocket.close", "code": code, "reason": text})

    async def fail(self, error: Exception) -> None:
        """Tell an error, and end the connection with its code."""
        answer = answer_for(error)
        if answer.code == "internal":
            logger.error("stream failed", exc_info=error)
        values = {"code": answer.code, "detail": told(error)}
        hint = {"retry_seconds": error.retry_seconds} if isinstance(error, BusyError) else {}
        await self._send(text=_text({"error": values | hint}))
        await self.close(CLOSE_CODES_FROM + answer.http_status, values["detail"])

    async def _send(self, **content: str | bytes) -> None:
        await self._send_event({"type": "websocket.send", **content})

    async def _send_event(self, event: dict[str, Any]) -> None:
        try:
            await self._websocket.send(event)
        except Exception as error:  # of several libraries, with no common base
            raise ClientGoneError("the caller hung up") from error


def _caller(websocket: WebSocket, access: Access) -> Caller:
    headers = dict(websocket.headers)
    for offered in websocket.scope["subprotocols"]:
        if offered.startswith(KEY_PREFIX):
            headers.setdefault("x-api-key", offered.removeprefix(KEY_PREFIX))
    return access.http_caller(websocket, headers)


def _parse(text: str) -> pb.EnhanceStreamRequest:
    try:
        values = json.loads(text)
        _check_objects(values, pb.EnhanceStreamRequest.DESCRIPTOR, "it")
        return ParseDict(values, pb.EnhanceStreamRequest())
    except Exception as error:  # protobuf has many for a value of another shape than its field
        reason = error.__cause__ if isinstance(error, SystemError) else error  # whose own text tells nothing
        told = f"the text is no EnhanceStreamRequest in JSON: {reason}"
        raise ParameterError(told.encode(errors="backslashreplace").decode()) from error


def _check_objects(value: Any, kind: Descriptor, name: str) -> None:
    """Raise ValueError where a message is no object; what protobuf says then tells nothing."""
    if not isinstance(value, dict):
        accepted = f"an object with some of {', '.join(kind.fields_by_name)}" if kind.fields else "{}"
        raise ValueError(f"{name} is {json.dumps(value):.40}; accepted is {accepted}")
    for field in kind.fields:
        for key in (field.name, field.json_name):
            if field.message_type is not None and value.get(key) is not None:
                _check_objects(value[key], field.message_type, key)


def _described(audio: pb.EnhancedAudio) -> dict[str, Any]:
    """What it holds beside its samples."""
    names = ("position", "flushed", "queued_samples", "draining", "dry")
    report = {"report": _values(audio.report)} if audio.HasField("report") else {}
    return {name: getattr(audio, name) for name in names} | report


def _values(message: Any) -> dict[str, Any]:
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def _text(values: dict[str, Any]) -> str:
    return json.dumps(values, separators=(",", ":"))
