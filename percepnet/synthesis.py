"""From band gains and comb strengths to enhanced samples: the half of the signal path after the network."""

from dataclasses import dataclass

import numpy as np

from percepnet import postfilter, stft
from percepnet.analysis import Analysis
from percepnet.bands import band_energy, to_bins
from percepnet.errors import ParameterError


@dataclass(frozen=True)
class Controls:
    """What a caller may choose.

    attenuation_limit_db: noise is lowered by at most this much (≥ 0); None for no limit.
    mix: 0 gives the input (delayed), 1 the enhanced signal.
    postfilter: sharpen the gains; less residual noise.
    Raises ParameterError for a number out of range.
    """

    attenuation_limit_db: float | None = None
    mix: float = 1.0
    postfilter: bool = True

    def __post_init__(self) -> None:
        limit = self.attenuation_limit_db
        if limit is not None and not limit >= 0:
            raise ParameterError(f"an attenuation limit of {limit} dB; accepted are 0 dB and more, or None")
        if not 0 <= self.mix <= 1:
            raise ParameterError(f"a mix of {self.mix}; accepted are 0 (input) to 1 (enhanced)")

    @property
    def wet(self) -> float:
        """Share of the enhanced spectrum in the output; the rest is the input."""
        limit = self.attenuation_limit_db
        return self.mix if limit is None else self.mix * (1 - 10 ** (-limit / 20))


def synthesize(
    analysis: Analysis, gains: np.ndarray, strengths: np.ndarray, overlap: np.ndarray, controls: Controls
) -> tuple[np.ndarray, np.ndarray]:
    """Comb-mix, gain, postfilter, and back to samples.

    gains, strengths: (streams, frames, 34) float32 in [0, 1]; overlap: (streams, 480). Returns the samples
    (streams, frames·480) float32, one hop late, and the new overlap.
    """
    mixed = analysis.noisy + to_bins(strengths) * (analysis.comb - analysis.noisy)
    if controls.postfilter:
        gains = postfilter.sharpen(gains, analysis.energy)
    enhanced = mixed * to_bins(gains * restoration(analysis.energy, band_energy(mixed)))
    if controls.wet != 1:
        enhanced = analysis.noisy + np.float32(controls.wet) * (enhanced - analysis.noisy)
    return stft.inverse(enhanced, overlap)


def restoration(energy: np.ndarray, mixed_energy: np.ndarray) -> np.ndarray:
    """Amplitude factor that gives each band of the comb mix the energy it had in the input ([P] 2.3)."""
    tiny = np.float32(1e-12)
    return np.sqrt((energy + tiny) / (mixed_energy + tiny))
