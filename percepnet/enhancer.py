"""The block diagram: samples in, enhanced samples out, 30 ms later, for many streams at once."""

from dataclasses import dataclass

import numpy as np

from percepnet.analysis import AnalysisState, analyze
from percepnet.constants import HOP
from percepnet.features import normalize
from percepnet.model import Model
from percepnet.synthesis import Controls, synthesize


@dataclass
class EnhancerState:
    """Memory of the signal path, one row per stream."""

    analysis: AnalysisState
    network: dict[str, np.ndarray]
    overlap: np.ndarray
    """Second half of the last synthesis window, float32 (streams, 480)."""


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
