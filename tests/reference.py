"""The signal path once more: one stream, float64, written like its formulas; what the fast one is held to."""

from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np

from percepnet import pitch
from percepnet.bands import band_centres_hz
from percepnet.constants import (
    COMB_ORDER,
    HOP,
    LOOKAHEAD_FRAMES,
    MAX_PERIOD,
    MIN_PERIOD,
    N_BANDS,
    N_BINS,
    SAMPLE_RATE,
    WINDOW,
)

BINS_HZ = np.arange(N_BINS) * SAMPLE_RATE / WINDOW
LAGS = range(MIN_PERIOD, MAX_PERIOD + 1, 4)
"""Periods that the tracker tells apart before it refines one of them."""


def agreement_db(fast: np.ndarray, slow: np.ndarray) -> float:
    """Energy of the slow result over that of the difference, in dB."""
    slow = np.asarray(slow, np.complex128)
    difference = np.sum(np.abs(fast - slow) ** 2)
    return float(10 * np.log10(np.sum(np.abs(slow) ** 2) / max(difference, 1e-300)))


# Transform


@cache
def vorbis_window() -> np.ndarray:
    return np.array([np.sin(np.pi / 2 * np.sin(np.pi * (n + 0.5) / WINDOW) ** 2) for n in range(WINDOW)])


@cache
def fourier_matrix(n_bins: int, n_samples: int, length: int) -> np.ndarray:
    """Rows e^{-2πikn/length}: a discrete Fourier transform as it is written down."""
    return np.exp(-2j * np.pi * np.outer(np.arange(n_bins), np.arange(n_samples)) / length)


def spectrum(window: np.ndarray) -> np.ndarray:
    return fourier_matrix(N_BINS, WINDOW, WINDOW) @ (vorbis_window() * window)


def inverse(bins: np.ndarray) -> np.ndarray:
    """A window of samples from its 481 bins, windowed for the overlap-add."""
    both_sides = np.concatenate([bins, np.conj(bins[-2:0:-1])])
    return vorbis_window() * (np.conj(fourier_matrix(WINDOW, WINDOW, WINDOW)) @ both_sides).real / WINDOW


# Bands


@cache
def band_weights() -> np.ndarray:
    """Triangles with their peaks at the centres; the last band keeps its height above its centre."""
    centres = band_centres_hz()
    return np.array([np.interp(BINS_HZ, centres, np.eye(N_BANDS)[band]) for band in range(N_BANDS)])


def to_bands(bins: np.ndarray) -> np.ndarray:
    return np.array([np.sum(weights * bins) for weights in band_weights()])


def to_bins(bands: np.ndarray) -> np.ndarray:
    return np.interp(BINS_HZ, band_centres_hz(), bands)


def band_energy(bins: np.ndarray) -> np.ndarray:
    return to_bands(np.abs(bins) ** 2)


# Pitch


def _low_pass(frequency_hz: float) -> float:
    """1 from 50 Hz to 1 kHz, falling to 0 at 4 kHz."""
    if not 50 <= frequency_hz <= 4000:
        return 0.0
    return float(np.cos(np.pi / 2 * max(0.0, (frequency_hz - 1000) / 3000)) ** 2)


def correlate(passage: np.ndarray) -> np.ndarray:
    """Magnitude-spectrum autocorrelation of a Hann-windowed passage over the window's own autocorrelation."""
    length, n_bins = 2880, 361
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(pitch.PASSAGE) / pitch.PASSAGE)
    magnitude = np.abs(fourier_matrix(n_bins, pitch.PASSAGE, length) @ (hann * passage))
    weighted = [height * _low_pass(k * SAMPLE_RATE / length) for k, height in enumerate(magnitude)]
    scale = 2 * 4 / length  # both halves of the spectrum; every fourth sample of the lag axis
    energy = scale * np.sum(weighted)
    correlations = []
    for lag in range(MIN_PERIOD - 4, MAX_PERIOD + 5, 4):
        at_lag = scale * np.sum(weighted * np.cos(2 * np.pi * np.arange(n_bins) * lag / length))
        window = np.sum(hann[lag:] * hann[: len(hann) - lag]) / np.sum(hann * hann)
        correlations.append(at_lag / ((energy + 1e-4) * window))
    return np.array(correlations)


@cache
def transition_cost(before: int, after: int) -> float:
    """What a change of period costs the track: by its size in octaves, at most that of a jump."""
    return min(pitch._JUMP_COST, pitch._CHANGE_COST * abs(np.log2(after / before)))


def viterbi_step(scores: np.ndarray, local: np.ndarray) -> np.ndarray:
    """The best way to each period over all ways, 0 for the best of all."""
    arriving = [
        max(score - transition_cost(before, after) for before, score in zip(LAGS, scores, strict=True))
        for after in LAGS
    ]
    total = np.array(arriving) + local
    return total - total.max()


def track(correlations: np.ndarray) -> tuple[list[int], list[float]]:
    """Periods and their correlation from (frames, candidates + 2) values, one frame late."""
    bias = np.array([pitch._OCTAVE_COST * np.log2(lag / MIN_PERIOD) for lag in LAGS])
    scores = np.zeros(len(LAGS))
    heard = np.vstack([np.zeros(len(LAGS) + 2), correlations])
    periods, strengths = [], []
    for before, now in pairwise(heard):
        arrived = viterbi_step(scores, now[1:-1] - bias)
        best = LAGS[int(np.argmax(arrived))]
        ways = [score - transition_cost(lag, best) for lag, score in zip(LAGS, scores, strict=True)]
        index = int(np.argmax(ways))
        period, strength = refine(*before[index : index + 3], LAGS[index])
        periods.append(period)
        strengths.append(strength)
        scores = arrived
    return periods, strengths


def refine(left: float, centre: float, right: float, lag: int) -> tuple[int, float]:
    """Top of the parabola through three correlations, four samples apart."""
    curvature, slope = left - 2 * centre + right, (left - right) / 2
    shift = min(1.0, max(-1.0, slope / curvature)) if curvature < -1e-6 else 0.0
    period = min(MAX_PERIOD, max(MIN_PERIOD, round(lag + 4 * shift)))
    return period, min(1.0, max(0.0, centre - slope * shift / 2))


# Comb filter


def comb_taps(period: int) -> dict[int, float]:
    """Hann weights of the shifts by k periods (k < 0: future) that the look-ahead allows, summing to one."""
    weights = {
        k: 0.5 + 0.5 * np.cos(np.pi * k / (COMB_ORDER + 1))
        for k in range(-COMB_ORDER, COMB_ORDER + 1)
        if -k * period <= LOOKAHEAD_FRAMES * HOP
    }
    total = sum(weights.values())
    return {k: float(weight / total) for k, weight in weights.items()}


def comb_window(samples: np.ndarray, start: int, period: int) -> np.ndarray:
    """The comb-filtered window that begins at `start`."""
    filtered = np.zeros(WINDOW)
    for k, weight in comb_taps(period).items():
        filtered += weight * samples[start - k * period : start - k * period + WINDOW]
    return filtered


# Features


def coherence(comb: np.ndarray, noisy: np.ndarray) -> np.ndarray:
    products = to_bands((comb * np.conj(noisy)).real)
    return np.clip(products / (np.sqrt(band_energy(comb) * band_energy(noisy)) + 1e-12), 0, 1)


def log_energy(energy: np.ndarray) -> np.ndarray:
    return np.log10(energy / WINDOW + 1e-7)


# The two halves of the signal path


@dataclass
class Frames:
    """What the fast `Analysis` holds, for one stream."""

    noisy: np.ndarray
    comb: np.ndarray
    energy: np.ndarray
    features: np.ndarray
    period: np.ndarray
    correlation: np.ndarray


def analyze(samples: np.ndarray) -> Frames:
    """A whole signal from silence: frame t is what is known two frames after its window was heard."""
    n_frames = len(samples) // HOP
    past = COMB_ORDER * MAX_PERIOD + WINDOW + LOOKAHEAD_FRAMES * HOP
    heard = np.concatenate([np.zeros(past), samples])
    ends = [past + HOP * (frame + 1) for frame in range(n_frames)]

    correlations = np.array([correlate(heard[end - pitch.PASSAGE : end]) for end in ends])
    periods, strengths = track(correlations)
    starts = [end - LOOKAHEAD_FRAMES * HOP - WINDOW for end in ends]
    noisy = np.array([spectrum(heard[start : start + WINDOW]) for start in starts])
    ahead = np.array([spectrum(heard[end - WINDOW : end]) for end in ends])
    comb = np.array([spectrum(comb_window(heard, *at)) for at in zip(starts, periods, strict=True)])
    features = [
        [*log_energy(band_energy(newest)), *coherence(p, x), period / MAX_PERIOD, strength]
        for newest, p, x, period, strength in zip(ahead, comb, noisy, periods, strengths, strict=True)
    ]
    energy = np.array([band_energy(x) for x in noisy])
    return Frames(noisy, comb, energy, np.array(features), np.array(periods), np.array(strengths))


def mix(noisy: np.ndarray, comb: np.ndarray, strengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Z = (1 - r) X + r P, and the amplitude factors that give its bands the energy of X."""
    r = to_bins(strengths)
    mixed = (1 - r) * noisy + r * comb
    return mixed, np.sqrt((band_energy(noisy) + 1e-12) / (band_energy(mixed) + 1e-12))


def postfilter(gains: np.ndarray, energy: np.ndarray) -> np.ndarray:
    """g_w = g √sin(πg/2), G = √[(1 + β) ρ / (1 + β ρ²)], ρ = E0 / E1."""
    beta = 0.02
    warped = [g * np.cbrt(np.sin(np.pi * g / 2)) for g in gains]
    e0 = sum(g**2 * e for g, e in zip(gains, energy, strict=True))
    e1 = sum(g**2 * e for g, e in zip(warped, energy, strict=True))
    rho = (e0 + 1e-20) / (e1 + 1e-20)
    return np.array(warped) * np.sqrt((1 + beta) * rho / (1 + beta * rho**2))


def synthesize(
    frames: Frames,
    gains: np.ndarray,
    strengths: np.ndarray,
    *,
    sharpening: float = 1,
    limit_db: float = 100,
) -> np.ndarray:
    """Enhanced samples of a whole signal, one hop late."""
    floor = 10 ** (-limit_db / 20)
    samples = np.zeros((len(gains) + 1) * HOP)
    for frame, (g, r) in enumerate(zip(gains, strengths, strict=True)):
        mixed, restoration = mix(frames.noisy[frame], frames.comb[frame], r)
        g = g + sharpening * (postfilter(g, frames.energy[frame]) - g)
        start = frame * HOP
        enhanced = to_bins(g * restoration) * mixed
        samples[start : start + WINDOW] += inverse(floor * frames.noisy[frame] + (1 - floor) * enhanced)
    return samples[: len(gains) * HOP]


# Training targets


def ideal_strength(q_s: float, q_x: float, sigma2: float) -> float:
    """Strength of one band from the formulas as they are written."""
    q_p = q_x / np.sqrt((1 - sigma2) * q_x**2 + sigma2)
    if q_p < q_s:
        return 1.0
    a = max(0.0, q_p**2 - q_s**2)
    b = q_p * q_x * (1 - q_s**2)
    c = max(0.0, q_s**2 - q_x**2)
    if c == 0:
        return 0.0
    alpha = (np.sqrt(b**2 + a * c) - b) / a if a > 1e-9 else c / (2 * b)  # its limit
    return alpha / (1 + alpha)
