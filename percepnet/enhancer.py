"""The block diagram: samples in, enhanced samples out, 30 ms later, for many streams at once."""

from dataclasses import dataclass

import numpy as np

from percepnet import postfilter, stft
from percepnet.analysis import Analysis, AnalysisState, analyze
from percepnet.bands import band_energy, to_bins
from percepnet.constants import HOP
from percepnet.features import normalize
from percepnet.model import Model


@dataclass(frozen=True)
class Controls:
    """What a caller may choose.

    attenuation_limit_db: noise is lowered by at most this much (≥ 0); None for no limit.
    mix: 0 gives the input (delayed), 1 the enhanced signal.
    postfilter: sharpen the gains; less residual noise.
    """

    attenuation_limit_db: float | None = None
    mix: float = 1.0
    postfilter: bool = True

    @property
    def wet(self) -> float:
        """Share of the enhanced spectrum in the output; the rest is the input."""
        limit = self.attenuation_limit_db
        return self.mix if limit is None else self.mix * (1 - 10 ** (-limit / 20))


@dataclass
class EnhancerState:
    """Memory of the signal path, one row per stream."""

    analysis: AnalysisState
    network: dict[str, np.ndarray]
    overlap: np.ndarray
    """Second half of the last synthesis window, float32 (streams, 480)."""


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


class Enhancer:
    """The signal path around one model; immutable and shared by all streams, whose memory is the state."""

    def __init__(self, model: Model | None = None) -> None:
        self.model = model or Model.load()

    def initial_state(self, n_streams: int) -> EnhancerState:
        """The memory of streams that have heard nothing yet."""
        return EnhancerState(
            AnalysisState.initial(n_streams),
            self.model.initial_state(n_streams),
            np.zeros((n_streams, HOP), np.float32),
        )

    def process(
        self, samples: np.ndarray, state: EnhancerState, controls: Controls = Controls()
    ) -> tuple[np.ndarray, EnhancerState]:
        """Enhance whole frames of every stream.

        samples: (streams, frames·480) float32 at 48 kHz, full scale ±1, finite. Returns as many samples,
        `LATENCY_SAMPLES` late, and the new state; the given one stays as it was.
        """
        manifest = self.model.manifest
        analysis, analysis_state = analyze(samples, state.analysis)
        network_input = normalize(analysis.features, manifest.feature_mean, manifest.feature_scale)
        gains, strengths, network_state = self.model.step(network_input, state.network)
        enhanced, overlap = synthesize(analysis, gains, strengths, state.overlap, controls)
        return enhanced, EnhancerState(analysis_state, network_state, overlap)
