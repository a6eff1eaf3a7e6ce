"""The resampler keeps the passband, stops the rest, and says exactly how late it is."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from percepnet.errors import ParameterError
from percepnet.resample import Resampler, shortest_delay

RATES = [8_000, 11_025, 12_345, 16_000, 22_050, 24_000, 32_000, 44_100, 88_200, 96_000, 191_999, 192_000]
WAYS = [(rate, 48_000) for rate in RATES] + [(48_000, rate) for rate in RATES]


def tone(frequency_hz: float, rate: int, seconds: float = 0.2) -> np.ndarray:
    return np.cos(2 * np.pi * frequency_hz * np.arange(int(seconds * rate)) / rate).astype(np.float32)


def decibels(signal: np.ndarray) -> float:
    return float(20 * np.log10(np.max(np.abs(signal)) + 1e-12))


@pytest.mark.parametrize(("rate_in", "rate_out"), WAYS)
@pytest.mark.parametrize("place", [0.0, 0.1, 0.3, 0.45])
def test_tones_up_to_0_45_of_the_lower_rate_come_through_exactly_as_late_as_stated(rate_in, rate_out, place):
    """Compared with the ideal delayed tone in float64, once the silence before the tone has passed."""
    frequency = place * min(rate_in, rate_out)
    resampler = Resampler(rate_in, rate_out)
    output = resampler.push(tone(frequency, rate_in))
    times = np.arange(len(output)) / rate_out - float(resampler.delay)
    ideal = np.cos(2 * np.pi * frequency * times)
    settled = times > float(resampler.delay)
    assert decibels(output[settled] - ideal[settled]) < -80


@pytest.mark.parametrize(
    ("rate_in", "rate_out", "place"),
    [(*way, place) for way in WAYS for place in (0.55, 0.6, 0.8, 1.0) if place * way[1] < way[0] / 2],
)
def test_tones_that_the_lower_rate_cannot_hold_are_stopped(rate_in, rate_out, place):
    output = Resampler(rate_in, rate_out).push(tone(place * rate_out, rate_in))
    assert decibels(output[len(output) // 3 :]) < -80


@pytest.mark.parametrize("rate", [8_000, 16_000, 24_000])
def test_images_of_the_input_are_stopped(rate):
    """A tone at 0.4 of the input rate has its first image at 0.6 of it; a long window keeps the two apart."""
    output = Resampler(rate, 48_000).push(tone(0.4 * rate, rate, seconds=0.5))[4_800:]
    spectrum = np.abs(np.fft.rfft(output * np.kaiser(len(output), 14)))
    frequency = np.fft.rfftfreq(len(output), 1 / 48_000)
    assert decibels(spectrum[frequency > 0.55 * rate] / spectrum.max()) < -80


@pytest.mark.parametrize(("rate_in", "rate_out"), [(16_000, 48_000), (48_000, 16_000), (96_000, 48_000)])
def test_the_phase_is_linear(rate_in, rate_out):
    """The response to one click is symmetric about the stated delay."""
    resampler = Resampler(rate_in, rate_out)
    click = np.zeros(rate_in // 50, np.float32)
    click[48] = 1
    response = resampler.push(click)
    centre = (Fraction(48, rate_in) + resampler.delay) * rate_out
    reach = int(shortest_delay(rate_in, rate_out) * rate_out)
    assert centre.denominator == 1, "the click must fall on an output sample"
    middle = int(centre)
    before, after = response[middle - reach : middle + 1], response[middle : middle + reach + 1]
    np.testing.assert_allclose(before, after[::-1], atol=1e-6)


@pytest.mark.parametrize(("rate_in", "rate_out"), WAYS)
def test_as_many_samples_come_out_as_the_input_lasts(rate_in, rate_out):
    resampler = Resampler(rate_in, rate_out)
    n_in = n_out = 0
    for length in (1, 0, 7, 100, 1, 1, 333, 2):
        n_in += length
        n_out += len(resampler.push(np.zeros(length, np.float32)))
        assert n_out == math.ceil(Fraction(n_in * rate_out, rate_in))


@settings(deadline=None, max_examples=40)
@given(way=st.sampled_from(WAYS), cuts=st.lists(st.integers(0, 700), max_size=8))
def test_any_chunking_gives_the_same_samples(way, cuts):
    signal = np.random.default_rng(0).standard_normal(3_000).astype(np.float32)
    whole = Resampler(*way).push(signal)
    resampler = Resampler(*way)
    edges = np.minimum(np.cumsum([0, *cuts]), len(signal))
    chunks = [signal[a:b] for a, b in zip(edges, [*edges[1:], len(signal)], strict=True)]
    np.testing.assert_array_equal(np.concatenate([resampler.push(chunk) for chunk in chunks]), whole)


@pytest.mark.parametrize(("rate_in", "rate_out"), [(16_000, 48_000), (48_000, 44_100), (12_345, 48_000)])
def test_signals_that_share_a_batch_come_out_as_each_alone(rate_in, rate_out):
    signals = np.random.default_rng(0).standard_normal((5, 9_000)).astype(np.float32)
    together = Resampler(rate_in, rate_out, (5,)).push(signals)
    for signal, result in zip(signals, together, strict=True):
        np.testing.assert_array_equal(Resampler(rate_in, rate_out).push(signal), result)


def test_a_longer_delay_can_be_asked_for():
    """Here the delay is stretched until a way there and back at 22.05 kHz takes whole samples."""
    there = Resampler(22_050, 48_000)
    back = Resampler(48_000, 22_050, delay=Fraction(60, 22_050) - there.delay)
    signal = tone(1_000, 22_050)
    output = back.push(there.push(signal))
    assert len(output) == len(signal)
    assert decibels(output[200 : len(signal)] - signal[140 : len(signal) - 60]) < -80


@pytest.mark.parametrize("delay", [Fraction(1, 48_000), Fraction(1, 10) + Fraction(1, 1_000_003)])
def test_a_delay_too_short_or_between_the_phases_is_refused(delay):
    with pytest.raises(ParameterError, match="delay"):
        Resampler(48_000, 22_050, delay=delay)


@pytest.mark.parametrize("rate", [0, -48_000, 7_999, 192_001, 44_100.5, "48000", None])
def test_rates_outside_8_to_192_khz_are_refused(rate):
    with pytest.raises(ParameterError, match="8000 to 192000"):
        Resampler(rate, 48_000)


def test_the_caller_may_overwrite_its_buffer():
    signal = np.random.default_rng(0).standard_normal(1_000).astype(np.float32)
    expected = Resampler(16_000, 48_000).push(signal)
    resampler = Resampler(16_000, 48_000)
    buffer = signal[:500].copy()
    first = resampler.push(buffer)
    buffer[:] = 9
    np.testing.assert_array_equal(np.concatenate([first, resampler.push(signal[500:])]), expected)
