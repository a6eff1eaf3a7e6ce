"""Streaming sample-rate conversion between any two rates: linear phase, exact delay, any chunking."""

import math
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from percepnet import snapshot
from percepnet.errors import ParameterError

MIN_RATE = 8_000
MAX_RATE = 192_000
"""Accepted sample rates in Hz."""

HALF_LENGTH = 26
"""The filter reaches this many samples of the lower rate to each side: 1.6 ms at 16 kHz."""

KAISER_BETA = 8.0
"""80 dB of stopband; with HALF_LENGTH the transition spans 0.45–0.55 of the lower rate."""

MAX_PHASES = 640
"""Filters are tabulated at this many fractions of a sample at most (exact for 11.025 kHz and its multiples);
awkward ratios interpolate between them, 100 dB below the signal, so that no ratio needs a big table."""

PIECE = 1 << 17
"""Products formed at a time: a piece of 0.5 MB stays in the cache and bounds the memory."""


class Resampler:
    """Converts signals in chunks of any length; the samples do not depend on the chunking.

    After n input samples exactly ⌈n·rate_out/rate_in⌉ output samples have been returned, and output sample m
    is the input at the time m/rate_out − delay.

    rate_in, rate_out: Hz. shape: leading shape of the signals, () for one, (n,) for n signals at once.
    delay: seconds, at least the default, which is the shortest; a multiple of 1/(rate_in·rate_out) s apart.
    """

    def __init__(
        self, rate_in: int, rate_out: int, shape: tuple[int, ...] = (), delay: Fraction | None = None
    ) -> None:
        check_rate(rate_in)
        check_rate(rate_out)
        self.delay = shortest_delay(rate_in, rate_out) if delay is None else delay
        if self.delay < shortest_delay(rate_in, rate_out):
            raise ParameterError(f"a delay of {self.delay} s is too short for {rate_in} to {rate_out} Hz")
        ratio = Fraction(rate_out, rate_in)
        self._up, self._down = ratio.numerator, ratio.denominator
        self._reach = _reach(rate_in, rate_out)
        delay_in_phases = self.delay * rate_in * self._up
        if delay_in_phases.denominator != 1:
            raise ParameterError(f"a delay of {self.delay} s lies between the phases of the filter")
        # What a longer delay leaves to wait for although the filter has its input, in phases.
        self._spare = int(delay_in_phases) - self._reach * self._up
        prefill = math.ceil(self.delay * rate_in)
        # The silence before the first sample, then the input that later outputs still need.
        self._buffer = np.zeros((*shape, prefill + self._reach - 1), np.float32)
        # Where the next output's filter starts in the buffer, in phases (1/up of an input sample).
        self._position = prefill * self._up - int(delay_in_phases)

    def push(self, samples: np.ndarray) -> np.ndarray:
        """Convert one chunk.

        samples: (…, n) float32, any n ≥ 0. Returns what became ready, (…, m) float32.
        """
        buffer = np.concatenate([self._buffer, samples], axis=-1, dtype=np.float32)
        taps = 2 * self._reach
        last_start = (buffer.shape[-1] - taps + 1) * self._up - 1 - self._spare
        count = max(0, (last_start - self._position) // self._down + 1)
        output = np.empty((*buffer.shape[:-1], count), np.float32)
        windows = sliding_window_view(buffer, taps, axis=-1) if count else buffer
        step = max(1, PIECE * buffer.shape[-1] // (taps * max(1, buffer.size)))
        for first in range(0, count, step):
            outputs = np.arange(first, min(first + step, count))
            starts, phases = np.divmod(self._position + outputs * self._down, self._up)
            # einsum without `optimize` sums each output in one fixed order and never calls BLAS.
            np.einsum(
                "...mk,mk->...m",
                windows[..., starts, :],
                self._coefficients(phases),
                out=output[..., outputs[0] : outputs[-1] + 1],
            )
        self._position += count * self._down
        consumed = self._position // self._up
        self._position -= consumed * self._up
        self._buffer = buffer[..., consumed:].copy()
        return output

    def save(self) -> snapshot.Arrays:
        """The memory, for `restore`."""
        return {"buffer": self._buffer, "position": np.array(self._position)}

    def restore(self, arrays: snapshot.Arrays, name: str) -> None:
        """Go on from the memory, saved as `name`, of one between the same rates; raises SnapshotError."""
        self._buffer = snapshot.take(arrays, f"{name}.buffer", np.float32, *self._buffer.shape[:-1], None)
        self._position = int(snapshot.take(arrays, f"{name}.position", np.int64))

    def _coefficients(self, phases: np.ndarray) -> np.ndarray:
        """Filters (m, taps) for fractions phases/up of an input sample."""
        table = _filters(self._up, self._down, self._reach)
        if self._up <= MAX_PHASES:
            return table[phases]
        place = phases * (MAX_PHASES / self._up)
        left = place.astype(np.intp)
        fraction = (place - left).astype(np.float32)[:, np.newaxis]
        return table[left] + fraction * (table[left + 1] - table[left])


def shortest_delay(rate_in: int, rate_out: int) -> Fraction:
    """The delay in seconds that the filter between two rates needs."""
    return Fraction(_reach(rate_in, rate_out), rate_in)


def check_rate(rate: int) -> None:
    """Raise ParameterError unless the rate is a whole number of Hz from MIN_RATE to MAX_RATE."""
    if not isinstance(rate, int | np.integer) or not MIN_RATE <= rate <= MAX_RATE:
        raise ParameterError(f"a sample rate of {rate!r} Hz; accepted are whole {MIN_RATE} to {MAX_RATE} Hz")


def _reach(rate_in: int, rate_out: int) -> int:
    """Input samples that the filter covers to each side."""
    return max(HALF_LENGTH, math.ceil(HALF_LENGTH * Fraction(rate_in, rate_out)))


@lru_cache(maxsize=64)
def _filters(up: int, down: int, reach: int) -> np.ndarray:
    """Low-pass filters (phases + 1, 2·reach), one a row, each a fraction of an input sample further."""
    phases = min(up, MAX_PHASES)
    # Written out: importing scipy.signal for its firwin takes 0.6 s and 50 MB.
    place = np.arange(-reach * phases, reach * phases + 1) / phases
    prototype = np.sinc(min(1, up / down) * place) * np.kaiser(len(place), KAISER_BETA)
    prototype /= prototype.sum()
    rows = np.stack([prototype[phases - p :: phases][: 2 * reach] for p in range(phases + 1)])
    return np.ascontiguousarray(phases * rows, np.float32)
