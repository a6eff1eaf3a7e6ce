"""From samples to what the network and the synthesis need: spectra, comb-filtered spectra, features.

This is the half of the signal path before the network. Serving, training and the oracle all call it.
"""

from dataclasses import dataclass

import numpy as np

from percepnet import comb, features, pitch, stft
from percepnet.bands import band_energy, correlation, power, to_bands
from percepnet.constants import HOP, LOOKAHEAD_FRAMES, N_BANDS, N_BINS, WINDOW

_HISTORY = comb.REACH + WINDOW + comb.LOOKAHEAD - HOP
"""Samples kept before the newest hop: the comb filter reaches furthest back."""


@dataclass
class AnalysisState:
    """Memory of the analysis, one row per stream."""

    samples: np.ndarray
    """The newest 5280 samples, float32 (streams, 5280)."""
    spectra: np.ndarray
    """Spectra of the two newest frames, complex64 (streams, 2, 481)."""
    energies: np.ndarray
    """Their band energies, float32 (streams, 2, 34)."""
    pitch: pitch.PitchState

    @classmethod
    def initial(cls, n_streams: int) -> "AnalysisState":
        return cls(
            np.zeros((n_streams, _HISTORY), np.float32),
            np.zeros((n_streams, LOOKAHEAD_FRAMES, N_BINS), np.complex64),
            np.zeros((n_streams, LOOKAHEAD_FRAMES, N_BANDS), np.float32),
            pitch.PitchState.initial(n_streams),
        )


@dataclass(frozen=True)
class Analysis:
    """Frames ready for the network and the synthesis, each two frames behind the newest input."""

    noisy: np.ndarray
    """Spectra of the input, complex64 (streams, frames, 481)."""
    comb: np.ndarray
    """Spectra of the comb-filtered input, complex64 (streams, frames, 481)."""
    energy: np.ndarray
    """Band energies of `noisy`, float32 (streams, frames, 34)."""
    features: np.ndarray
    """Features before normalization, float32 (streams, frames, 70)."""
    period: np.ndarray
    """Pitch periods in samples, int (streams, frames)."""
    correlation: np.ndarray
    """Pitch correlation, float32 0..1 (streams, frames)."""


def analyze(samples: np.ndarray, state: AnalysisState) -> tuple[Analysis, AnalysisState]:
    """Analyse whole frames of new samples.

    samples: (streams, frames·480) float32 at 48 kHz. Returns the analysis of as many frames, two frames late,
    and the new state.
    """
    n_frames = samples.shape[-1] // HOP
    heard = np.concatenate([state.samples, samples], axis=-1)

    passages = stft.windows(heard, pitch.PASSAGE, start=_HISTORY + HOP - pitch.PASSAGE)
    period, strength, pitch_state = pitch.track(pitch.correlate(passages), state.pitch)

    newest = stft.windows(heard, WINDOW, start=_HISTORY - HOP)
    filtered = comb.filter_frames(heard, period)
    spectra, comb_spectra = both = stft.forward(np.array([newest, filtered]))
    all_spectra = np.concatenate([state.spectra, spectra], axis=1)
    noisy = all_spectra[:, :n_frames]

    bins = np.empty((3, *spectra.shape), np.float32)
    power(both, out=bins[:2])
    correlation(comb_spectra, noisy, out=bins[2])
    energies, comb_energies, correlations = to_bands(bins)
    all_energies = np.concatenate([state.energies, energies], axis=1)
    energy = all_energies[:, :n_frames]
    coherences = features.normalized_correlation(correlations, comb_energies, energy)

    result = Analysis(
        noisy=noisy,
        comb=comb_spectra,
        energy=energy,
        features=features.assemble(energies, coherences, period, strength),
        period=period,
        correlation=strength,
    )
    return result, AnalysisState(
        heard[:, -_HISTORY:], all_spectra[:, n_frames:], all_energies[:, n_frames:], pitch_state
    )


def follow(samples: np.ndarray, state: AnalysisState) -> tuple[np.ndarray, AnalysisState]:
    """Take new samples into the memory alone, at a fraction of the cost of analysing their frames.

    samples: as for `analyze`. Returns all that is remembered and then the new samples, float32
    (streams, 5280 + frames·480), and the new state: that of `analyze`, but the pitch track skips the frames.
    """
    heard = np.concatenate([state.samples, samples], axis=-1)
    spectra = stft.forward(stft.windows(heard[:, -(LOOKAHEAD_FRAMES - 1) * HOP - WINDOW :], WINDOW))
    correlations = pitch.correlate(heard[:, np.newaxis, -pitch.PASSAGE :])[:, 0]
    pitch_state = pitch.PitchState(state.pitch.scores, correlations)
    return heard, AnalysisState(heard[:, -_HISTORY:], spectra, band_energy(spectra), pitch_state)
