"""The comb filter keeps what repeats with the period, thins the rest, and hears only what it may."""

import numpy as np
import pytest
import reference
import signals

from percepnet import comb
from percepnet.constants import COMB_ORDER, HOP, LOOKAHEAD_FRAMES, MAX_PERIOD, MIN_PERIOD, WINDOW

ALL_PERIODS = np.arange(MIN_PERIOD, MAX_PERIOD + 1)
PERIODS = [96, 97, 191, 192, 193, 320, 321, 480, 481, 768]
"""Both ends, and both sides of the periods at which the look-ahead loses a tap."""


def _samples(n_streams: int, n_frames: int) -> np.ndarray:
    """Noise as long as `filter_frames` needs it."""
    length = comb.REACH + WINDOW + comb.LOOKAHEAD + (n_frames - 1) * HOP
    return signals.white_noise(n_streams, length).astype(np.float32)


def test_the_taps_of_every_period_are_the_slow_ones():
    orders = range(-COMB_ORDER, COMB_ORDER + 1)
    slow = [[reference.comb_taps(period).get(k, 0) for k in orders] for period in ALL_PERIODS]
    assert reference.agreement_db(comb.taps(ALL_PERIODS), np.array(slow)) > 130


def test_the_taps_of_every_period_sum_to_one():
    np.testing.assert_allclose(comb.taps(ALL_PERIODS).sum(axis=-1), 1, atol=1e-6)


def test_high_voices_use_past_and_future_alike_and_low_ones_lean_on_the_past():
    high, low = comb.taps(np.array([192, 768]))
    np.testing.assert_array_equal(high, high[::-1])
    assert (high > 0).all()
    assert np.count_nonzero(low[:COMB_ORDER]) == LOOKAHEAD_FRAMES * HOP // 768 == 1
    assert (low[COMB_ORDER:] > 0).all()


def test_the_filter_equals_the_slow_one():
    samples = _samples(2, len(PERIODS))
    period = np.array([PERIODS, PERIODS[::-1]])
    fast = comb.filter_frames(samples, period)
    assert fast.dtype == np.float32
    slow = [
        [
            reference.comb_window(samples[stream].astype(np.float64), comb.REACH + frame * HOP, int(lag))
            for frame, lag in enumerate(period[stream])
        ]
        for stream in range(2)
    ]
    assert reference.agreement_db(fast, np.array(slow)) > 130


@pytest.mark.parametrize("period", PERIODS)
def test_a_signal_of_that_period_passes_unchanged(period):
    length = _samples(1, 2).shape[-1]
    signal = np.resize(signals.white_noise(period), length).astype(np.float32)[None]
    filtered = comb.filter_frames(signal, np.full((1, 2), period))
    for frame in range(2):
        start = comb.REACH + frame * HOP
        np.testing.assert_allclose(filtered[0, frame], signal[0, start : start + WINDOW], atol=1e-6)


@pytest.mark.parametrize("period", PERIODS)
def test_white_noise_is_thinned_by_the_sum_of_squared_taps(period):
    samples = _samples(1, 200)
    filtered = comb.filter_frames(samples, np.full((1, 200), period))
    thinned = np.mean(filtered.astype(np.float64) ** 2) / np.mean(samples.astype(np.float64) ** 2)
    np.testing.assert_allclose(thinned, np.sum(comb.taps(np.array(period)) ** 2), rtol=0.05)


@pytest.mark.parametrize("period", PERIODS)
def test_nothing_beyond_the_look_ahead_is_read(period):
    samples = _samples(1, 3)
    samples[:, comb.REACH + WINDOW + comb.LOOKAHEAD :] = np.nan  # what the first frame may not hear yet
    filtered = comb.filter_frames(samples, np.full((1, 3), period))
    assert np.isfinite(filtered[:, 0]).all()


@pytest.mark.parametrize("period", PERIODS)
def test_nothing_before_its_reach_is_read(period):
    samples = _samples(1, 3)
    samples[:, : 2 * HOP] = np.nan  # what the third frame no longer needs
    filtered = comb.filter_frames(samples, np.full((1, 3), period))
    assert np.isfinite(filtered[:, 2]).all()


def test_a_window_does_not_depend_on_the_windows_beside_it():
    """More frames than are filtered in one block, several streams."""
    n_streams, n_frames = 3, 30
    samples = _samples(n_streams, n_frames)
    period = np.random.default_rng(0).integers(MIN_PERIOD, MAX_PERIOD + 1, (n_streams, n_frames))
    together = comb.filter_frames(samples, period)
    needed = comb.REACH + WINDOW + comb.LOOKAHEAD
    for stream in range(n_streams):
        for frame in range(n_frames):
            alone = samples[stream : stream + 1, frame * HOP : frame * HOP + needed]
            np.testing.assert_array_equal(
                comb.filter_frames(alone, period[stream : stream + 1, frame : frame + 1])[0, 0],
                together[stream, frame],
            )
