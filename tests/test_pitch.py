"""The tracker finds the period of what is periodic, and says how periodic it is."""

import numpy as np
import pytest
import reference
import signals

from percepnet import pitch
from percepnet.analysis import AnalysisState, analyze
from percepnet.constants import HOP, MAX_PERIOD, MIN_PERIOD, SAMPLE_RATE

FUNDAMENTALS_HZ = np.geomspace(62.5, 500, 16)
SETTLING = 10  # frames until the passage and the delayed windows hold nothing but the signal


def _track(signal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Periods and correlations of a signal's frames."""
    n_samples = len(signal) // HOP * HOP
    analysis, _ = analyze(signal[None, :n_samples].astype(np.float32), AnalysisState.initial(1))
    return analysis.period[0], analysis.correlation[0]


def _assert_period(signal: np.ndarray, f0_hz: float, *, tolerance: float) -> None:
    period, _ = _track(signal)
    np.testing.assert_allclose(period[SETTLING:], SAMPLE_RATE / f0_hz, atol=tolerance, err_msg=f"{f0_hz} Hz")


@pytest.mark.parametrize("tilt", [0.0, 1.0])
def test_harmonics_have_the_period_of_their_fundamental(tilt):
    for f0_hz in FUNDAMENTALS_HZ:
        _assert_period(signals.harmonics(f0_hz, 20 * HOP, tilt=tilt), f0_hz, tolerance=1)


def test_harmonics_without_their_fundamental_have_its_period():
    """A telephone passes nothing below 300 Hz."""
    for f0_hz in FUNDAMENTALS_HZ:
        _assert_period(signals.harmonics(f0_hz, 20 * HOP, bottom_hz=300, top_hz=3400), f0_hz, tolerance=1)


@pytest.mark.parametrize("f0_hz", [62.5, 80, 110, 150, 220, 330, 490])
def test_a_tone_has_its_own_period(f0_hz):
    """Without harmonics the top of the correlation is flat: within 3 %, and never an octave off."""
    tone = signals.harmonics(f0_hz, 20 * HOP, top_hz=f0_hz)
    _assert_period(tone, f0_hz, tolerance=0.03 * SAMPLE_RATE / f0_hz)


def test_a_vibrato_is_followed():
    n_samples = 40 * HOP
    f0_hz = signals.vibrato(140, n_samples)
    period, _ = _track(signals.harmonics(f0_hz, n_samples))
    # A frame tells of the passage whose middle lay 30 ms before its newest sample.
    middles = (np.arange(SETTLING, 40) + 1) * HOP - 3 * HOP
    np.testing.assert_allclose(period[SETTLING:], SAMPLE_RATE / f0_hz[middles], rtol=0.02)


@pytest.mark.parametrize(("before_hz", "after_hz"), [(100, 200), (200, 100), (240, 90)])
def test_a_change_of_speaker_is_followed_within_100_ms(before_hz, after_hz):
    half = 20 * HOP
    signal = np.concatenate([signals.harmonics(before_hz, half), signals.harmonics(after_hz, half)])
    period, _ = _track(signal)
    np.testing.assert_allclose(period[SETTLING:20], SAMPLE_RATE / before_hz, atol=1)
    np.testing.assert_allclose(period[30:], SAMPLE_RATE / after_hz, atol=1)


def test_a_voice_in_noise_keeps_its_period():
    n_samples = 60 * HOP
    voice = signals.harmonics(120, n_samples)
    noise = signals.white_noise(n_samples, level=float(voice.std()))
    period, _ = _track(voice + noise)
    off = np.abs(period[SETTLING:] - SAMPLE_RATE / 120) > 4
    assert off.mean() < 0.05


def test_a_voice_correlates_and_noise_does_not():
    n_samples = 60 * HOP
    _, voiced = _track(signals.harmonics(150, n_samples))
    _, noisy = _track(signals.white_noise(n_samples))
    assert voiced[SETTLING:].min() > 0.7
    assert noisy[SETTLING:].mean() < 0.3


def test_silence_does_not_correlate():
    period, correlation = _track(np.zeros(10 * HOP))
    np.testing.assert_array_equal(correlation, 0)
    assert ((period >= MIN_PERIOD) & (period <= MAX_PERIOD)).all()


def test_correlations_equal_the_slow_ones():
    passages = np.stack([signals.voices(4)[stream, : pitch.PASSAGE] for stream in range(4)])
    fast = pitch.correlate(passages[:, None])
    for stream, passage in enumerate(passages.astype(np.float64)):
        assert reference.agreement_db(fast[stream, 0], reference.correlate(passage)) > 100


def test_the_track_is_the_best_of_all_tracks():
    """Against a search over all pairs of periods, on correlations without any order."""
    shape = 2, 12, len(reference.LAGS) + 2
    correlation = np.random.default_rng(3).uniform(-0.2, 1, shape).astype(np.float32)
    period, strength, _ = pitch.track(correlation, pitch.PitchState.initial(2))
    for stream in range(2):
        slow_period, slow_strength = reference.track(correlation[stream].astype(np.float64))
        np.testing.assert_array_equal(period[stream], slow_period)
        np.testing.assert_allclose(strength[stream], slow_strength, atol=1e-6)


def test_a_track_does_not_depend_on_the_calls_or_streams_it_is_cut_into():
    shape = 3, 8, len(reference.LAGS) + 2
    correlation = np.random.default_rng(4).uniform(0, 1, shape).astype(np.float32)
    period, strength, _ = pitch.track(correlation, pitch.PitchState.initial(3))
    for stream in range(3):
        state = pitch.PitchState.initial(1)
        for frame in range(8):
            one = correlation[stream : stream + 1, frame : frame + 1]
            alone_period, alone_strength, state = pitch.track(one, state)
            assert alone_period.item() == period[stream, frame]
            assert alone_strength.item() == strength[stream, frame]
