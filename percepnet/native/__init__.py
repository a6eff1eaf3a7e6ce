"""The signal path around the network, compiled: what `analysis` and `synthesis` do, in a quarter of the time.

It is built where there is a C compiler that knows vectors (GCC, clang); elsewhere `AVAILABLE` is false, and
numpy does the work. Both go on from each other's states.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from percepnet import bands, comb, features, pitch, postfilter, stft
from percepnet.analysis import AnalysisState
from percepnet.constants import HOP, N_BANDS, N_FEATURES
from percepnet.synthesis import FrameControls

try:
    from percepnet.native import _path
except ImportError:
    _path = None  # type: ignore[assignment]

AVAILABLE = _path is not None
"""Whether the compiled code is there."""

_TABLES: dict[str, tuple[Any, type]] = {
    "window": (stft.VORBIS_WINDOW, np.float32),
    "passage_window": (pitch._HANN, np.float32),
    "low_pass": (pitch._LOW_PASS, np.float32),
    "window_correlation": (pitch._WINDOW_CORRELATION[pitch._LAGS], np.float32),
    "bias": (pitch._BIAS, np.float32),
    "position": (pitch._POSITION, np.float32),
    "jump_cost": ([pitch._JUMP_COST], np.float32),
    "silence": ([pitch._SILENCE], np.float32),
    "comb_weights": (comb._WEIGHTS, np.float32),
    "comb_offsets": (comb._OFFSETS, np.int64),
    "band_below": (bands._LOWER, np.int64),
    "towards_next": (bands._UP, np.float32),
    "energy_floor": ([features._ENERGY_FLOOR], np.float32),
    "postfilter_beta": ([postfilter._BETA], np.float32),
}

if AVAILABLE:
    _path.configure({name: np.ascontiguousarray(*table) for name, table in _TABLES.items()})

DESCRIPTION = "compiled" if AVAILABLE else "numpy (what a C compiler makes of it would be faster)"


@dataclass(frozen=True)
class Analysis:
    """Frames ready for the network and the synthesis, each two frames behind the newest input."""

    spectra: Any
    """Of the input and of the comb-filtered input."""
    energy: np.ndarray
    """Band energies of the input, float32 (streams, frames, 34)."""
    features: np.ndarray
    """Normalized features, float32 (streams, frames, 70)."""
    period: np.ndarray
    """Pitch periods in samples, int (streams, frames)."""
    correlation: np.ndarray
    """Pitch correlation, float32 0..1 (streams, frames)."""


def analyze(
    samples: np.ndarray, state: AnalysisState, rows: np.ndarray, mean: np.ndarray, scale: np.ndarray
) -> Analysis:
    """Analyse whole frames of some rows of a state, which goes on in place.

    samples: (streams, frames·480) float32; rows: int64 (streams,), each once; mean, scale: float32 (70,), of
    the features.
    """
    samples = np.ascontiguousarray(samples, np.float32)
    n_streams, n_frames = len(samples), samples.shape[1] // HOP
    energy = np.empty((n_streams, n_frames, N_BANDS), np.float32)
    normalized = np.empty((n_streams, n_frames, N_FEATURES), np.float32)
    period = np.empty((n_streams, n_frames), np.int64)
    correlation = np.empty((n_streams, n_frames), np.float32)
    spectra = _path.analyze(
        rows,
        samples,
        state.samples,
        state.spectra,
        state.energies,
        state.pitch.scores,
        state.pitch.correlation,
        mean,
        scale,
        energy,
        normalized,
        period,
        correlation,
    )
    return Analysis(spectra, energy, normalized, period, correlation)


def synthesize(
    analysis: Analysis,
    gains: np.ndarray,
    strengths: np.ndarray,
    overlap: np.ndarray,
    rows: np.ndarray,
    controls: FrameControls,
) -> np.ndarray:
    """Comb-mix, gain, postfilter, and back to samples, float32 (streams, frames·480), one hop late.

    gains, strengths: (streams, frames, 34) float32 in [0, 1]; overlap: (all rows, 480), which goes on in
    place.
    """
    n_streams, n_frames = analysis.period.shape
    enhanced = np.empty((n_streams, n_frames * HOP), np.float32)
    wet, sharpening = np.empty((2, n_streams, n_frames), np.float32)
    wet[:], sharpening[:] = controls.wet, controls.sharpening
    _path.synthesize(
        rows,
        analysis.spectra,
        analysis.energy,
        gains,
        strengths,
        wet,
        sharpening,
        overlap,
        enhanced,
    )
    return enhanced
