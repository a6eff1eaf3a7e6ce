"""The second half of the signal path: transparent when nothing is asked, bounded by the controls."""

import numpy as np
import pytest
import reference
import signals

from percepnet.analysis import Analysis, AnalysisState, analyze
from percepnet.bands import band_energy, to_bins
from percepnet.constants import HOP, LATENCY_SAMPLES, N_BANDS
from percepnet.errors import ParameterError
from percepnet.synthesis import MAX_ATTENUATION_LIMIT_DB, Controls, restoration, synthesize

N_FRAMES = 12
SAMPLES = signals.voices(N_FRAMES)
ANALYSIS, _ = analyze(SAMPLES, AnalysisState.initial(4))
SILENCE = np.zeros((4, HOP), np.float32)
BARE = Controls(MAX_ATTENUATION_LIMIT_DB, postfilter=0)
"""The gains as they are."""


def _bands(value: float) -> np.ndarray:
    """The same value in every band of every frame."""
    return np.full((4, N_FRAMES, N_BANDS), value, np.float32)


def _random_bands(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((4, N_FRAMES, N_BANDS), dtype=np.float32)


def _energy_db(samples: np.ndarray) -> float:
    return float(10 * np.log10(np.mean(samples.astype(np.float64) ** 2)))


@pytest.mark.parametrize("controls", [Controls(), BARE])
def test_unit_gains_without_comb_give_the_input_1440_samples_late(controls):
    samples, _ = synthesize(ANALYSIS, _bands(1), _bands(0), SILENCE, controls)
    assert samples.shape == SAMPLES.shape
    assert samples.dtype == np.float32
    assert LATENCY_SAMPLES == 1440
    assert np.abs(samples[:, :1440]).max() < 1e-6
    assert reference.agreement_db(samples[:, 1440:], SAMPLES[:, :-1440]) > 120


@pytest.mark.parametrize("sharpening", [0, 0.3, 1])
@pytest.mark.parametrize("limit_db", [12, 100])
def test_samples_equal_the_slow_ones(sharpening, limit_db):
    gains, strengths = _random_bands(1), _random_bands(2)
    samples, _ = synthesize(ANALYSIS, gains, strengths, SILENCE, Controls(limit_db, postfilter=sharpening))
    for stream in (0, 3):
        double = {name: value[stream].astype(np.complex128) for name, value in vars(ANALYSIS).items()}
        frames = reference.Frames(**{**double, "energy": double["energy"].real})
        g, r = gains[stream].astype(np.float64), strengths[stream].astype(np.float64)
        slow = reference.synthesize(frames, g, r, sharpening=sharpening, limit_db=limit_db)
        assert reference.agreement_db(samples[stream], slow) > 110


def test_gains_multiply_amplitude():
    samples, _ = synthesize(ANALYSIS, _bands(0.5), _bands(0), SILENCE, BARE)
    # The limit leaves the input, 100 dB down.
    assert reference.agreement_db(samples[:, 1440:], 0.5 * SAMPLES[:, :-1440].astype(np.float64)) > 99


def test_the_comb_mix_keeps_the_energy_of_broad_bands():
    """Noise loses most of its energy in the comb filter and gets it back, band by band."""
    analysis, _ = analyze(signals.white_noise(1, 40 * HOP).astype(np.float32), AnalysisState.initial(1))
    thinned = band_energy(analysis.comb)[:, 10:, 20:].sum()
    mixed = analysis.comb * to_bins(restoration(analysis.energy, band_energy(analysis.comb)))
    restored = band_energy(mixed)[:, 10:, 20:].sum()
    energy = analysis.energy[:, 10:, 20:].sum()
    assert 10 * np.log10(thinned / energy) < -5
    assert abs(10 * np.log10(restored / energy)) < 0.5


def test_a_mix_of_0_is_the_delayed_input():
    samples, _ = synthesize(ANALYSIS, _random_bands(1), _random_bands(2), SILENCE, Controls(mix=0))
    assert reference.agreement_db(samples[:, 1440:], SAMPLES[:, :-1440]) > 120


def test_a_mix_in_between_is_the_weighted_sum_of_input_and_output():
    gains, strengths = _random_bands(1), _random_bands(2)
    none, half, whole = (
        synthesize(ANALYSIS, gains, strengths, SILENCE, Controls(mix=mix))[0].astype(np.float64)
        for mix in (0, 0.5, 1)
    )
    assert reference.agreement_db(half, (none + whole) / 2) > 110


@pytest.mark.parametrize("limit_db", [0, 6, 20, 100])
def test_the_attenuation_limit_is_what_zero_gains_attenuate_by(limit_db):
    controls = Controls(attenuation_limit_db=limit_db)
    samples, _ = synthesize(ANALYSIS, _bands(0), _random_bands(0), SILENCE, controls)
    for stream in range(4):
        attenuation_db = _energy_db(SAMPLES[stream, :-1440]) - _energy_db(samples[stream, 1440:])
        assert attenuation_db == pytest.approx(limit_db, abs=0.02)


def test_the_default_limit_leaves_noise_audible():
    """Nothing is gated to silence unless a caller asks for it."""
    samples, _ = synthesize(ANALYSIS, _bands(0), _bands(0), SILENCE, Controls())
    left_db = _energy_db(samples[:, 1440:]) - _energy_db(SAMPLES[:, :-1440])
    assert left_db == pytest.approx(-Controls.attenuation_limit_db, abs=1e-3)
    assert 12 <= Controls.attenuation_limit_db < MAX_ATTENUATION_LIMIT_DB


def test_a_full_postfilter_lowers_noise_and_a_half_one_less():
    """Gains are low where there is noise: in all bands but one, which keeps its level."""
    gains = _bands(0.1)
    gains[..., 5] = 1
    none, half, full = (
        _energy_db(synthesize(ANALYSIS, gains, _bands(0), SILENCE, Controls(postfilter=strength))[0])
        for strength in (0, 0.5, 1)
    )
    assert full < half < none


def test_no_gains_attenuate_by_more_than_the_limit():
    controls = Controls(attenuation_limit_db=12)
    samples, _ = synthesize(ANALYSIS, _random_bands(1) ** 4, _bands(0), SILENCE, controls)
    for stream in range(4):
        assert _energy_db(samples[stream, 1440:]) > _energy_db(SAMPLES[stream, :-1440]) - 12


@pytest.mark.parametrize(
    "wrong",
    [
        {"mix": -0.1},
        {"mix": 1.1},
        {"mix": float("nan")},
        {"attenuation_limit_db": -1},
        {"attenuation_limit_db": 100.1},
        {"attenuation_limit_db": float("nan")},
        {"postfilter": -0.1},
        {"postfilter": 1.1},
        {"postfilter": float("nan")},
    ],
)
def test_controls_out_of_range_are_refused(wrong):
    with pytest.raises(ParameterError, match=f"{next(iter(wrong))}: .*; accepted are 0 to"):
        Controls(**wrong)


def test_frame_by_frame_equals_the_whole_bit_for_bit():
    gains, strengths = _random_bands(1), _random_bands(2)
    whole, last = synthesize(ANALYSIS, gains, strengths, SILENCE, Controls())
    overlap, parts = SILENCE, []
    for frame in range(N_FRAMES):
        one = slice(frame, frame + 1)
        piece = Analysis(**{name: value[:, one] for name, value in vars(ANALYSIS).items()})
        samples, overlap = synthesize(piece, gains[:, one], strengths[:, one], overlap, Controls())
        parts.append(samples)
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
    np.testing.assert_array_equal(overlap, last)


def test_a_stream_does_not_depend_on_the_streams_beside_it():
    gains, strengths = _random_bands(1), _random_bands(2)
    together, _ = synthesize(ANALYSIS, gains, strengths, SILENCE, Controls())
    for stream in range(4):
        row = slice(stream, stream + 1)
        alone = Analysis(**{name: value[row] for name, value in vars(ANALYSIS).items()})
        samples, _ = synthesize(alone, gains[row], strengths[row], SILENCE[row], Controls())
        np.testing.assert_array_equal(samples, together[row])
