"""An audio filter for Pipecat's input transports; needs `pipecat-ai`."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import fields, replace
from numbers import Real
from typing import Any

import pipecat.frames.frames as frames
from loguru import logger
from pipecat.audio.filters.base_audio_filter import BaseAudioFilter

from percepnet.enhancer import Enhancer
from percepnet.errors import ParameterError
from percepnet.stream import Stream, bundled_enhancer
from percepnet.synthesis import Controls
from service import pcm
from service.client import AsyncClient
from service.client.conversation import Item

HELD_SECONDS = 1.5
"""Of audio wait for a server at most: in that time the client finds another one. A bot that hears nothing for
longer would be taken for dead."""

GRACE_SECONDS = 0.5
"""For so long more may wait: it may have come at once."""

RETRY_SECONDS = 2.0
"""Between two attempts to be enhanced again."""

IDLE_SECONDS = 10.0
"""Without audio, after which a muted caller gives its place back; a server would take it after 30."""

SETTINGS = tuple(field.name for field in fields(Controls))


class PercepNetFilter(BaseAudioFilter):
    """Removes noise and reverberation from what a bot hears.

    target: None enhances in the bot's process, where all filters share one model. "HOST:PORT" is a server of
    this project, which takes the work over; an AsyncClient is the same for many filters, with TLS or an API
    key. controls: may be changed on the way, by a FilterUpdateSettingsFrame with any of their names; settings
    that are not accepted are logged as an error, and nothing changes. enhancer: for a model of your own, in
    the bot's process.

    What comes back are the samples that went in, each once and in order, 30 ms later (at other rates than
    48 kHz a few more, over the network by its way more), so that the first calls return b"". A
    FilterEnableFrame fades to the unenhanced samples and back, in 10 to 50 ms, and the delay stays.

    A server that is lost or full, or refuses, does not stop the call: what it owes after two seconds comes
    back as it was, noise and all, and so does what follows, each time with an error in the log, while the
    filter asks again every few seconds.
    """

    def __init__(
        self,
        target: str | AsyncClient | None = None,
        *,
        controls: Controls = Controls(),
        enhancer: Enhancer | None = None,
    ) -> None:
        self._target = target
        self._controls = controls
        self._enabled = True
        self._enhancer = enhancer or (bundled_enhancer() if target is None else None)
        self._line: _InProcess | _Remote | None = None
        self._rest = b""  # less than 10 ms

    async def start(self, sample_rate: int) -> None:
        """Begin a stream; raises ParameterError for a rate or a target that is not accepted."""
        await self.stop()
        self._step = sample_rate // 100 * pcm.S16LE.itemsize
        if self._target is None:
            self._line = _InProcess(sample_rate, self._chosen, self._enhancer)
        else:
            self._line = _Remote(sample_rate, self._chosen, self._target)

    async def stop(self) -> None:
        """End the stream, and drop what has not come back: the last 30 ms, over the network its way more."""
        line, self._line, self._rest = self._line, None, b""
        if line is not None:
            await line.close()

    async def process_frame(self, frame: frames.FilterControlFrame) -> None:
        """Switch the filter, or change its controls."""
        if isinstance(frame, frames.FilterEnableFrame):
            self._enabled = frame.enable
        elif isinstance(frame, frames.FilterUpdateSettingsFrame):
            try:
                self._controls = _changed(self._controls, frame.settings)
            except ParameterError as error:
                logger.error(f"PercepNetFilter keeps its settings: {error}")
        if self._line is not None:
            self._line.control(self._chosen)

    async def filter(self, audio: bytes) -> bytes:
        """Take a chunk of any length, and return what is ready; never waits. b"" if it is not started."""
        if self._line is None:
            return b""
        audio = self._rest + audio
        whole = len(audio) // self._step * self._step
        self._rest = audio[whole:]
        return self._line.push(audio[:whole])

    @property
    def _chosen(self) -> Controls:
        return self._controls if self._enabled else replace(self._controls, mix=0)


class _InProcess:
    """A stream in this process."""

    def __init__(self, sample_rate: int, controls: Controls, enhancer: Enhancer | None) -> None:
        self._stream = Stream(sample_rate, controls=controls, enhancer=enhancer)
        self._lead_in = self._stream.latency_samples  # still to leave out

    def push(self, audio: bytes) -> bytes:
        ready = self._stream.push(pcm.decode(audio, pcm.S16LE))
        left_out = min(self._lead_in, len(ready))
        self._lead_in -= left_out
        return pcm.encode(ready[left_out:], pcm.S16LE).tobytes()

    def control(self, controls: Controls) -> None:
        self._stream.controls = controls

    async def close(self) -> None:
        pass


class _Remote:
    """Live streams at a server, one after another: after silence, or after a loss."""

    def __init__(self, sample_rate: int, controls: Controls, target: str | AsyncClient) -> None:
        self._owns_client = isinstance(target, str)
        self._client = AsyncClient(target) if isinstance(target, str) else target
        self._client.stream(sample_rate)  # raises ParameterError, and opens nothing yet
        self._sample_rate = sample_rate
        self._controls = controls
        self._to_send: asyncio.Queue[Item] = asyncio.Queue()
        self._held = bytearray()  # not answered yet
        self._full_since = math.inf
        self._ready = bytearray()  # to give back
        self._lost = False
        self._task = asyncio.create_task(self._run())

    def push(self, audio: bytes) -> bytes:
        self._held += audio
        if self._lost:
            self._let_go()
        elif audio:
            self._to_send.put_nowait(pcm.decode(audio, pcm.S16LE))
            full = len(self._held) > HELD_SECONDS * self._sample_rate * pcm.S16LE.itemsize
            self._full_since = min(self._full_since, time.monotonic()) if full else math.inf
            if time.monotonic() - self._full_since > GRACE_SECONDS:
                self._lose(f"no answer for {HELD_SECONDS + GRACE_SECONDS:g} s")
                self._task.cancel()
                self._task = asyncio.create_task(self._run())
        ready, self._ready = bytes(self._ready), bytearray()
        return ready

    def control(self, controls: Controls) -> None:
        self._controls = controls
        self._to_send.put_nowait(controls)

    async def close(self) -> None:
        self._task.cancel()
        try:
            await asyncio.wait([self._task])
        finally:
            if self._owns_client:
                await self._client.close()

    async def _run(self) -> None:
        while True:
            first: Item = self._controls
            while not self._lost and isinstance(first, Controls):
                first = await self._to_send.get()  # a stream begins with the controls of its time
            try:
                await self._enhance(first)
            except Exception as error:
                self._lose(str(error) or repr(error))
                await asyncio.sleep(RETRY_SECONDS)

    async def _enhance(self, first: Item) -> None:
        """One stream, until nothing is said for a while."""
        async with self._client.stream(
            self._sample_rate,
            controls=self._controls,
            message_samples=self._sample_rate // 100,
            compensate_delay=True,
        ) as call:
            if self._lost:
                logger.info("PercepNetFilter enhances again")
                self._lost, self._to_send, first = False, asyncio.Queue(), self._controls
            async for samples in call.pipe(self._items(first, self._to_send)):
                self._ready += pcm.encode(samples, pcm.S16LE).tobytes()
                del self._held[: len(samples) * pcm.S16LE.itemsize]

    async def _items(self, first: Item, others: asyncio.Queue[Item]) -> AsyncIterator[Item]:
        yield first
        with suppress(TimeoutError):
            while True:
                yield await asyncio.wait_for(others.get(), IDLE_SECONDS)

    def _lose(self, why: str) -> None:
        logger.error(f"PercepNetFilter lets noise through until a server is there: {why}")
        self._lost, self._full_since = True, math.inf
        self._let_go()

    def _let_go(self) -> None:
        self._ready += self._held
        self._held.clear()


def _changed(controls: Controls, settings: Mapping[str, Any]) -> Controls:
    """The controls with new settings; raises ParameterError."""
    for name, value in settings.items():
        if name not in SETTINGS:
            raise ParameterError(f"{name}: no such setting; there are {', '.join(SETTINGS)}")
        if not isinstance(value, Real):
            raise ParameterError(f"{name}: {value!r}; accepted are numbers")
        controls = replace(controls, **{name: float(value)})
    return controls
