"""What the network sees of each frame: one definition for training and serving."""

import numpy as np

from percepnet.bands import band_correlation
from percepnet.constants import MAX_PERIOD, WINDOW

_ENERGY_FLOOR = np.float32(1e-7)
"""Below the quantization noise of 16-bit audio, so that digital silence and dithered silence look alike."""


def coherence(comb: np.ndarray, noisy: np.ndarray, comb_energy: np.ndarray, energy: np.ndarray) -> np.ndarray:
    """How far each band repeats with the pitch period: q = Re⟨P, X⟩ / (‖P‖·‖X‖), clamped to [0, 1].

    comb, noisy: spectra (…, 481) complex64; comb_energy, energy: their band energies (…, 34). Returns float32
    (…, 34). [P] equation 5.
    """
    return normalized_correlation(band_correlation(comb, noisy), comb_energy, energy)


def normalized_correlation(correlation: np.ndarray, energy_a: np.ndarray, energy_b: np.ndarray) -> np.ndarray:
    """Inner products of two signals by the root of their energies, clamped to [0, 1]; all (…, 34) float32."""
    norm = np.sqrt(energy_a * energy_b)
    norm += np.float32(1e-12)
    return (correlation / norm).clip(0, 1)


def assemble(
    ahead_energy: np.ndarray, coherences: np.ndarray, period: np.ndarray, correlation: np.ndarray
) -> np.ndarray:
    """The 70 features of each frame, before normalization, float32 (…, 70).

    ahead_energy: (…, 34), band energies of the look-ahead frame; coherences: (…, 34); period: (…) in
    samples; correlation: (…) in [0, 1].
    """
    return np.concatenate(
        [
            np.log10(ahead_energy / WINDOW + _ENERGY_FLOOR),
            coherences,
            (period / np.float32(MAX_PERIOD))[..., None],
            correlation[..., None],
        ],
        axis=-1,
        dtype=np.float32,
    )


def normalize(features: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Bring features (…, 70) to zero mean and unit spread by a model's constants."""
    return (features - mean) * scale
