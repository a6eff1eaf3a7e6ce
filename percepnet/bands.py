"""The 34 ERB bands: from bins to band energies and from band values back to bins.

Every sum runs along the last axis in a fixed order (no BLAS), so that a stream's result does not depend on
which other streams or how many frames share the call.
"""

import numpy as np

from percepnet.constants import N_BANDS, N_BINS, SAMPLE_RATE, WINDOW

TOP_HZ = 20_000.0
MIN_SPACING_HZ = 100.0
BIN_HZ = SAMPLE_RATE / WINDOW


def _erb_rate(frequency_hz: float) -> float:
    return float(21.4 * np.log10(1 + 0.00437 * frequency_hz))


def _frequency_hz(erb_rate: float) -> float:
    return float((10 ** (erb_rate / 21.4) - 1) / 0.00437)


def _centres(erb_step: float) -> np.ndarray:
    """Centres from 0 Hz up, each one step on the ERB-rate scale or 100 Hz above the one before."""
    centres = [0.0]
    while len(centres) < N_BANDS:
        centres.append(max(centres[-1] + MIN_SPACING_HZ, _frequency_hz(_erb_rate(centres[-1]) + erb_step)))
    return np.array(centres)


def band_centres_hz() -> np.ndarray:
    """Centres of the bands in Hz, float64 (34,), up to 20 kHz ([P] 2.1; Glasberg and Moore 1990)."""
    low, high = 0.1, 10.0
    for _ in range(60):
        step = (low + high) / 2
        low, high = (step, high) if _centres(step)[-1] < TOP_HZ else (low, step)
    return _centres(low)


def _interpolation() -> tuple[np.ndarray, np.ndarray]:
    """For every bin the band at or below it, and how far (0..1) it lies towards the next band."""
    bins_hz = np.minimum(np.arange(N_BINS) * BIN_HZ, TOP_HZ)
    centres = band_centres_hz()
    lower = np.clip(np.searchsorted(centres, bins_hz, side="right") - 1, 0, N_BANDS - 2)
    fraction = (bins_hz - centres[lower]) / (centres[lower + 1] - centres[lower])
    return lower, np.minimum(fraction, 1).astype(np.float32)


_LOWER, _UP = _interpolation()
_DOWN = 1 - _UP


def band_weights() -> np.ndarray:
    """Weight of every bin in every band, float32 (34, 481); each bin's weights sum to one."""
    weights = np.zeros((N_BANDS, N_BINS), np.float32)
    weights[_LOWER, np.arange(N_BINS)] = _DOWN
    weights[_LOWER + 1, np.arange(N_BINS)] += _UP
    return weights


def _tiling() -> tuple[np.ndarray, np.ndarray]:
    """Weights of the even and of the odd bands, float32 (2, 481), and where each band begins in the two rows.

    Neighbours overlap, but every other band tiles the bins: one weight per bin and row.
    """
    weights = band_weights()
    centres = np.flatnonzero(np.diff(_LOWER, prepend=-1))  # the first bin above each centre but the last
    begins = np.concatenate([[0], centres[1::2], N_BINS + centres[::2]])
    return np.stack([weights[::2].sum(axis=0), weights[1::2].sum(axis=0)]), begins


_EVEN_AND_ODD, _BEGINS = _tiling()


def to_bands(bins: np.ndarray) -> np.ndarray:
    """Weighted sum of bin values (…, 481) in each band (…, 34), float32."""
    leading = bins.shape[:-1]
    weighted = (bins[..., None, :] * _EVEN_AND_ODD).reshape(*leading, 2 * N_BINS)
    sums = np.add.reduceat(weighted, _BEGINS, axis=-1)
    return sums.reshape(*leading, 2, N_BANDS // 2).swapaxes(-1, -2).reshape(*leading, N_BANDS)


def to_bins(bands: np.ndarray) -> np.ndarray:
    """Interpolate band values (…, 34) linearly over the bins (…, 481); above 20 kHz the last band holds."""
    steps = bands[..., 1:] - bands[..., :-1]
    bins = steps.take(_LOWER, axis=-1)
    bins *= _UP
    bins += bands.take(_LOWER, axis=-1)
    return bins


def correlation(a: np.ndarray, b: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Real part of a·b* in every bin of two spectra, float32."""
    products = a.view(np.float32) * b.view(np.float32)  # real and imaginary parts in turn
    return np.add(products[..., ::2], products[..., 1::2], out=out)


def power(spectrum: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Energy of every bin, float32."""
    return correlation(spectrum, spectrum, out)


def band_energy(spectrum: np.ndarray) -> np.ndarray:
    """Energy of a spectrum (…, 481) in each band (…, 34), float32."""
    return to_bands(power(spectrum))


def band_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Real part of the inner product of two spectra (…, 481) in each band (…, 34), float32."""
    return to_bands(correlation(a, b))
