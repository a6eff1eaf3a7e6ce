"""`percepnet stream`: recordings through live streams of a server, one for each channel."""

import argparse
import asyncio
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import numpy as np

from percepnet.audio import AudioReader, AudioWriter, choose_encoding
from percepnet.constants import HOP, SAMPLE_RATE
from percepnet.errors import PercepNetError
from percepnet.recordings import (
    add_file_arguments,
    add_output_arguments,
    controls_of,
    enhance_all,
    in_words,
    jobs_of,
    progress_bar,
)
from percepnet.stream import FrameAdapter, Summary
from percepnet.synthesis import Controls
from service.client.aio import AsyncClient, AsyncLiveStream
from service.client.conversation import Mark, Pace
from service.client.pods import Tls

API_KEY_VARIABLE = "PERCEPNET_API_KEY"

PATIENCE_SECONDS = 3.0
"""Somebody waits for the error, and the port is easily mistyped."""


class ServerError(PercepNetError):
    """The server cannot be reached, or refused."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe `percepnet stream`."""
    parser.description = (
        "Enhance recordings through live streams of a running server, one for each channel. Each output has "
        "its input's sample rate, channels, length and, for PCM, bit depth, and no delay against it."
    )
    add_file_arguments(parser)
    parser.add_argument(
        "--target", default="localhost:50051", metavar="HOST:PORT", help="the server (default: %(default)s)"
    )
    parser.add_argument(
        "--realtime", action="store_true", help="send 10 ms at a time, when they would have been spoken"
    )
    add_output_arguments(parser)
    parser.add_argument("--tls", action="store_true", help="use TLS")
    for option, meaning in (
        ("root-certificates", "PEM file of who may vouch for the server; implies --tls"),
        ("certificate", "PEM file of the own certificate, for mTLS; implies --tls"),
        ("key", "PEM file of its key"),
    ):
        parser.add_argument(f"--{option}", type=Path, metavar="FILE", help=meaning)
    parser.add_argument(
        "--api-key",
        default=os.environ.get(API_KEY_VARIABLE),
        help=f"key that the server asks for (default: {API_KEY_VARIABLE} in the environment)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Enhance every file with live streams."""
    jobs, controls = jobs_of(arguments), controls_of(arguments)
    files = arguments.root_certificates, arguments.certificate, arguments.key
    tls = Tls(*files) if arguments.tls or any(files) else None

    def client() -> AsyncClient:
        return AsyncClient(
            arguments.target, tls=tls, api_key=arguments.api_key, patience_seconds=PATIENCE_SECONDS
        )

    def work(source: Path, target: Path) -> str:
        return _stream(source, target, client(), controls, arguments)

    client()  # refuses at once what is wrong with it
    return enhance_all(jobs, work, arguments)


def _stream(
    source: Path, target: Path, client: AsyncClient, controls: Controls, arguments: argparse.Namespace
) -> str:
    """Send one file, write what comes back; returns what was done."""
    started = time.perf_counter()
    with AudioReader(source) as reader, progress_bar(source) as show:
        encoding = choose_encoding(target, arguments.format, reader)
        talk = _Talk(client, reader, realtime=arguments.realtime)
        with AudioWriter(target, encoding, reader.sample_rate, reader.channels, reader.n_samples) as writer:
            try:
                asyncio.run(talk.run(controls, writer, show))
            except grpc.RpcError as error:
                raise ServerError(f"{arguments.target}: {error.details()} ({error.code().name})") from error
            except socket.gaierror as error:
                raise ServerError(f"{arguments.target}: {error.strerror}") from error
    summary = Summary(
        writer.n_samples,
        reader.channels,
        reader.sample_rate,
        writer.clipped_samples,
        time.perf_counter() - started,
    )
    return f"{in_words(summary)}, {talk.in_words()}"


class _Talk:
    """The streams of one file, which speak and listen together.

    What has more than 48 kHz, the most that a server takes, is resampled on this side.
    """

    def __init__(self, client: AsyncClient, reader: AudioReader, *, realtime: bool) -> None:
        rate = reader.sample_rate
        blocks_per_second = 100 if realtime else 10  # fewer messages cost less
        self._client = client
        self._reader = reader
        self._realtime = realtime
        self._size = rate // blocks_per_second
        self._adapter = FrameAdapter(rate, reader.channels) if rate > SAMPLE_RATE else None
        if self._adapter is not None:
            self._wire_rate, self._step = SAMPLE_RATE, HOP
        else:
            self._wire_rate = rate
            self._step = self._size if self._size * blocks_per_second == rate else 0
        self._streams: list[AsyncLiveStream] = []
        self._n_read = 0
        self._sent: deque[float] = deque()  # when the blocks went out whose answers are not there
        self._took: list[float] = []  # until the answer was there
        self._n_dry = 0  # answers with samples that were not enhanced

    async def run(self, controls: Controls, writer: AudioWriter, show: Callable[[int, int], None]) -> None:
        """Send all blocks, and write what comes back."""
        async with self._client, AsyncExitStack() as opened:
            for _ in range(self._reader.channels):
                stream = self._client.stream(
                    self._wire_rate,
                    controls=controls,
                    message_samples=self._step,
                    never_dry=not self._realtime,
                )
                self._streams.append(await opened.enter_async_context(stream))
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._speak())
                    tasks.create_task(self._listen(writer, show))
            except BaseExceptionGroup as group:
                raise group.exceptions[0] from None

    def in_words(self) -> str:
        """What the streams were like."""
        words = f"{1000 * self._delay_samples / self._reader.sample_rate:.1f} ms of delay taken out"
        if self._realtime:
            median, worst = 1000 * np.quantile(self._took, (0.5, 1))
            words += f", answers after {median:.1f} ms (median) to {worst:.1f} ms"
        if broken := sum(stream.reconnections for stream in self._streams):
            words += f", taken up again {broken} times"
        if self._n_dry:
            words += f"; the server was too slow: {self._n_dry} messages came back without enhancement"
        return words

    @property
    def _delay_samples(self) -> int:
        """Of the output against the input, at the file's rate."""
        return self._adapter.latency_samples if self._adapter else self._streams[0].delay_samples

    async def _speak(self) -> None:
        pace = Pace(self._wire_rate)
        for block in self._blocks():
            if self._realtime:
                await asyncio.sleep(pace.seconds_until_spoken(block[0]))
            self._sent.append(time.perf_counter())
            for stream, samples in zip(self._streams, block, strict=True):
                await stream.send(samples)
        for stream in self._streams:
            await stream.send(Mark.END)

    async def _listen(self, writer: AudioWriter, show: Callable[[int, int], None]) -> None:
        lead_in = self._delay_samples
        while (first := await self._streams[0].receive()) is not None:
            answers = [first, *[await stream.receive() for stream in self._streams[1:]]]
            ready = np.stack([answer.samples for answer in answers if answer])
            self._n_dry += sum(answer.message.audio.dry for answer in answers if answer)
            if self._sent:
                self._took.append(time.perf_counter() - self._sent.popleft())
            if self._adapter is not None:
                ready = self._adapter.from_frames(ready)
            left_out = min(lead_in, ready.shape[1])
            lead_in -= left_out
            writer.write(ready[:, left_out : left_out + self._n_read - writer.n_samples])
            show(writer.n_samples, self._reader.n_samples)

    def _blocks(self) -> Iterator[np.ndarray]:
        """What is sent, (channels, n) float32."""
        for block in self._reader.blocks(self._size):
            n_samples = block.shape[1]
            self._n_read += n_samples
            if self._adapter is not None:
                yield self._adapter.to_frames(block)
            else:
                # Silence fills the last message up, if all must be equally long.
                missing = self._size - n_samples if self._step else 0
                yield np.pad(block, ((0, 0), (0, missing)))
        if self._adapter is not None:
            # The resamplers' tail, and what fills the last frame up.
            missing = self._adapter.latency_samples + 2 * self._size
            yield self._adapter.to_frames(np.zeros((self._reader.channels, missing), np.float32))
