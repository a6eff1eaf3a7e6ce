"""Signals whose properties are known, for the tests."""

import numpy as np
from scipy import signal

from percepnet.constants import HOP, SAMPLE_RATE, WINDOW

_FORMANTS_HZ = np.array(
    [
        [730, 1090, 2440, 3500, 4500],
        [270, 2290, 3010, 3500, 4500],
        [530, 1840, 2480, 3500, 4500],
        [570, 840, 2410, 3500, 4500],
        [300, 870, 2240, 3500, 4500],
    ]
)
"""Resonances of five English vowels (the first three: Peterson and Barney 1952)."""


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


def pink_noise(n_samples: int, *, level: float = 0.1, seed: int = 0) -> np.ndarray:
    """Gaussian noise with as much energy in each octave from 20 Hz up, of a given standard deviation."""
    spectrum = np.fft.rfft(white_noise(n_samples, seed=seed))
    frequency_hz = np.fft.rfftfreq(n_samples, 1 / SAMPLE_RATE)
    pink = np.fft.irfft(spectrum / np.sqrt(np.maximum(frequency_hz, 20)), n_samples)
    return level * pink / pink.std()


def speech(n_samples: int, f0_hz: float, *, seed: int = 0) -> np.ndarray:
    """Syllables of a voice around this fundamental, at -20 dBFS, from the first to the end of the last one.

    Glottal pulses and breath, some four times a second, through the moving resonances of a mouth that forms
    one vowel after the other (the source-filter model, Fant 1960).
    """
    rng = np.random.default_rng(seed)
    time = np.arange(n_samples) / SAMPLE_RATE
    ends = np.cumsum(rng.uniform(0.2, 0.32, round(n_samples / SAMPLE_RATE / 0.26)))
    ends *= n_samples / SAMPLE_RATE / ends[-1]
    starts = np.concatenate([[0], ends[:-1] + 0.05])
    loudness = rng.uniform(0.6, 1, len(starts))

    def contour(*points: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """Lines through the same points of every syllable: when, and what."""
        seconds, values = (np.stack(columns, axis=1).ravel() for columns in zip(*points, strict=True))
        return np.interp(time, seconds, values)

    envelope = contour(
        (starts, 0 * loudness), (starts + 0.02, loudness), (ends - 0.06, loudness), (ends, 0 * loudness)
    )
    falling = contour((starts, rng.uniform(1, 1.25, len(starts))), (ends, rng.uniform(0.8, 1, len(starts))))
    pulses = np.diff(np.floor(np.cumsum(f0_hz * falling) / SAMPLE_RATE), prepend=0)
    glottis = signal.lfilter([1, -1], np.convolve([1, -0.97], [1, -0.9]), pulses)
    source = (glottis + white_noise(n_samples, level=0.1 * glottis.std(), seed=seed)) * envelope

    frequency_hz, frame_seconds, spectrum = signal.stft(source, SAMPLE_RATE, nperseg=WINDOW)
    vowels = _FORMANTS_HZ[rng.integers(0, len(_FORMANTS_HZ), len(starts))]
    for formant_hz in vowels.T:
        centre_hz = np.interp(frame_seconds, starts + 0.1, formant_hz)
        bandwidth_hz = 100 + 0.04 * centre_hz
        relative = frequency_hz[:, None] / centre_hz
        spectrum /= 1 - relative**2 + 1j * relative * bandwidth_hz / centre_hz
    _, voice = signal.istft(spectrum, SAMPLE_RATE)
    voice = voice[:n_samples]
    return 0.1 * voice / voice.std()
