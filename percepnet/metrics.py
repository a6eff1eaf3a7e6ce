"""Measures of enhanced speech against its clean reference, on 16 kHz mono signals (n,) of equal length.

A measure that is not defined for a signal, such as PESQ where no speech is found, is NaN.
PESQ and ESTOI need the `measure` extra.
"""

import math
import warnings
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from percepnet.report import need
from percepnet.resample import Resampler, shortest_delay

RATE = 16_000
"""Sample rate of all measures in Hz: that of wide-band PESQ."""

_TINY = 1e-12
_WORST_PESQ = 1.04
_PAUSE_FRAME = RATE // 50
_INAUDIBLE = 1e-8  # 80 dB below speech: digital silence must not rule a mean


class Scores(NamedTuple):
    """How one signal, or the mean over several, compares with its clean reference."""

    pesq: float
    """PESQ-WB, 1.04 to 4.64."""
    estoi: float
    """Extended STOI, up to 1."""
    si_sdr: float
    """Scale-invariant signal-to-distortion ratio in dB."""
    level: float
    """RMS level over that of the reference, in dB."""
    pauses: float
    """RMS level where the reference pauses over that of the reference, in dB: what is left of the noise."""

    def cells(self) -> list[str]:
        """The scores as table cells under `HEADINGS`."""
        fidelity = [f"{self.pesq:.3f}", f"{self.estoi:.3f}", f"{self.si_sdr:.2f}"]
        return [*fidelity, f"{self.level:+.2f}", f"{self.pauses:.2f}"]


HEADINGS = ["PESQ-WB", "ESTOI", "SI-SDR dB", "level dB", "pauses dB"]


def score(clean: np.ndarray, estimate: np.ndarray, sample_rate: int) -> Scores:
    """Compare a signal with its clean reference.

    clean, estimate: (n,) float32 at `sample_rate` Hz, without delay against each other.
    """
    reference, degraded = (resampled(signal, sample_rate, RATE) for signal in (clean, estimate))
    return Scores(
        pesq_wb(reference, degraded),
        estoi(reference, degraded),
        si_sdr(reference, degraded),
        level_difference(reference, degraded),
        pause_level(reference, degraded),
    )


def mean(scores: Sequence[Scores]) -> Scores:
    """Mean of each measure over the clips for which it is defined."""
    columns = [[value for value in column if not math.isnan(value)] for column in zip(*scores, strict=True)]
    return Scores(*(math.fsum(column) / len(column) if column else math.nan for column in columns))


def pesq_wb(clean: np.ndarray, estimate: np.ndarray) -> float:
    """Wide-band PESQ, the predicted mean opinion score (ITU-T P.862.2)."""
    pesq = need("pesq")
    if not clean.any():
        return math.nan
    try:
        return float(pesq.pesq(RATE, clean, estimate, "wb"))
    except pesq.PesqError:  # no speech found, or less than a quarter of a second
        return math.nan
    except ValueError:  # the level of an estimate without any speech cannot be adjusted
        return _WORST_PESQ


def estoi(clean: np.ndarray, estimate: np.ndarray) -> float:
    """Extended short-time objective intelligibility (Jensen and Taal 2016)."""
    pystoi = need("pystoi")
    if not clean.any():
        return math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        try:
            return float(pystoi.stoi(clean, estimate, RATE, extended=True))
        except RuntimeWarning:  # less than 0.4 s of speech
            return math.nan


def si_sdr(clean: np.ndarray, estimate: np.ndarray) -> float:
    """Scale-invariant signal-to-distortion ratio in dB of the zero-mean signals (Le Roux et al. 2019)."""
    if not clean.any():
        return math.nan
    reference, degraded = (signal - signal.mean(dtype=np.float64) for signal in (clean, estimate))
    target = (degraded @ reference) / (reference @ reference + _TINY) * reference
    error = degraded - target
    return float(10 * np.log10((target @ target + _TINY**2) / (error @ error + _TINY)))


def level_difference(clean: np.ndarray, estimate: np.ndarray) -> float:
    """RMS level of the estimate over that of the reference, in dB."""
    if not clean.any():
        return math.nan
    energies = [np.square(signal, dtype=np.float64).sum() + _TINY for signal in (estimate, clean)]
    return float(10 * np.log10(energies[0] / energies[1]))


def pause_level(clean: np.ndarray, estimate: np.ndarray) -> float:
    """RMS level of the estimate over that of the reference, in dB, where the reference pauses.

    Pauses are its frames of 20 ms more than 30 dB below its mean; NaN if they make less than 0.2 s.
    """
    frames = len(clean) // _PAUSE_FRAME
    energy, left = (
        np.square(signal[: frames * _PAUSE_FRAME], dtype=np.float64).reshape(frames, -1).mean(axis=1)
        for signal in (clean, estimate)
    )
    whole = np.mean(np.square(clean, dtype=np.float64))
    paused = energy < 1e-3 * whole
    if paused.sum() * _PAUSE_FRAME < 0.2 * RATE:
        return math.nan
    return float(10 * np.log10(left[paused].mean() / whole + _INAUDIBLE))


def resampled(samples: np.ndarray, rate_in: int, rate_out: int) -> np.ndarray:
    """Convert a whole signal (n,) to another rate, (⌈n·rate_out/rate_in⌉,) float32, without delay."""
    if rate_in == rate_out:
        return samples
    late = math.ceil(shortest_delay(rate_in, rate_out) * rate_out)
    delay = Fraction(late, rate_out)
    resampler = Resampler(rate_in, rate_out, delay=delay)
    output = resampler.push(np.concatenate([samples, np.zeros(math.ceil(delay * rate_in), np.float32)]))
    return output[late : late + math.ceil(Fraction(len(samples) * rate_out, rate_in))]
