"""From band gains and comb strengths to enhanced samples: the half of the signal path after the network."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from percepnet import postfilter, stft
from percepnet.analysis import Analysis
from percepnet.bands import band_energy, to_bins
from percepnet.errors import ParameterError

MAX_ATTENUATION_LIMIT_DB = 100.0
"""Leaves of noise at full scale less than 16-bit samples can hold."""


@dataclass(frozen=True)
class Controls:
    """What a caller may choose.

    attenuation_limit_db: noise is lowered by at most this much, 0 to 100 dB; 100 dB is as good as no limit.
    mix: 0 gives the input (delayed), 1 the enhanced signal.
    postfilter: how far the gains are sharpened, 0 (off) to 1 (full): less residual noise.
    Raises ParameterError for a number out of range.
    """

    attenuation_limit_db: float = 40.0
    mix: float = 1.0
    postfilter: float = 1.0

    def __post_init__(self) -> None:
        for name, most in (("attenuation_limit_db", MAX_ATTENUATION_LIMIT_DB), ("mix", 1), ("postfilter", 1)):
            value = getattr(self, name)
            if not 0 <= value <= most:
                raise ParameterError(f"{name}: {value:g}; accepted are 0 to {most:g}")

    @property
    def wet(self) -> float:
        """Share of the enhanced spectrum in the output; the rest is the input."""
        return self.mix * (1 - 10 ** (-self.attenuation_limit_db / 20))


@dataclass(frozen=True)
class FrameControls:
    """Controls that differ between streams and move from frame to frame.

    wet: share of the enhanced spectrum, float32 in [0, 1], (streams, frames), or 1 for all on either axis.
    sharpening: share of the postfiltered gains, the rest is plain; float32 in [0, 1], like `wet`.
    """

    wet: np.ndarray
    sharpening: np.ndarray

    @classmethod
    def of(cls, controls: "Controls | FrameControls") -> "FrameControls":
        """Controls of either kind; those that do not differ have the shape (1, 1)."""
        return controls if isinstance(controls, cls) else _constant(controls)


@lru_cache(maxsize=64)
def _constant(controls: Controls) -> FrameControls:
    return FrameControls(
        np.full((1, 1), controls.wet, np.float32), np.full((1, 1), controls.postfilter, np.float32)
    )


def synthesize(
    analysis: Analysis,
    gains: np.ndarray,
    strengths: np.ndarray,
    overlap: np.ndarray,
    controls: Controls | FrameControls,
) -> tuple[np.ndarray, np.ndarray]:
    """Comb-mix, gain, postfilter, and back to samples.

    gains, strengths: (streams, frames, 34) float32 in [0, 1]; overlap: (streams, 480). Returns the samples
    (streams, frames·480) float32, one hop late, and the new overlap.
    """
    controls = FrameControls.of(controls)
    mixed = analysis.comb - analysis.noisy
    mixed *= to_bins(strengths)
    mixed += analysis.noisy
    if controls.sharpening.any():
        share = controls.sharpening[..., np.newaxis]
        gains = share * postfilter.sharpen(gains, analysis.energy) + (1 - share) * gains
    wet = controls.wet[..., np.newaxis]
    mixed *= to_bins(gains * restoration(analysis.energy, band_energy(mixed)) * wet)
    if wet.min() < 1:
        dry = analysis.noisy.view(np.float32) * (1 - wet)  # real times real
        mixed += dry.view(np.complex64)
    return stft.inverse(mixed, overlap)


def restoration(energy: np.ndarray, mixed_energy: np.ndarray) -> np.ndarray:
    """Amplitude factor that gives each band of the comb mix the energy it had in the input ([P] 2.3)."""
    tiny = np.float32(1e-12)
    return np.sqrt((energy + tiny) / (mixed_energy + tiny))
