"""For clients of NVIDIA Maxine Background Noise Removal: their protocol, on the engine that serves all.

The first audio tells which of the two modes is meant: a chunk of 10 ms begins a live stream, the head of a
WAV file an upload, which stands back behind live streams.
"""

import asyncio
import logging
import time
from typing import Any, BinaryIO

import grpc
from starlette.concurrency import run_in_threadpool

from percepnet.errors import ParameterError
from percepnet.stream import Summary
from percepnet.synthesis import MAX_ATTENUATION_LIMIT_DB, Controls
from service import messages, pcm
from service.callers import Caller
from service.errors import (
    ClientGoneError,
    StoppingError,
    TooLargeError,
    UploadTimeoutError,
    logged,
    within,
)
from service.files import Files
from service.logs import logger
from service.messages import pb
from service.pb.nvidia.maxine.bnr.v1 import bnr_pb2 as bnr
from service.streams import Streams, Wire
from service.upload import MIB, spooled_file

SERVICE = bnr.DESCRIPTOR.services_by_name["MaxineBNR"].full_name
SERVICES = (SERVICE, "nvidia.ai4m.bnr.v1.BNR")
"""The names that clients call: version 2 of NVIDIA's service has another one, with equal messages."""

PIECE_BYTES = 64 * 1024
"""Of an enhanced file, in a message."""

CHUNKS = {480 * pcm.F32LE.itemsize: 48_000, 160 * pcm.F32LE.itemsize: 16_000}
"""Bytes of 10 ms, and the sample rate that they tell."""

_WAV = (b"RIFF", b"RF64")
"""How a WAV file begins; after four bytes more comes its kind."""


class Maxine:
    """Serves `EnhanceAudio`; its methods are called on the event loop."""

    def __init__(self, streams: Streams, files: Files) -> None:
        self._streams = streams
        self._files = files
        self.n_files = 0
        """Under way."""

    async def enhance_audio(self, context: grpc.aio.ServicerContext, caller: Caller) -> None:
        """Serve one RPC to its end; raises what ended it early."""
        talk = _Talk(context)
        with self._streams.waiting():
            first = await talk.beginning()
        if first is None:
            return
        if first[:4] in _WAV and first[8:12] == b"WAVE":
            await self._enhance_file(talk, first, caller)
        else:
            await self._streams.converse(_LiveWire(talk, first), caller)

    async def _enhance_file(self, talk: "_Talk", first: bytes, caller: Caller) -> None:
        """Take the whole file, enhance it, send it back; leaves a line in the log."""
        started, line = time.monotonic(), dict[str, Any](outcome="ok")
        self.n_files += 1
        try:
            if self._streams.stopping():
                raise StoppingError("the server is stopping; try another one")
            with self._files.place(caller), spooled_file() as source, spooled_file() as target:
                await self._receive(talk, first, source)
                work = self._files.enhance(source, target, "wav", talk.controls)
                summary, line["cpu_seconds"] = await work
                line |= _described(summary)
                await self._send(talk, target)
        except (Exception, asyncio.CancelledError) as error:
            line |= logged(error)
            raise
        finally:
            self.n_files -= 1
            line["open_seconds"] = round(time.monotonic() - started, 3)
            logger.log(logging.INFO, "file streamed", extra={"fields": caller.fields | line})

    async def _receive(self, talk: "_Talk", first: bytes, source: BinaryIO) -> None:
        settings = self._files.settings
        limit = settings.transfer_timeout_seconds
        late = UploadTimeoutError(f"nothing came for {limit:g} s in the middle of the upload")
        n_bytes = 0
        piece: bytes | None = first
        while piece is not None:
            n_bytes += len(piece)
            if n_bytes > settings.max_upload_mib * MIB:
                raise TooLargeError(f"the upload is larger than {settings.max_upload_mib} MiB")
            await run_in_threadpool(source.write, piece)
            piece = await within(limit, talk.audio(), late)

    async def _send(self, talk: "_Talk", target: BinaryIO) -> None:
        target.seek(0)
        gone = ClientGoneError("the caller stopped taking the answer")
        while piece := await run_in_threadpool(target.read, PIECE_BYTES):
            response = bnr.EnhanceAudioResponse(audio_stream_data=piece)
            await within(self._files.settings.transfer_timeout_seconds, talk.write(response), gone)


class _Talk:
    """The messages of one RPC."""

    def __init__(self, context: grpc.aio.ServicerContext) -> None:
        self._context = context
        self.controls = _controls(1.0)
        """What the configs so far ask for."""

    async def read(self) -> bnr.EnhanceAudioRequest | None:
        """The next message, checked; None at the end. Raises ParameterError."""
        data = await self._context.read()
        if data is grpc.aio.EOF:
            return None
        request = messages.parse(bnr.EnhanceAudioRequest, data)
        kind = request.WhichOneof("stream_input")
        if kind is None:
            raise ParameterError("stream_input: nothing came; accepted are audio_stream_data and config")
        if kind == "config":
            ratio = request.config.intensity_ratio if request.config.HasField("intensity_ratio") else 1.0
            if not 0 <= ratio <= 1:
                raise ParameterError(f"config.intensity_ratio: {ratio:g}; accepted are 0 to 1")
            self.controls = _controls(ratio)
        return request

    async def audio(self) -> bytes | None:
        """The next audio, None at the end; configs on the way are answered."""
        while (request := await self.read()) is not None:
            if request.HasField("audio_stream_data"):
                return request.audio_stream_data
            await self.confirm(self.controls.mix)
        return None

    async def beginning(self) -> bytes | None:
        """The first audio, with as much of what follows as tells a WAV file by its head; None without any."""
        data = await self.audio()
        while data is not None and len(data) < 12 and any(head.startswith(data[:4]) for head in _WAV):
            piece = await self.audio()
            if piece is None:
                break
            data += piece
        return data

    async def confirm(self, ratio: float) -> None:
        """Tell what is in force."""
        config = bnr.EnhanceAudioConfig(intensity_ratio=ratio)
        await self.write(bnr.EnhanceAudioResponse(config=config))

    async def write(self, response: bnr.EnhanceAudioResponse) -> None:
        """Send a message; raises ClientGoneError."""
        try:
            await self._context.write(response.SerializeToString())
        except Exception as error:  # gRPC's errors have no common base class
            raise ClientGoneError("the caller hung up") from error


class _LiveWire(Wire):
    """A live stream in Maxine's messages, as `Streams` takes it."""

    def __init__(self, talk: _Talk, first: bytes) -> None:
        self._talk = talk
        self._chunk_bytes = len(first)
        self._first: bytes | None = first
        self._configured = False

    async def read(self) -> pb.EnhanceStreamRequest | None:
        """The next message; None at the end. Raises ParameterError."""
        if not self._configured:
            self._configured = True
            return pb.EnhanceStreamRequest(config=self._config())
        if self._first is not None:
            data, self._first = self._first, None
            return pb.EnhanceStreamRequest(audio=data)
        request = await self._talk.read()
        if request is None:
            return None
        if request.HasField("config"):
            return pb.EnhanceStreamRequest(parameters=self._parameters())
        if len(request.audio_stream_data) != self._chunk_bytes:
            raise ParameterError(
                f"audio_stream_data: {len(request.audio_stream_data)} bytes; all chunks of this stream have "
                f"{self._chunk_bytes}"
            )
        return pb.EnhanceStreamRequest(audio=request.audio_stream_data)

    async def write(self, response: pb.EnhanceStreamResponse) -> None:
        """Send what Maxine's clients expect: a chunk for a chunk. Raises ClientGoneError."""
        if response.HasField("parameters"):
            await self._talk.confirm(response.parameters.parameters.mix)
        elif response.HasField("audio") and not response.audio.flushed:
            await self._talk.write(bnr.EnhanceAudioResponse(audio_stream_data=response.audio.audio))

    def release(self, writer: asyncio.Task[None]) -> None:
        """Let it wait: gRPC sends no status while a response is in the way."""

    def _config(self) -> pb.StreamConfig:
        if self._chunk_bytes not in CHUNKS:
            accepted = ", ".join(f"{size} (10 ms at {rate} Hz)" for size, rate in CHUNKS.items())
            raise ParameterError(
                f"audio_stream_data: {self._chunk_bytes} bytes; accepted are {accepted} and a WAV file's head"
            )
        return pb.StreamConfig(
            sample_rate_hz=CHUNKS[self._chunk_bytes],
            encoding=pb.ENCODING_F32LE,
            parameters=self._parameters(),
            message_samples=self._chunk_bytes // pcm.F32LE.itemsize,
        )

    def _parameters(self) -> pb.Parameters:
        return messages.parameters(self._talk.controls)


def _controls(ratio: float) -> Controls:
    """An intensity ratio as controls: a share of all that can be removed, whatever the default limit."""
    return Controls(MAX_ATTENUATION_LIMIT_DB, mix=ratio)


def _described(summary: Summary) -> dict[str, Any]:
    """What the log tells of a file."""
    return {
        "audio_seconds": round(summary.seconds, 6),
        "sample_rate_hz": summary.sample_rate,
        "channels": summary.channels,
        "processing_seconds": round(summary.processing_seconds, 6),
    }
