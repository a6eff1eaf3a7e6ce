"""Pitch comb filter: averages over neighbouring periods, which keeps the harmonics and thins the noise."""

import numpy as np

from percepnet.constants import COMB_ORDER, HOP, LOOKAHEAD_FRAMES, MAX_PERIOD, WINDOW
from percepnet.stft import windows

REACH = COMB_ORDER * MAX_PERIOD
"""Samples of the past that the filter may need before its window."""

LOOKAHEAD = LOOKAHEAD_FRAMES * HOP
"""Samples that are known after the end of the filtered window."""

_BLOCK = 8  # windows filtered together: their taps' samples, 0.3 MB, stay in a core's second cache
_ORDERS = np.arange(-COMB_ORDER, COMB_ORDER + 1)
_HANN = (0.5 + 0.5 * np.cos(np.pi * _ORDERS / (COMB_ORDER + 1))).astype(np.float32)

# Rows: how many periods the look-ahead holds. Columns: the taps, future to past.
_REACHABLE = np.arange(COMB_ORDER + 1)[:, None] >= -_ORDERS
_TAPS = np.where(_REACHABLE, _HANN, np.float32(0))
_TAPS /= _TAPS.sum(axis=-1, keepdims=True)
# A tap without weight reads the window itself rather than samples that are not there.
_PERIODS_BACK = np.where(_REACHABLE, _ORDERS, 0)

# By period in samples: how many of it the look-ahead holds, as far as the filter reaches; the taps.
_PERIODS = np.arange(MAX_PERIOD + 1)
_AHEAD = np.minimum(LOOKAHEAD // _PERIODS.clip(1), COMB_ORDER)
_WEIGHTS = _TAPS[_AHEAD]
_OFFSETS = -_PERIODS_BACK[_AHEAD] * _PERIODS[:, None]


def taps(period: np.ndarray) -> np.ndarray:
    """Tap weights (…, 11) float32 for pitch periods (…) in samples: future to past, summing to one.

    Hann weights; taps that would reach beyond the look-ahead are dropped and the rest renormalized, so low
    voices lean on their past ([P] 2.2).
    """
    return _WEIGHTS[period]


def filter_frames(samples: np.ndarray, period: np.ndarray) -> np.ndarray:
    """Comb-filter the window of every frame: p(n) = Σ w_k x(n - kT).

    samples: (streams, 3840 + 960 + 960 + (frames - 1)·480) float32: the past, the first window, its
    look-ahead, and one hop for each further frame. period: (streams, frames) int, in samples.
    Returns the windows (streams, frames, 960) float32, not yet windowed.
    """
    n_streams, n_frames = period.shape
    n_samples = samples.shape[1]
    first = np.arange(n_streams)[:, None] * n_samples + np.arange(REACH, REACH + n_frames * HOP, HOP)
    period = period.reshape(-1)
    weights = _WEIGHTS[period]
    starts = _OFFSETS[period] + first.reshape(-1, 1)
    shifted = windows(samples.reshape(1, -1), WINDOW, hop=1)[0]
    filtered = np.empty((len(period), WINDOW), np.float32)
    for begin in range(0, len(period), _BLOCK):
        block = slice(begin, begin + _BLOCK)
        np.einsum("wts,wt->ws", shifted[starts[block]], weights[block], out=filtered[block])
    return filtered.reshape(n_streams, n_frames, WINDOW)
