"""The whole signal path around a network: the same bits for a stream, whoever shares its batch or call."""

from dataclasses import asdict

import numpy as np
import pytest
import reference
import signals
from hypothesis import given, settings
from hypothesis import strategies as st

from percepnet.constants import HOP, LATENCY_SAMPLES
from percepnet.enhancer import Enhancer
from percepnet.model import Model
from percepnet.synthesis import Controls

N_FRAMES = 12
SAMPLES = signals.voices(N_FRAMES)


@pytest.fixture(scope="module")
def enhancer(random_model: Model) -> Enhancer:
    return Enhancer(random_model)


def _in_pieces(enhancer: Enhancer, samples: np.ndarray, cuts: set[int]) -> np.ndarray:
    """Enhance a signal cut after the given frames."""
    state = enhancer.initial_state(len(samples))
    pieces = []
    for piece in np.split(samples, [cut * HOP for cut in sorted(cuts)], axis=-1):
        enhanced, state = enhancer.process(piece, state)
        pieces.append(enhanced)
    return np.concatenate(pieces, axis=-1)


def test_output_has_the_inputs_shape_and_differs_from_it(enhancer):
    enhanced = _in_pieces(enhancer, SAMPLES, set())
    assert enhanced.shape == SAMPLES.shape
    assert enhanced.dtype == np.float32
    delayed = np.pad(SAMPLES, ((0, 0), (LATENCY_SAMPLES, 0)))[:, : N_FRAMES * HOP]
    assert reference.agreement_db(enhanced, delayed) < 40


@given(st.sets(st.integers(1, N_FRAMES - 1)))
@settings(max_examples=15, deadline=None)
def test_any_division_into_calls_gives_the_same_bits(enhancer, cuts):
    np.testing.assert_array_equal(_in_pieces(enhancer, SAMPLES, cuts), _in_pieces(enhancer, SAMPLES, set()))


@pytest.mark.parametrize("n_streams", [2, 4, 9])
def test_streams_together_equal_each_alone_bit_for_bit(enhancer, n_streams):
    samples = np.resize(SAMPLES, (n_streams, N_FRAMES * HOP))
    every_frame = set(range(1, N_FRAMES))
    together = _in_pieces(enhancer, samples, every_frame)
    for stream in range(n_streams):
        row = slice(stream, stream + 1)
        np.testing.assert_array_equal(_in_pieces(enhancer, samples[row], every_frame), together[row])


def test_a_loud_neighbour_changes_nothing(enhancer):
    together = _in_pieces(enhancer, np.stack([SAMPLES[0], 1000 * SAMPLES[3]]), set())
    np.testing.assert_array_equal(together[:1], _in_pieces(enhancer, SAMPLES[:1], set()))


def test_the_given_state_stays_as_it_was(enhancer):
    _, state = enhancer.process(SAMPLES, enhancer.initial_state(4))
    before = asdict(state)  # a deep copy
    first, _ = enhancer.process(SAMPLES, state)
    np.testing.assert_equal(asdict(state), before)
    np.testing.assert_array_equal(enhancer.process(SAMPLES, state)[0], first)


def test_the_caller_may_overwrite_its_buffer(enhancer):
    expected = _in_pieces(enhancer, SAMPLES, {5})
    buffer = SAMPLES[:, : 5 * HOP].copy()
    first, state = enhancer.process(buffer, enhancer.initial_state(4))
    buffer[:] = np.nan
    second, _ = enhancer.process(SAMPLES[:, 5 * HOP :], state)
    np.testing.assert_array_equal(np.concatenate([first, second], axis=-1), expected)


def test_a_mix_of_0_is_the_input_1440_samples_late(enhancer):
    enhanced, _ = enhancer.process(SAMPLES, enhancer.initial_state(4), Controls(mix=0))
    assert reference.agreement_db(enhanced[:, LATENCY_SAMPLES:], SAMPLES[:, :-LATENCY_SAMPLES]) > 120


@pytest.mark.parametrize(
    "signal",
    [
        np.zeros(20 * HOP),
        np.ones(20 * HOP),
        np.sign(np.sin(2 * np.pi * 100 * (np.arange(20 * HOP) + 0.5) / 48_000)),
        np.clip(signals.white_noise(20 * HOP, level=5), -1, 1),
        np.eye(1, 20 * HOP, 5 * HOP)[0],
    ],
    ids=["silence", "DC", "square", "clipped noise", "click"],
)
def test_extreme_signals_come_out_finite_and_no_louder_than_twice(enhancer, signal):
    enhanced, _ = enhancer.process(signal[None].astype(np.float32), enhancer.initial_state(1))
    assert np.isfinite(enhanced).all()
    assert np.mean(enhanced**2) <= 4 * np.mean(signal**2)


def test_silence_stays_silent(enhancer):
    enhanced, _ = enhancer.process(np.zeros((1, 20 * HOP), np.float32), enhancer.initial_state(1))
    np.testing.assert_array_equal(enhanced, 0)
