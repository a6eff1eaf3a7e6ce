"""The block diagram: samples in, enhanced samples out, 30 ms later, for many streams at once."""

from dataclasses import dataclass

import numpy as np

from percepnet import native, rows, stft
from percepnet.analysis import AnalysisState, analyze, follow
from percepnet.bands import band_centres_hz
from percepnet.constants import HOP, LATENCY_SAMPLES, SAMPLE_RATE
from percepnet.features import normalize
from percepnet.model import Model
from percepnet.synthesis import Controls, FrameControls, synthesize


@dataclass
class EnhancerState:
    """Memory of the signal path, one row per stream."""

    analysis: AnalysisState
    network: dict[str, np.ndarray]
    overlap: np.ndarray
    """Second half of the last synthesis window, float32 (streams, 480)."""


_CENTRES_HZ = band_centres_hz()
_SPEECH_BANDS = (_CENTRES_HZ >= 300) & (_CENTRES_HZ <= 4000)
_VOICED = 0.3  # pitch correlation from which a frame counts as periodic
_SILENCE = np.float32(1e-4)  # energy of the speech bands below which there is nothing to judge


@dataclass(frozen=True)
class Findings:
    """What the signal path found out about each frame that it enhanced."""

    energy: np.ndarray
    """Band energies of the input, float32 (streams, frames, 34)."""
    gains: np.ndarray
    """Band gains that the network chose, float32 in [0, 1], (streams, frames, 34)."""
    strengths: np.ndarray
    """Comb strengths, likewise."""
    period: np.ndarray
    """Pitch periods in samples at 48 kHz, int (streams, frames)."""
    correlation: np.ndarray
    """Pitch correlation, float32 in [0, 1], (streams, frames)."""

    @property
    def speech_probability(self) -> np.ndarray:
        """Share of the energy from 300 Hz to 4 kHz that is speech by the gains; float32 (streams, frames)."""
        energy = self.energy[..., _SPEECH_BANDS]
        speech = (self.gains[..., _SPEECH_BANDS] ** 2 * energy).sum(axis=-1)
        return speech / np.maximum(energy.sum(axis=-1), _SILENCE)

    @property
    def pitch_hz(self) -> np.ndarray:
        """Fundamental frequency, 0 where the frame is not periodic; float32 (streams, frames)."""
        return np.where(self.correlation < _VOICED, 0, SAMPLE_RATE / self.period).astype(np.float32)

    @property
    def mean_gain(self) -> np.ndarray:
        """Mean of the band gains; float32 (streams, frames)."""
        return self.gains.mean(axis=-1)


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
        self, samples: np.ndarray, state: EnhancerState, controls: Controls | FrameControls = Controls()
    ) -> tuple[np.ndarray, EnhancerState]:
        """Enhance whole frames of every stream.

        samples: (streams, frames·480) float32 at 48 kHz, full scale ±1, finite. Returns as many samples,
        `LATENCY_SAMPLES` late, and the new state; the given one stays as it was.
        """
        state = rows.copy(state)
        enhanced, _ = self.advance(samples, state, slice(None), controls)
        return enhanced, state

    def advance(
        self,
        samples: np.ndarray,
        state: EnhancerState,
        chosen: rows.Rows,
        controls: Controls | FrameControls = Controls(),
    ) -> tuple[np.ndarray, Findings]:
        """Enhance whole frames of some streams, whose rows of the state go on in place.

        samples: as for `process`; state: contiguous; chosen: the rows, in the same order. Returns as many
        samples, and what was found in the frames.
        """
        path = self._compiled_path if native.AVAILABLE else self._path
        return path(samples, state, chosen, FrameControls.of(controls))

    def _path(
        self, samples: np.ndarray, state: EnhancerState, chosen: rows.Rows, controls: FrameControls
    ) -> tuple[np.ndarray, Findings]:
        manifest, before = self.model.manifest, rows.take(state, chosen)
        analysis, analysis_state = analyze(samples, before.analysis)
        network_input = normalize(analysis.features, manifest.feature_mean, manifest.feature_scale)
        gains, strengths, network_state = self.model.step(network_input, before.network)
        enhanced, overlap = synthesize(analysis, gains, strengths, before.overlap, controls)
        rows.put(state, chosen, EnhancerState(analysis_state, network_state, overlap))
        return enhanced, Findings(analysis.energy, gains, strengths, analysis.period, analysis.correlation)

    def _compiled_path(
        self, samples: np.ndarray, state: EnhancerState, chosen: rows.Rows, controls: FrameControls
    ) -> tuple[np.ndarray, Findings]:
        manifest, numbers = self.model.manifest, np.arange(len(state.overlap), dtype=np.int64)[chosen]
        analysis = native.analyze(
            samples, state.analysis, numbers, manifest.feature_mean, manifest.feature_scale
        )
        network_state = rows.take(state.network, chosen)
        gains, strengths, network_state = self.model.step(analysis.features, network_state)
        rows.put(state.network, chosen, network_state)
        enhanced = native.synthesize(analysis, gains, strengths, state.overlap, numbers, controls)
        return enhanced, Findings(analysis.energy, gains, strengths, analysis.period, analysis.correlation)

    def bypass(self, samples: np.ndarray, state: EnhancerState) -> tuple[np.ndarray, EnhancerState]:
        """Pass whole frames of every stream on as they came, at a fraction of the cost of enhancing them.

        samples, returns: as for `process`. The overlap-add fades over from what was enhanced in the first
        10 ms, and back in those of the next call of `process`. The network does not hear these frames: it
        goes on from the last one that was enhanced.
        """
        heard, analysis_state = follow(samples, state.analysis)
        n_samples = samples.shape[1]
        start = heard.shape[1] - n_samples - LATENCY_SAMPLES
        passed, overlap = stft.passed(heard[:, start : start + n_samples + HOP], state.overlap)
        return passed, EnhancerState(analysis_state, state.network, overlap)
