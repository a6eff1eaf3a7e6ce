"""Features are finite, bounded where they should be, and lie where the network expects them."""

import numpy as np
import pytest
import reference
import signals

from percepnet import features
from percepnet.bands import band_energy
from percepnet.constants import MAX_PERIOD, N_BANDS, N_BINS, N_FEATURES, WINDOW


def _spectra(n: int, seed: int = 0) -> np.ndarray:
    real, imag = signals.white_noise(2, n, N_BINS, seed=seed)
    return (real + 1j * imag).astype(np.complex64)


def _coherence(comb: np.ndarray, noisy: np.ndarray) -> np.ndarray:
    return features.coherence(comb, noisy, band_energy(comb), band_energy(noisy))


def test_coherence_equals_the_slow_one():
    comb, noisy = _spectra(2)
    comb += noisy
    slow = reference.coherence(comb.astype(np.complex128), noisy.astype(np.complex128))
    assert reference.agreement_db(_coherence(comb, noisy), slow) > 120


@pytest.mark.parametrize("level", [1e-8, 1e-3, 1.0, 1e6])
def test_coherence_lies_between_0_and_1(level):
    noisy = _spectra(50) * np.float32(level)
    unlike = _coherence(_spectra(50, seed=1) * np.float32(level), noisy)
    alike = _coherence(np.float32(0.3) * noisy, noisy)
    assert unlike.min() >= 0
    assert max(unlike.max(), alike.max()) <= 1


def test_a_scaled_copy_is_coherent_and_an_inverted_one_is_not():
    noisy = _spectra(3)
    np.testing.assert_allclose(_coherence(np.float32(0.3) * noisy, noisy), 1, atol=1e-5)
    np.testing.assert_array_equal(_coherence(-noisy, noisy), 0)


def test_silence_is_not_coherent():
    silence = np.zeros((1, N_BINS), np.complex64)
    np.testing.assert_array_equal(_coherence(silence, silence), 0)


def test_the_70_features_lie_in_their_places():
    energy = np.linspace(0, 10, N_BANDS, dtype=np.float32)
    coherences = np.linspace(0, 1, N_BANDS, dtype=np.float32)
    assembled = features.assemble(energy, coherences, np.array(384), np.array(0.25, np.float32))
    assert assembled.shape == (N_FEATURES,) == (70,)
    assert assembled.dtype == np.float32
    np.testing.assert_allclose(assembled[:34], reference.log_energy(energy.astype(np.float64)), rtol=1e-5)
    np.testing.assert_array_equal(assembled[34:68], coherences)
    assert assembled[68] == 384 / MAX_PERIOD
    assert assembled[69] == 0.25


def test_digital_silence_and_16_bit_dither_look_alike():
    nothing = np.zeros(N_BANDS, np.float32)
    one_step_of_noise = np.full(N_BANDS, WINDOW * (1 / 32768) ** 2 / 12, np.float32)
    rest = np.zeros(N_BANDS, np.float32), np.array(0), np.array(0, np.float32)
    difference = features.assemble(one_step_of_noise, *rest) - features.assemble(nothing, *rest)
    assert np.abs(difference).max() < 0.01


def test_normalization_takes_a_models_own_data_to_zero_mean_and_unit_spread():
    data = signals.white_noise(500, N_FEATURES, level=3).astype(np.float32) + 5
    normalized = features.normalize(data, data.mean(axis=0), 1 / data.std(axis=0))
    assert normalized.dtype == np.float32
    np.testing.assert_allclose(normalized.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(normalized.std(axis=0), 1, rtol=1e-4)
