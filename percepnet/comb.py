"""Pitch comb filter: averages over neighbouring pitch periods, which keeps the harmonics and thins the noise."""

import numpy as np

from percepnet.constants import COMB_ORDER, HOP, LOOKAHEAD_FRAMES, MAX_PERIOD, WINDOW

REACH = COMB_ORDER * MAX_PERIOD
"""Samples of the past that the filter may need before its window."""

LOOKAHEAD = LOOKAHEAD_FRAMES * HOP
"""Samples that are known after the end of the filtered window."""

_BLOCK = 24  # windows filtered together: their taps' samples, 1 MB, stay in a core's cache
_ORDERS = np.arange(-COMB_ORDER, COMB_ORDER + 1)
_HANN = (0.5 + 0.5 * np.cos(np.pi * _ORDERS / (COMB_ORDER + 1))).astype(np.float32)


def taps(period: np.ndarray) -> np.ndarray:
    """Tap weights (…, 11) float32 for pitch periods (…) in samples: future to past, summing to one.

    Hann weights; taps that would reach beyond the look-ahead are dropped and the rest renormalized, so low
    voices lean on their past ([P] 2.2).
    """
    reachable = -_ORDERS * period[..., None] <= LOOKAHEAD
    weights = np.where(reachable, _HANN, np.float32(0))
    return weights / weights.sum(axis=-1, keepdims=True)


def filter_frames(samples: np.ndarray, period: np.ndarray) -> np.ndarray:
    """Comb-filter the window of every frame: p(n) = Σ w_k x(n - kT).

    samples: (streams, 3840 + 960 + 960 + (frames - 1)·480) float32: the past, the first window, its
    look-ahead, and one hop for each further frame. period: (streams, frames) int, in samples.
    Returns the windows (streams, frames, 960) float32, not yet windowed.
    """
    n_streams, n_frames = period.shape
    weights = taps(period)
    # A tap without weight reads the window itself rather than samples that are not there.
    offsets = np.where(weights > 0, _ORDERS * period[..., None], 0)
    starts = REACH + HOP * np.arange(n_frames)[:, None] - offsets
    shifted = np.lib.stride_tricks.sliding_window_view(samples, WINDOW, axis=-1)
    streams = np.arange(n_streams)[:, None, None]
    filtered = np.empty((n_streams, n_frames, WINDOW), np.float32)
    block = max(1, _BLOCK // n_streams)
    for first in range(0, n_frames, block):
        frames = slice(first, first + block)
        periods = shifted[streams, starts[:, frames]]
        periods *= weights[:, frames, :, None]
        periods.sum(axis=2, out=filtered[:, frames])
    return filtered
