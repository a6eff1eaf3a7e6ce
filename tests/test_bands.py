"""The bands follow the ERB-rate scale and tile the spectrum."""

import numpy as np
import reference
import signals

from percepnet import bands
from percepnet.constants import N_BANDS, N_BINS


def _spectra(*shape: int, seed: int = 0) -> np.ndarray:
    real, imag = signals.white_noise(2, *shape, N_BINS, seed=seed)
    return (real + 1j * imag).astype(np.complex64)


def test_centres_run_from_0_to_20_khz_at_least_100_hz_apart():
    centres = bands.band_centres_hz()
    assert len(centres) == N_BANDS == 34
    assert centres[0] == 0
    np.testing.assert_allclose(centres[-1], 20_000, atol=0.01)
    assert np.diff(centres).min() >= 100 - 1e-9


def test_centres_are_equally_spaced_on_the_erb_rate_scale_where_that_is_over_100_hz():
    centres = bands.band_centres_hz()
    erb_steps = np.diff(21.4 * np.log10(1 + 0.00437 * centres))
    clamped = np.isclose(np.diff(centres), 100)
    assert 0 < clamped.sum() < N_BANDS - 1
    np.testing.assert_allclose(erb_steps[~clamped], erb_steps[-1], rtol=1e-6)
    assert erb_steps[clamped].min() >= erb_steps[-1]


def test_the_weights_of_every_bin_sum_to_one():
    weights = bands.band_weights()
    assert weights.shape == (N_BANDS, N_BINS)
    assert weights.min() >= 0
    np.testing.assert_allclose(weights.sum(axis=0), 1, atol=1e-6)


def test_the_weights_are_triangles_on_the_centres():
    assert reference.agreement_db(bands.band_weights(), reference.band_weights()) > 120


def test_bins_above_20_khz_belong_to_the_last_band():
    above = reference.BINS_HZ >= 20_000
    values = signals.white_noise(N_BANDS).astype(np.float32)
    np.testing.assert_allclose(bands.to_bins(values)[above], values[-1], rtol=1e-5)
    np.testing.assert_allclose(bands.band_weights()[-1, above], 1, atol=1e-5)


def test_band_sums_equal_the_slow_ones():
    fast = _spectra(2)
    slow = fast.astype(np.complex128)
    assert reference.agreement_db(bands.band_energy(fast[0]), reference.band_energy(slow[0])) > 120
    slow_correlation = reference.to_bands((slow[0] * np.conj(slow[1])).real)
    assert reference.agreement_db(bands.band_correlation(*fast), slow_correlation) > 120


def test_interpolation_equals_the_slow_one():
    values = signals.white_noise(N_BANDS).astype(np.float32)
    assert reference.agreement_db(bands.to_bins(values), reference.to_bins(values)) > 120


def test_results_are_float32_and_keep_their_leading_axes():
    spectra = _spectra(2, 3)
    assert bands.band_energy(spectra).shape == (2, 3, N_BANDS)
    assert bands.to_bins(bands.band_energy(spectra)).shape == (2, 3, N_BINS)
    assert bands.band_energy(spectra).dtype == bands.to_bins(bands.band_energy(spectra)).dtype == np.float32


def test_equal_band_values_give_exactly_that_value_in_every_bin():
    """Unit gains must leave a signal untouched."""
    np.testing.assert_array_equal(bands.to_bins(np.ones(N_BANDS, np.float32)), 1)


def test_band_energies_add_up_to_the_whole_energy():
    spectrum = _spectra(1)
    np.testing.assert_allclose(bands.band_energy(spectrum).sum(), bands.power(spectrum).sum(), rtol=1e-5)


def test_a_spectrum_correlates_with_itself_by_its_energy_and_not_with_its_quadrature():
    spectrum = _spectra(1)
    energy = bands.band_energy(spectrum)
    np.testing.assert_allclose(bands.band_correlation(spectrum, spectrum), energy, rtol=1e-6)
    quadrature = bands.band_correlation(spectrum, (1j * spectrum).astype(np.complex64))
    assert np.abs(quadrature).max() < 1e-6 * energy.max()


def test_a_row_does_not_depend_on_the_rows_beside_it():
    spectra = _spectra(5, 3)
    energies = bands.band_energy(spectra)
    bins = bands.to_bins(energies)
    for stream in range(5):
        for frame in range(3):
            alone = bands.band_energy(spectra[stream, frame])
            np.testing.assert_array_equal(energies[stream, frame], alone)
            np.testing.assert_array_equal(bins[stream, frame], bands.to_bins(alone))
