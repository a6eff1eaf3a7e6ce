"""Signals whose properties are known, for the tests."""

import numpy as np

from percepnet.constants import HOP, SAMPLE_RATE


def harmonics(
    f0_hz: float | np.ndarray,
    n_samples: int,
    *,
    bottom_hz: float = 0,
    top_hz: float = 8000,
    tilt: float = 1.0,
) -> np.ndarray:
    """Harmonics k of a fundamental (one number, or one per sample) in a range, of amplitude 0.1 / k^tilt."""
    phase = 2 * np.pi * np.cumsum(np.broadcast_to(f0_hz, n_samples)) / SAMPLE_RATE
    orders = np.arange(1, int(top_hz / np.max(f0_hz)) + 1)
    # Unlike phases, so that the harmonics have no common peak: a crest like a voice's.
    start = np.random.default_rng(0).uniform(0, 2 * np.pi, len(orders))
    amplitudes = np.where(orders * np.min(f0_hz) >= bottom_hz, 0.1 / orders**tilt, 0)
    return amplitudes @ np.cos(orders[:, None] * phase + start[:, None])


def vibrato(f0_hz: float, n_samples: int, *, depth: float = 0.03, rate_hz: float = 5.0) -> np.ndarray:
    """Fundamental in Hz at each sample of a sung or spoken vowel."""
    seconds = np.arange(n_samples) / SAMPLE_RATE
    return f0_hz * (1 + depth * np.sin(2 * np.pi * rate_hz * seconds))


def white_noise(*shape: int, level: float = 0.1, seed: int = 0) -> np.ndarray:
    """Gaussian noise of a given standard deviation, float64."""
    return level * np.random.default_rng(seed).standard_normal(shape)


def voices(n_frames: int) -> np.ndarray:
    """Four unlike streams, float32 (4, n_frames·480): a low voice, a high one, a noisy one, and noise."""
    n_samples = n_frames * HOP
    signals = white_noise(4, n_samples, level=0.002)
    signals[0] += harmonics(vibrato(85, n_samples), n_samples)
    signals[1] += harmonics(vibrato(310, n_samples), n_samples)
    signals[2] += harmonics(vibrato(160, n_samples), n_samples) + white_noise(n_samples, level=0.05, seed=1)
    signals[3] += white_noise(n_samples, level=0.3, seed=2)
    return signals.astype(np.float32)
