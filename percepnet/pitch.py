"""Pitch tracking: normalized autocorrelation of the low band, then a Viterbi track over the frames.

The correlation follows Boersma (1993): the autocorrelation of a Hann-windowed passage divided by that of the
window, which does not favour short periods. It is the transform of the magnitude, not the power, spectrum
(Tolonen and Karjalainen 2000): that flattens formants and single loud noises. On training mixtures at -5 to
10 dB it raised the coherence of the comb-filtered noisy signal with the clean one from 0.784 to 0.800. The
search runs at a quarter of the rate, the track on that grid, and the period found is refined to 48 kHz.
"""

from dataclasses import dataclass

import numpy as np
import scipy.fft

from percepnet.constants import MAX_PERIOD, MIN_PERIOD, SAMPLE_RATE

PASSAGE = 1920
"""Samples correlated for one frame: 40 ms, three periods of a 75 Hz voice."""

_DECIMATION = 4
_TRANSFORM = 2880  # ≥ PASSAGE + MAX_PERIOD, so that no lag wraps around
_N_LAG_POINTS = _TRANSFORM // _DECIMATION
_N_BINS = _N_LAG_POINTS // 2 + 1
_FIRST = MIN_PERIOD // _DECIMATION
_PERIODS = np.arange(_FIRST, MAX_PERIOD // _DECIMATION + 1) * _DECIMATION
_N_PERIODS = len(_PERIODS)

_CUT_HZ = 50.0  # rumble below; a tone at the lowest pitch, 62.5 Hz, must stay
_FLAT_HZ, _STOP_HZ = 1000.0, 4000.0
_SILENCE = np.float32(1e-4)  # a passage at about -90 dBFS; below it nothing counts as periodic
_OCTAVE_COST = 0.02  # per octave: of two equally good periods the shorter one is the pitch
_CHANGE_COST = 2.0  # per octave of change from frame to frame
_JUMP_COST = 0.35  # at most: a new speaker or a new phrase may start anywhere


def _low_pass() -> np.ndarray:
    frequency_hz = np.arange(_N_BINS) * SAMPLE_RATE / _TRANSFORM
    position = np.clip((frequency_hz - _FLAT_HZ) / (_STOP_HZ - _FLAT_HZ), 0, 1)
    weights = np.cos(np.pi / 2 * position) ** 2
    weights[frequency_hz < _CUT_HZ] = 0
    return weights.astype(np.float32)


_LOW_PASS = _low_pass()
_HANN = np.hanning(PASSAGE + 1)[:-1].astype(np.float32)


def _autocorrelation(passages: np.ndarray) -> np.ndarray:
    windowed = np.zeros((*passages.shape[:-1], _TRANSFORM), np.float32)
    np.multiply(passages, _HANN, out=windowed[..., :PASSAGE])
    magnitude = np.abs(scipy.fft.rfft(windowed)[..., :_N_BINS])
    magnitude *= _LOW_PASS
    # The inverse transform of what is real and even is a cosine transform.
    return scipy.fft.dct(magnitude, type=1, norm="forward", overwrite_x=True)


def _window_autocorrelation() -> np.ndarray:
    full = np.correlate(_HANN.astype(np.float64), _HANN.astype(np.float64), "full")[PASSAGE - 1 :]
    return (full[: MAX_PERIOD + 2 * _DECIMATION : _DECIMATION] / full[0]).astype(np.float32)


_WINDOW_CORRELATION = _window_autocorrelation()
_LAGS = slice(_FIRST - 1, _FIRST + _N_PERIODS + 1)
_LOG2_PERIOD = np.log2(_PERIODS).astype(np.float32)
_BIAS = _OCTAVE_COST * (_LOG2_PERIOD - _LOG2_PERIOD[0])
_POSITION = _CHANGE_COST * _LOG2_PERIOD
_NEIGHBOURS = np.arange(3)[:, None, None]
_TRANSITION = np.minimum(np.abs(_POSITION[:, None] - _POSITION), _JUMP_COST)


@dataclass
class PitchState:
    """Memory of the tracker."""

    scores: np.ndarray
    """Viterbi scores of the last frame, float32 (streams, candidates); 0 for the best."""
    correlation: np.ndarray
    """Correlations of the last frame, one lag more on each side, float32 (streams, candidates + 2)."""

    @classmethod
    def initial(cls, n_streams: int) -> "PitchState":
        return cls(
            np.zeros((n_streams, _N_PERIODS), np.float32), np.zeros((n_streams, _N_PERIODS + 2), np.float32)
        )


def correlate(passages: np.ndarray) -> np.ndarray:
    """Normalized correlation of each passage at every candidate period and one more on each side.

    passages: (streams, frames, 1920) float32. Returns (streams, frames, candidates + 2) float32, about -1..1.
    """
    correlation = _autocorrelation(passages)
    energy = correlation[..., :1] + _SILENCE
    return correlation[..., _LAGS] / (energy * _WINDOW_CORRELATION[_LAGS])


def _advance(scores: np.ndarray, local: np.ndarray, out: np.ndarray) -> None:
    """One Viterbi step for every stream: the best way to each period, plus its own score."""
    rising = np.maximum.accumulate(scores + _POSITION, axis=-1)
    rising -= _POSITION
    falling = np.maximum.accumulate((scores - _POSITION)[:, ::-1], axis=-1)[:, ::-1]
    falling += _POSITION
    arriving = np.maximum(rising, falling, out=rising)
    np.maximum(arriving, -_JUMP_COST, out=arriving)
    arriving += local
    np.subtract(arriving, arriving.max(axis=-1, keepdims=True), out=out)


def track(correlation: np.ndarray, state: PitchState) -> tuple[np.ndarray, np.ndarray, PitchState]:
    """Pitch period of each frame's predecessor, decided with this frame heard.

    correlation: (streams, frames, candidates + 2) from `correlate`. Returns the periods in samples at 48 kHz,
    int (streams, frames), their correlation, float32 0..1 (streams, frames), and the new state. [P] 2.2.
    """
    n_frames = correlation.shape[1]
    local = correlation[..., 1:-1] - _BIAS
    scores = np.empty((len(correlation), n_frames + 1, _N_PERIODS), np.float32)
    scores[:, 0] = state.scores
    for frame in range(n_frames):
        _advance(scores[:, frame], local[:, frame], out=scores[:, frame + 1])
    last = scores[:, 1:].argmax(axis=-1)
    before = (scores[:, :-1] - _TRANSITION[last]).argmax(axis=-1)
    delayed = np.concatenate([state.correlation[:, None], correlation], axis=1)
    period, strength = _refine(delayed[:, :-1], before)
    return period, strength, PitchState(scores[:, -1], delayed[:, -1])


def _refine(correlation: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fit a parabola around the chosen lag: the period to one sample at 48 kHz, and the correlation there."""
    n_streams, n_frames = index.shape
    left, centre, right = correlation[np.arange(n_streams)[:, None], np.arange(n_frames), _NEIGHBOURS + index]
    curvature = left - 2 * centre + right
    slope = (left - right) / 2
    shift = np.zeros(index.shape, np.float32)
    np.divide(slope, curvature, out=shift, where=curvature < -1e-6)  # elsewhere there is no peak
    shift = shift.clip(-1, 1)
    period = np.rint(_PERIODS[index] + _DECIMATION * shift).astype(np.int64)
    peak = centre - slope * shift / 2
    return period.clip(MIN_PERIOD, MAX_PERIOD), peak.clip(0, 1)
