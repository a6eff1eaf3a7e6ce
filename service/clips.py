"""Short clips: one message in, one out, enhanced behind live streams."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import grpc

from percepnet.errors import ParameterError
from percepnet.stream import enhance
from service import messages, pcm
from service.access import Access
from service.callers import Caller
from service.errors import ClientGoneError, StoppingError, UploadTimeoutError, logged, within
from service.files import Files
from service.jobs import Checkpoint, FileJobs
from service.limits import longest_clip
from service.logs import logger
from service.messages import pb
from service.streams import Streams

PATIENCE_SECONDS = 60
"""So long may a clip take to come, and its answer to be taken."""

MAX_CLIPS = 4
"""Clips held at once: they are short, and worked on in turn."""


class Clips:
    """Serves `EnhanceClip`; its methods are called on the event loop."""

    def __init__(self, streams: Streams, access: Access, files: Files) -> None:
        self._streams = streams
        self._access = access
        self._enhancer = files.enhancer
        self._jobs = FileJobs(1, MAX_CLIPS, cpu=streams.metrics.cpu)

    @property
    def accepted(self) -> int:
        """Clips under way."""
        return self._jobs.accepted

    async def enhance_clip(self, context: grpc.aio.ServicerContext, caller: Caller) -> None:
        """Serve one RPC to its end; raises what ended it early. Leaves a line in the log."""
        started, line = time.monotonic(), dict[str, Any](outcome="ok")
        try:
            if self._streams.stopping():
                raise StoppingError("the server is stopping; try another one")
            with self._access.files.hold(caller.key), self._jobs.place():
                await self._enhance(context, line)
        except (Exception, asyncio.CancelledError) as error:
            line |= logged(error)
            raise
        finally:
            line["open_seconds"] = round(time.monotonic() - started, 3)
            log(caller, line)

    async def close(self) -> None:
        """Wait until all places are given back."""
        await self._jobs.close()

    async def _enhance(self, context: grpc.aio.ServicerContext, line: dict[str, Any]) -> None:
        # Until a clip has its place, gRPC lets no more of it come than 64 KiB.
        late = UploadTimeoutError(f"the clip did not come within {PATIENCE_SECONDS} s")
        work = self._work(await within(PATIENCE_SECONDS, context.read(), late), line)
        answer = await self._jobs.run(work)
        gone = ClientGoneError("the caller did not take the answer")
        await within(PATIENCE_SECONDS, _send(context, answer), gone)

    def _work(self, data: bytes, line: dict[str, Any]) -> Callable[[Checkpoint], bytes]:
        """What is to be done for a request, which keeps nothing of it but the samples."""
        request = messages.parse(pb.EnhanceClipRequest, b"" if data is grpc.aio.EOF else data)
        rate = messages.rate(request.sample_rate_hz, "sample_rate_hz")
        encoding = messages.encoding(request.encoding, "encoding")
        controls = messages.controls(request.parameters, "parameters")
        samples = messages.samples(request.audio, encoding, longest_clip(rate, encoding.itemsize))
        if not len(samples):
            raise ParameterError("audio: empty; at least one sample is needed")
        line |= {"sample_rate_hz": rate, "audio_seconds": round(len(samples) / rate, 6)}
        manifest = self._enhancer.model.manifest

        def work(checkpoint: Checkpoint) -> bytes:
            clean = enhance(
                samples,
                rate,
                controls=controls,
                enhancer=self._enhancer,
                progress=lambda done, expected: checkpoint(),
            )
            return pb.EnhanceClipResponse(
                audio=pcm.encode(clean, encoding).tobytes(),
                model_name=manifest.name,
                model_version=manifest.version,
            ).SerializeToString()

        return work


def log(caller: Caller, line: dict[str, Any]) -> None:
    """Write the one line of a clip."""
    logger.info("clip", extra={"fields": caller.fields | line})


async def _send(context: grpc.aio.ServicerContext, answer: bytes) -> None:
    try:
        await context.write(answer)
    except Exception as error:  # gRPC's errors have no common base class
        raise ClientGoneError("the caller hung up") from error
