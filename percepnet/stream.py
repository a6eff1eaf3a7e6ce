"""Enhancement of live streams, arrays and files at any sample rate, all through one path."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np

from percepnet import snapshot
from percepnet.audio import AudioReader, AudioWriter, choose_encoding
from percepnet.constants import HOP, LATENCY_SAMPLES, SAMPLE_RATE
from percepnet.enhancer import Enhancer
from percepnet.errors import ParameterError
from percepnet.resample import Resampler, check_rate, shortest_delay
from percepnet.samples import usable
from percepnet.synthesis import Controls

BLOCK_FRAMES = 200
"""Frames enhanced at once in arrays and files, over all channels together; bounds the memory."""

MAX_CHANNELS = 64
"""Of an array: more are samples, in an array whose axes are swapped."""


class FrameAdapter:
    """Between callers at any sample rate and whole 10 ms frames at 48 kHz, for streams that run together.

    The samples it returns are `latency_samples` late, once an enhancer has stood between its two methods.
    """

    def __init__(self, sample_rate: int, n_streams: int) -> None:
        check_rate(sample_rate)
        self.latency_samples = LATENCY_SAMPLES
        self._to_48k = self._from_48k = None
        if sample_rate != SAMPLE_RATE:
            self._to_48k = Resampler(sample_rate, SAMPLE_RATE, (n_streams,))
            before = self._to_48k.delay + Fraction(LATENCY_SAMPLES, SAMPLE_RATE)
            total = before + shortest_delay(SAMPLE_RATE, sample_rate)
            # The way back waits the fraction of a sample that makes the total whole.
            self.latency_samples = math.ceil(total * sample_rate)
            delay = Fraction(self.latency_samples, sample_rate) - before
            self._from_48k = Resampler(SAMPLE_RATE, sample_rate, (n_streams,), delay)
        self._rest = self._nothing = np.zeros((n_streams, 0), np.float32)

    def to_frames(self, samples: np.ndarray) -> np.ndarray:
        """Turn (streams, n) float32 at the callers' rate into whole frames, (streams, frames·480)."""
        if self._to_48k is not None:
            samples = self._to_48k.push(samples)
        if self._rest.size:
            samples = np.concatenate([self._rest, samples], axis=1)
        whole = samples.shape[1] // HOP * HOP
        if whole == samples.shape[1]:
            self._rest = self._nothing
            return samples
        self._rest = samples[:, whole:].copy()
        return samples[:, :whole]

    def from_frames(self, samples: np.ndarray) -> np.ndarray:
        """Turn enhanced frames, (streams, frames·480) float32, into samples at the callers' rate."""
        return samples if self._from_48k is None else self._from_48k.push(samples)

    def save(self, name: str) -> snapshot.Arrays:
        """The memory by names that begin with `name`, for `restore`."""
        arrays = {f"{name}.rest": self._rest}
        for part, resampler in self._resamplers.items():
            arrays |= snapshot.flatten(resampler.save(), f"{name}.{part}")
        return arrays

    def restore(self, arrays: snapshot.Arrays, name: str) -> None:
        """Go on from the memory, saved as `name`, of one for as many streams; raises SnapshotError."""
        self._rest = snapshot.take(arrays, f"{name}.rest", np.float32, len(self._rest), None)
        for part, resampler in self._resamplers.items():
            resampler.restore(arrays, f"{name}.{part}")

    @property
    def _resamplers(self) -> dict[str, Resampler]:
        if self._to_48k is None or self._from_48k is None:
            return {}
        return {"to_48k": self._to_48k, "from_48k": self._from_48k}


class _Streams:
    """Streams of one sample rate that run together; (streams, n) float32 in and out."""

    def __init__(
        self, n_streams: int, sample_rate: int, controls: Controls, enhancer: Enhancer | None
    ) -> None:
        self.controls = controls
        self._adapter = FrameAdapter(sample_rate, n_streams)
        self._enhancer = enhancer or bundled_enhancer()
        self._state = self._enhancer.initial_state(n_streams)
        self._sample_rate = sample_rate
        self._shape = (n_streams, math.ceil(sample_rate * HOP / SAMPLE_RATE))
        self._n_in = self._n_out = 0
        self._ended = False
        self.latency_samples = self._adapter.latency_samples

    def push(self, samples: np.ndarray) -> np.ndarray:
        """Take a chunk, return what is ready."""
        if self._ended:
            raise ParameterError("the stream was flushed and has ended; begin a new one")
        frames = self._adapter.to_frames(usable(samples))
        if frames.shape[1]:
            frames, self._state = self._enhancer.process(frames, self._state, self.controls)
        ready = self._adapter.from_frames(frames)
        self._n_in += samples.shape[1]
        self._n_out += ready.shape[1]
        return ready

    def flush(self) -> np.ndarray:
        """Return the tail: all that is missing to as many samples as came in, plus the latency."""
        missing = self._n_in + self.latency_samples - self._n_out
        n_streams, hop = self._shape
        # A hop of silence rounds the last frame up, one more covers the rounding between the rates.
        tail = self.push(np.zeros((n_streams, self.latency_samples + 2 * hop), np.float32))
        self._ended = True
        return tail[:, :missing]

    def save(self) -> bytes:
        """A snapshot."""
        if self._ended:
            raise ParameterError("the stream was flushed and has ended; nothing is left to save")
        arrays = {
            "sample_rate": np.array(self._sample_rate),
            "counts": np.array([self._n_in, self._n_out]),
            **self._adapter.save("adapter"),
            **snapshot.flatten(self._state, "path"),
        }
        return snapshot.pack(arrays, self._enhancer.model.manifest.sha256)

    @classmethod
    def restore(cls, data: bytes, n_streams: int, controls: Controls, enhancer: Enhancer | None) -> Self:
        """As many streams as were saved, at the point where they were."""
        enhancer = enhancer or bundled_enhancer()
        arrays = snapshot.unpack(data, enhancer.model.manifest.sha256)
        streams = cls(n_streams, int(snapshot.take(arrays, "sample_rate", np.int64)), controls, enhancer)
        streams._n_in, streams._n_out = snapshot.take(arrays, "counts", np.int64, 2).tolist()
        streams._adapter.restore(arrays, "adapter")
        streams._state = snapshot.take_state(arrays, "path", streams._state)
        snapshot.finish(arrays)
        return streams


class Stream:
    """One live mono caller.

    sample_rate: 8000 to 192000 Hz. controls: what the caller chose. enhancer: the engine, shared by any
    number of streams; None for the bundled model. Raises ParameterError for a rate outside the range.
    """

    def __init__(
        self,
        sample_rate: int = SAMPLE_RATE,
        *,
        controls: Controls = Controls(),
        enhancer: Enhancer | None = None,
    ) -> None:
        self._streams = _Streams(1, sample_rate, controls, enhancer)

    @property
    def latency_samples(self) -> int:
        """Samples at the caller's rate by which output sample i lags behind input sample i."""
        return self._streams.latency_samples

    @property
    def controls(self) -> Controls:
        """What the caller chose; new ones apply from the next frame on.

        Frames overlap, so that a change is faded over in 10 ms.
        """
        return self._streams.controls

    @controls.setter
    def controls(self, controls: Controls) -> None:
        self._streams.controls = controls

    def push(self, samples: np.ndarray) -> np.ndarray:
        """Take the next samples and return those that are ready.

        samples: (n,) float32 or float64, full scale ±1, any n; NaN and infinities count as silence. Returns
        (m,) float32; m may be 0. The first `latency_samples` samples of a stream are its lead-in.
        How a stream is cut into chunks does not change its samples. Raises ParameterError for other types
        and shapes, and after `flush`.
        """
        chunk = _floats(samples)
        if chunk.ndim != 1:
            raise ParameterError(f"samples of shape {chunk.shape}; a stream takes one channel, shape (n,)")
        return self._streams.push(chunk[np.newaxis])[0]

    def flush(self) -> np.ndarray:
        """End the stream and return its tail.

        All outputs together then have `latency_samples` more samples than all inputs. Raises ParameterError
        when called twice.
        """
        return self._streams.flush()[0]

    def save(self) -> bytes:
        """Return a snapshot, some 50 kB, from which `restore` goes on; the stream itself may go on too.

        It holds the last 0.11 s of audio. Raises ParameterError after `flush`.
        """
        return self._streams.save()

    @classmethod
    def restore(
        cls, data: bytes, *, controls: Controls = Controls(), enhancer: Enhancer | None = None
    ) -> Self:
        """Make a stream that goes on where another one was saved, sample for sample.

        data: the snapshot, made by the same version with the same model. controls: of the saved stream, or
        new ones, from the next frame on. Raises SnapshotError.
        """
        stream = cls(enhancer=enhancer)
        stream._streams = _Streams.restore(data, 1, controls, enhancer)
        return stream


def enhance(
    samples: np.ndarray,
    sample_rate: int,
    *,
    controls: Controls = Controls(),
    enhancer: Enhancer | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Enhance a whole recording, with no delay against the input; each channel on its own.

    samples: (n,) or (n, channels) float32 or float64, full scale ±1, up to 64 channels; NaN and infinities
    count as silence. sample_rate: 8000 to 192000 Hz. progress: called after each block with the samples done
    and the samples expected; may raise to stop. Returns float32 of the same shape. Raises ParameterError.
    """
    signal = _floats(samples)
    if signal.ndim not in (1, 2) or (signal.ndim == 2 and not 1 <= signal.shape[1] <= MAX_CHANNELS):
        raise ParameterError(
            f"samples of shape {signal.shape}; accepted are (n,) and (n, channels) of 1 to {MAX_CHANNELS} "
            "channels"
        )
    channels = signal[np.newaxis] if signal.ndim == 1 else signal.T
    streams = _Streams(len(channels), sample_rate, controls, enhancer)
    size = block_length(sample_rate, len(channels))
    blocks = (channels[:, i : i + size] for i in range(0, channels.shape[1], size))
    output = np.empty(signal.shape, np.float32)
    by_channel = output[np.newaxis] if signal.ndim == 1 else output.T
    done = 0
    for block in _aligned(blocks, streams):
        by_channel[:, done : done + block.shape[1]] = block
        done += block.shape[1]
        if progress is not None:
            progress(done, len(signal))
    return output


@dataclass(frozen=True)
class Summary:
    """What was done to a file."""

    n_samples: int
    """Per channel, in the input and in the output."""
    channels: int
    sample_rate: int
    clipped_samples: int
    """Output samples, over all channels, saturated where the file's encoding ends at full scale."""
    processing_seconds: float
    """Wall-clock time, decoding and encoding included."""

    @property
    def seconds(self) -> float:
        """Duration of the audio."""
        return self.n_samples / self.sample_rate

    @property
    def real_time_factor(self) -> float:
        """Processing time per second of audio."""
        return self.processing_seconds / self.seconds


def enhance_file(
    source: str | Path | BinaryIO,
    target: str | Path | BinaryIO,
    *,
    controls: Controls = Controls(),
    enhancer: Enhancer | None = None,
    format: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Enhance a file block by block, in bounded memory, with no delay against the input.

    source: WAV, FLAC, Ogg (Vorbis, Opus) or MP3: a path or a seekable binary file.
    target: a path, replaced only when all went well, or a seekable binary file. It gets the same sample rate,
        channels, length and, for PCM, bit depth.
    format: "wav", "flac", "ogg" or "opus"; None goes by the target's suffix, or is "wav" for a binary file.
    progress: called after each block with the samples done and the samples expected; may raise to stop.
    Raises AudioError, ParameterError, OSError.
    """
    started = time.perf_counter()
    with AudioReader(source) as reader:
        encoding = choose_encoding(target, format, reader)
        streams = _Streams(reader.channels, reader.sample_rate, controls, enhancer)
        blocks = reader.blocks(block_length(reader.sample_rate, reader.channels))
        with AudioWriter(target, encoding, reader.sample_rate, reader.channels, reader.n_samples) as writer:
            for block in _aligned(blocks, streams):
                writer.write(block)
                if progress is not None:
                    progress(writer.n_samples, reader.n_samples)
    return Summary(
        writer.n_samples,
        reader.channels,
        reader.sample_rate,
        writer.clipped_samples,
        time.perf_counter() - started,
    )


@lru_cache(maxsize=1)
def bundled_enhancer() -> Enhancer:
    """The enhancer around the bundled model, loaded once."""
    return Enhancer()


def block_length(sample_rate: int, channels: int) -> int:
    """Samples per channel that are enhanced at once."""
    return math.ceil(sample_rate * HOP / SAMPLE_RATE) * max(1, BLOCK_FRAMES // channels)


def _aligned(blocks: Iterable[np.ndarray], streams: _Streams) -> Iterator[np.ndarray]:
    """Enhance blocks (streams, n) and drop the latency: as many samples out as in."""
    lead_in = streams.latency_samples
    for ready in _pushed(blocks, streams):
        yield ready[:, lead_in:]
        lead_in = max(0, lead_in - ready.shape[1])


def _pushed(blocks: Iterable[np.ndarray], streams: _Streams) -> Iterator[np.ndarray]:
    """Enhance blocks (streams, n), then the tail."""
    for block in blocks:
        yield streams.push(block)
    yield streams.flush()


def _floats(samples: np.ndarray) -> np.ndarray:
    """The samples as an array, if they are float32 or float64."""
    array = np.asarray(samples)
    if array.dtype not in (np.float32, np.float64):
        raise ParameterError(
            f"samples of type {array.dtype}; accepted are float32 and float64 with full scale ±1 "
            "(divide 16-bit integers by 32768)"
        )
    return array
