"""The whole signal path around a network: the same bits for a stream, whoever shares its batch or call."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import reference
import signals
from hypothesis import given, settings
from hypothesis import strategies as st

from percepnet.constants import HOP, LATENCY_SAMPLES
from percepnet.enhancer import Enhancer
from percepnet.synthesis import Controls, FrameControls

N_FRAMES = 12
SAMPLES = signals.voices(N_FRAMES)


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


def test_a_bypass_is_the_input_as_late_faded_over_within_a_hop_on_both_sides(enhancer):
    """As a mix that goes to 0 and back, for the network's part of the cost: it does not hear the frames."""
    wet = np.full((4, N_FRAMES), Controls().wet, np.float32)
    wet[:, 5:9] = 0
    mixed, _ = enhancer.process(
        SAMPLES, enhancer.initial_state(4), FrameControls(wet, np.ones_like(wet, np.float32))
    )
    before, passed, after = np.split(SAMPLES, [5 * HOP, 9 * HOP], axis=1)
    first, state = enhancer.process(before, enhancer.initial_state(4))
    network = {name: part.copy() for name, part in state.network.items()}
    dry, state = enhancer.bypass(passed, state)
    np.testing.assert_equal(state.network, network)
    assert reference.agreement_db(np.concatenate([first, dry], axis=1), mixed[:, : 9 * HOP]) > 120
    start = 6 * HOP - LATENCY_SAMPLES
    np.testing.assert_array_equal(dry[:, HOP:], SAMPLES[:, start : start + 3 * HOP])
    last, _ = enhancer.process(after, state)
    fade_out = np.sin(np.pi / 2 * np.cos(np.pi * (np.arange(HOP) + 0.5) / (2 * HOP)) ** 2) ** 2
    alone, _ = enhancer.process(after, replace(state, overlap=np.zeros_like(state.overlap)))
    faded = SAMPLES[:, 9 * HOP - LATENCY_SAMPLES :][:, :HOP] * fade_out
    np.testing.assert_allclose(last[:, :HOP], alone[:, :HOP] + faded, atol=1e-6)


def test_what_is_bypassed_is_remembered_but_for_the_network(enhancer):
    _, heard = enhancer.process(SAMPLES, enhancer.initial_state(4))
    _, state = enhancer.process(SAMPLES[:, : 3 * HOP], enhancer.initial_state(4))
    for piece in (slice(3 * HOP, 4 * HOP), slice(4 * HOP, N_FRAMES * HOP)):
        _, state = enhancer.bypass(SAMPLES[:, piece], state)
    np.testing.assert_array_equal(state.analysis.samples, heard.analysis.samples)
    np.testing.assert_allclose(state.analysis.spectra, heard.analysis.spectra, atol=1e-4)
    np.testing.assert_allclose(state.analysis.energies, heard.analysis.energies, rtol=1e-4)
    np.testing.assert_allclose(
        state.analysis.pitch.correlation, heard.analysis.pitch.correlation, rtol=1e-4, atol=1e-6
    )


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
