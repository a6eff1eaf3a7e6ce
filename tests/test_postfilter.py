"""The postfilter leaves good bands alone and pushes bad ones further down."""

import numpy as np
import pytest
import reference

from percepnet import postfilter
from percepnet.constants import N_BANDS


def _case(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.random(N_BANDS, dtype=np.float32), rng.lognormal(0, 3, N_BANDS).astype(np.float32)


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_formula(seed):
    gains, energy = _case(seed)
    sharpened = postfilter.sharpen(gains, energy)
    assert sharpened.dtype == np.float32
    slow = reference.postfilter(gains.astype(np.float64), energy.astype(np.float64))
    assert reference.agreement_db(sharpened, slow) > 120


def test_unit_gains_stay():
    _, energy = _case()
    np.testing.assert_allclose(postfilter.sharpen(np.ones(N_BANDS, np.float32), energy), 1, atol=1e-6)


def test_small_gains_fall_against_large_ones():
    gains = np.linspace(0.02, 1, N_BANDS, dtype=np.float32)
    sharpened = postfilter.sharpen(gains, np.ones(N_BANDS, np.float32))
    assert (np.diff(sharpened / gains) > 0).all()
    assert (sharpened[gains < 0.2] < 0.8 * gains[gains < 0.2]).all()


def test_a_voice_over_weak_noise_keeps_its_loudness():
    gains, energy = np.full(N_BANDS, 0.2, np.float32), np.full(N_BANDS, 1e-3, np.float32)
    gains[5:12], energy[5:12] = 0.9, 1
    sharpened = postfilter.sharpen(gains, energy)
    loudness_db = 10 * np.log10(np.sum(sharpened**2 * energy) / np.sum(gains**2 * energy))
    assert abs(loudness_db) < 0.2


@pytest.mark.parametrize("energy", [0.0, 1e-30, 1.0, 1e12])
@pytest.mark.parametrize("gain", [0.0, 1e-6, 1.0])
def test_it_is_finite_at_any_level(energy, gain):
    sharpened = postfilter.sharpen(np.full(N_BANDS, gain, np.float32), np.full(N_BANDS, energy, np.float32))
    assert np.isfinite(sharpened).all()
    assert (sharpened >= 0).all()


def test_a_frame_does_not_depend_on_the_frames_beside_it():
    gains, energy = (np.stack(values) for values in zip(*(_case(seed) for seed in range(6)), strict=True))
    together = postfilter.sharpen(gains.reshape(2, 3, -1), energy.reshape(2, 3, -1)).reshape(6, -1)
    for row in range(6):
        np.testing.assert_array_equal(together[row], postfilter.sharpen(gains[row], energy[row]))
