"""Ideal gains and strengths follow [P], and applied in the network's place they enhance."""

import numpy as np
import pytest
import reference
import signals

from percepnet import comb, stft, targets
from percepnet.analysis import AnalysisState, analyze
from percepnet.bands import band_energy
from percepnet.constants import HOP, LATENCY_SAMPLES, WINDOW
from percepnet.features import coherence
from percepnet.synthesis import MAX_ATTENUATION_LIMIT_DB, Controls, synthesize

N_FRAMES = 80


def _vowel() -> np.ndarray:
    """A sung vowel, float64 (1, samples)."""
    n_samples = N_FRAMES * HOP
    return signals.harmonics(signals.vibrato(150, n_samples), n_samples)[None]


def _mixture(snr_db: float) -> tuple[np.ndarray, np.ndarray]:
    """The vowel in white noise and alone, float32."""
    clean = _vowel()
    noise = signals.white_noise(*clean.shape, level=float(clean.std() * 10 ** (-snr_db / 20)))
    return (clean + noise).astype(np.float32), clean.astype(np.float32)


def _snr_db(enhanced: np.ndarray, clean: np.ndarray) -> float:
    """Of the settled part, both in the enhanced signal's time."""
    first = 20 * HOP
    return reference.agreement_db(
        enhanced[:, first:], clean[:, first - LATENCY_SAMPLES : -LATENCY_SAMPLES].astype(np.float64)
    )


def _enhance(noisy: np.ndarray, gains: np.ndarray, strengths: np.ndarray) -> np.ndarray:
    analysis, _ = analyze(noisy, AnalysisState.initial(len(noisy)))
    overlap = np.zeros((len(noisy), HOP), np.float32)
    return synthesize(analysis, gains, strengths, overlap, Controls(MAX_ATTENUATION_LIMIT_DB, postfilter=0))[
        0
    ]


def test_gains_are_amplitude_ratios_of_at_most_one():
    gains = targets.band_gains(np.array([0.25, 4, 0, 0], np.float32), np.array([1, 1, 1, 0], np.float32))
    np.testing.assert_allclose(gains, [0.5, 1, 0, 1], atol=2e-5)


def test_strengths_follow_the_formulas():
    """Over all coherences, and for the taps of a high, a middle and a low voice."""
    grid = np.linspace(0, 1, 41, dtype=np.float32)
    clean, noisy = np.meshgrid(grid, grid)
    for period in (100, 400, 768):
        tap_energy = np.sum(comb.taps(np.array(period)) ** 2)
        strengths = targets.ideal_strengths(clean, noisy, tap_energy)
        slow = [
            reference.ideal_strength(float(q_s), float(q_x), float(tap_energy))
            for q_s, q_x in zip(clean.ravel(), noisy.ravel(), strict=True)
        ]
        np.testing.assert_allclose(strengths.ravel(), slow, atol=1e-5)


def test_strengths_lie_between_0_and_1():
    coherences = np.random.default_rng(0).random((2, 1000, 34), dtype=np.float32)
    tap_energy = np.random.default_rng(1).uniform(0.13, 0.35, (1000, 1)).astype(np.float32)
    strengths = targets.ideal_strengths(*coherences, tap_energy)
    assert strengths.dtype == np.float32
    assert strengths.min() >= 0
    assert strengths.max() <= 1


def test_a_band_that_even_the_full_comb_leaves_too_noisy_gets_it():
    clean, noisy = np.array([0.99], np.float32), np.array([0.1], np.float32)
    assert targets.ideal_strengths(clean, noisy, np.float32(0.15)) == 1


def test_a_clean_signal_needs_no_comb_and_no_gain():
    clean = _mixture(0)[1]
    ideal = targets.from_signals(clean, clean)
    np.testing.assert_allclose(ideal.gains, 1, atol=1e-6)
    np.testing.assert_allclose(ideal.strengths, 0, atol=1e-6)


def test_noise_alone_gets_no_gain():
    noise = signals.white_noise(1, 20 * HOP).astype(np.float32)
    ideal = targets.from_signals(noise, np.zeros_like(noise))
    assert ideal.gains[:, 4:].max() < 1e-4
    np.testing.assert_array_equal(ideal.strengths[:, 4:], 0)


def test_targets_are_those_of_the_frames_that_analysis_returns():
    noisy, clean = _mixture(5)
    analysis, _ = analyze(noisy, AnalysisState.initial(1))
    spectrum, comb_spectrum = targets.clean_spectra(clean, analysis.period)
    heard = np.pad(clean, ((0, 0), (3 * HOP, 0)))
    np.testing.assert_array_equal(spectrum, stft.forward(stft.windows(heard, WINDOW))[:, :N_FRAMES])
    clean_analysis, _ = analyze(clean, AnalysisState.initial(1))
    np.testing.assert_array_equal(spectrum, clean_analysis.noisy)

    ideal = targets.from_signals(noisy, clean)
    clean_energy = band_energy(spectrum)
    clean_coherence = coherence(comb_spectrum, spectrum, band_energy(comb_spectrum), clean_energy)
    tap_energy = np.sum(comb.taps(analysis.period) ** 2, axis=-1)
    for frame in range(10, 20):
        for band in range(34):
            gain = min(1, np.sqrt(clean_energy[0, frame, band] / analysis.energy[0, frame, band]))
            strength = reference.ideal_strength(
                float(clean_coherence[0, frame, band]),
                float(analysis.features[0, frame, 34 + band]),
                float(tap_energy[0, frame]),
            )
            found = ideal.gains[0, frame, band], ideal.strengths[0, frame, band]
            np.testing.assert_allclose(found, (gain, strength), atol=1e-4)


@pytest.mark.parametrize("snr_db", [0, 10])
def test_ideal_gains_raise_the_snr(snr_db):
    noisy, clean = _mixture(snr_db)
    ideal = targets.from_signals(noisy, clean)
    enhanced = _enhance(noisy, ideal.gains, ideal.strengths)
    untouched = _enhance(noisy, np.ones_like(ideal.gains), np.zeros_like(ideal.gains))
    assert _snr_db(untouched, clean) == pytest.approx(snr_db, abs=0.5)
    assert _snr_db(enhanced, clean) > snr_db + 5


def test_the_comb_filter_adds_to_ideal_gains_on_a_voice_in_white_noise():
    noisy, clean = _mixture(0)
    spectrum, _ = targets.clean_spectra(clean, analyze(noisy, AnalysisState.initial(1))[0].period)
    analysis, _ = analyze(noisy, AnalysisState.initial(1))
    plain_gains = targets.band_gains(band_energy(spectrum), analysis.energy)
    plain = _enhance(noisy, plain_gains, np.zeros_like(plain_gains))
    ideal = targets.from_signals(noisy, clean)
    combed = _enhance(noisy, ideal.gains, ideal.strengths)
    assert _snr_db(combed, clean) > _snr_db(plain, clean) + 1
