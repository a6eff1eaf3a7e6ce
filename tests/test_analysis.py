"""The first half of the signal path: exact, and the same however streams and frames are cut into calls."""

from dataclasses import asdict, fields

import numpy as np
import pytest
import reference
import signals
from hypothesis import given, settings
from hypothesis import strategies as st

from percepnet import stft
from percepnet.analysis import Analysis, AnalysisState, analyze
from percepnet.constants import HOP, LOOKAHEAD_FRAMES, MAX_PERIOD, MIN_PERIOD, WINDOW

N_FRAMES = 12
SAMPLES = signals.voices(N_FRAMES)


def _in_pieces(samples: np.ndarray, cuts: set[int]) -> Analysis:
    """Analyse a signal cut after the given frames."""
    state = AnalysisState.initial(len(samples))
    pieces = []
    for piece in np.split(samples, [cut * HOP for cut in sorted(cuts)], axis=-1):
        analysis, state = analyze(piece, state)
        pieces.append(analysis)
    names = [field.name for field in fields(Analysis)]
    return Analysis(
        **{name: np.concatenate([getattr(piece, name) for piece in pieces], axis=1) for name in names}
    )


def _assert_same(one: Analysis, other: Analysis) -> None:
    for field in fields(Analysis):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name), field.name)


def test_the_analysis_equals_the_slow_one():
    samples = signals.voices(8)
    fast, _ = analyze(samples, AnalysisState.initial(4))
    for stream in (0, 2):
        slow = reference.analyze(samples[stream].astype(np.float64))
        np.testing.assert_array_equal(fast.period[stream], slow.period)
        for name in ("noisy", "comb", "energy", "features", "correlation"):
            assert reference.agreement_db(getattr(fast, name)[stream], getattr(slow, name)) > 100, name


def test_spectra_are_those_of_the_input_two_frames_late():
    samples = signals.voices(8)
    analysis, _ = analyze(samples, AnalysisState.initial(4))
    heard = np.pad(samples, ((0, 0), (HOP, 0)))
    np.testing.assert_array_equal(analysis.noisy[:, :LOOKAHEAD_FRAMES], 0)
    expected = stft.forward(stft.windows(heard, WINDOW))[:, :-LOOKAHEAD_FRAMES]
    np.testing.assert_array_equal(analysis.noisy[:, LOOKAHEAD_FRAMES:], expected)


@given(st.sets(st.integers(1, N_FRAMES - 1)))
@settings(max_examples=15, deadline=None)
def test_any_division_into_calls_gives_the_same_bits(cuts):
    _assert_same(_in_pieces(SAMPLES, cuts), _in_pieces(SAMPLES, set()))


@pytest.mark.parametrize("n_streams", [2, 4, 7])
def test_streams_together_equal_each_alone_bit_for_bit(n_streams):
    samples = np.resize(SAMPLES, (n_streams, N_FRAMES * HOP))
    every_frame = set(range(1, N_FRAMES))
    together = _in_pieces(samples, every_frame)
    for stream in range(n_streams):
        row = slice(stream, stream + 1)
        alone = _in_pieces(samples[row], every_frame)
        _assert_same(alone, Analysis(**{name: value[row] for name, value in vars(together).items()}))


def test_the_given_state_stays_as_it_was():
    samples = signals.voices(4)
    _, state = analyze(samples, AnalysisState.initial(4))
    before = asdict(state)  # a deep copy
    first, _ = analyze(samples, state)
    np.testing.assert_equal(asdict(state), before)
    _assert_same(analyze(samples, state)[0], first)


def test_the_caller_may_overwrite_its_buffer():
    """Even one longer than what the state remembers."""
    samples = signals.voices(15)
    expected = _in_pieces(samples, {12})
    buffer = samples[:, : 12 * HOP].copy()
    first, state = analyze(buffer, AnalysisState.initial(4))
    buffer[:] = np.nan
    second, _ = analyze(samples[:, 12 * HOP :], state)
    np.testing.assert_array_equal(first.features, expected.features[:, :12])
    np.testing.assert_array_equal(second.features, expected.features[:, 12:])


@pytest.mark.parametrize(
    "signal",
    [
        np.zeros(10 * HOP),
        np.ones(10 * HOP),
        np.sign(np.sin(2 * np.pi * 100 * (np.arange(10 * HOP) + 0.5) / 48_000)),
        np.clip(signals.white_noise(10 * HOP, level=5), -1, 1),
        np.eye(1, 10 * HOP, 5 * HOP)[0],
        1e-20 * signals.white_noise(10 * HOP),
    ],
    ids=["silence", "DC", "square", "clipped noise", "click", "denormals"],
)
def test_extreme_signals_have_finite_features(signal):
    analysis, _ = analyze(signal[None].astype(np.float32), AnalysisState.initial(1))
    for field in fields(Analysis):
        assert np.isfinite(getattr(analysis, field.name)).all(), field.name
    assert analysis.features[..., 34:].min() >= 0
    assert analysis.features[..., 34:].max() <= 1
    assert analysis.period.min() >= MIN_PERIOD
    assert analysis.period.max() <= MAX_PERIOD
