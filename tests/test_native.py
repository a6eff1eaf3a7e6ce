"""The compiled signal path: numpy's results; refused arrays."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import reference
import signals
import soundfile

from percepnet import native
from percepnet.analysis import AnalysisState, analyze
from percepnet.constants import HOP
from percepnet.enhancer import Enhancer
from percepnet.features import normalize
from percepnet.model import Manifest
from percepnet.rows import copy, take
from percepnet.synthesis import Controls, FrameControls, synthesize

N_FRAMES = 40
NOISY, _ = soundfile.read(
    Path(__file__).parent / "data" / "noisy.wav", frames=20 * N_FRAMES * HOP, dtype="float32"
)
# More streams than the compiled code works on at once: voices in noise at several levels.
SAMPLES = np.stack([np.roll(NOISY, -3000 * i)[: N_FRAMES * HOP] * 0.7**i for i in range(19)])
ROWS = np.arange(len(SAMPLES))
STATE = AnalysisState.initial(len(SAMPLES))

compiled = pytest.mark.skipif(not native.AVAILABLE, reason="no C compiler was there")


@pytest.fixture
def manifest(enhancer: Enhancer) -> Manifest:
    return enhancer.model.manifest


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no GCC")
def test_it_is_there_where_a_compiler_is() -> None:
    assert native.AVAILABLE


@compiled
def test_the_analysis_is_that_of_numpy(manifest: Manifest) -> None:
    state = copy(STATE)
    found = native.analyze(SAMPLES, state, ROWS, manifest.feature_mean, manifest.feature_scale)
    expected, expected_state = analyze(SAMPLES, STATE)
    features = normalize(expected.features, manifest.feature_mean, manifest.feature_scale)
    np.testing.assert_array_equal(found.period, expected.period)
    np.testing.assert_allclose(found.correlation, expected.correlation, atol=1e-4)
    np.testing.assert_allclose(found.energy, expected.energy, rtol=1e-3, atol=1e-9)
    np.testing.assert_allclose(found.features, features, atol=1e-3)
    np.testing.assert_array_equal(state.samples, expected_state.samples)
    np.testing.assert_allclose(state.spectra, expected_state.spectra, atol=1e-5)
    np.testing.assert_allclose(state.energies, expected_state.energies, rtol=1e-3, atol=1e-9)
    np.testing.assert_allclose(state.pitch.scores, expected_state.pitch.scores, atol=1e-4)
    np.testing.assert_allclose(state.pitch.correlation, expected_state.pitch.correlation, atol=1e-4)


@compiled
@pytest.mark.parametrize("controls", ["steady", "moving", "of each stream"])
def test_the_synthesis_is_that_of_numpy(manifest: Manifest, controls: str) -> None:
    rng = np.random.default_rng(0)
    shape = (len(SAMPLES), N_FRAMES)
    gains, strengths = rng.random((2, *shape, 34), np.float32)
    wet, sharpening = rng.random((2, *shape), np.float32)
    chosen = {
        "steady": FrameControls.of(Controls(attenuation_limit_db=12, mix=0.9, postfilter=0.7)),
        "moving": FrameControls(wet, sharpening),
        "of each stream": FrameControls(wet[:, :1], sharpening[:1, :1]),
    }[controls]
    overlap = rng.normal(0, 0.1, (len(SAMPLES), HOP)).astype(np.float32)
    before = overlap.copy()
    frames = native.analyze(SAMPLES, copy(STATE), ROWS, manifest.feature_mean, manifest.feature_scale)
    enhanced = native.synthesize(frames, gains, strengths, overlap, ROWS, chosen)
    expected, expected_overlap = synthesize(analyze(SAMPLES, STATE)[0], gains, strengths, before, chosen)
    assert reference.agreement_db(enhanced, expected) > 100
    np.testing.assert_allclose(overlap, expected_overlap, atol=1e-6)


@compiled
def test_a_state_that_is_not_finite_gives_a_period_all_the_same(manifest: Manifest) -> None:
    state = AnalysisState.initial(2)
    state.pitch.correlation[1] = np.inf
    mean, scale = manifest.feature_mean, manifest.feature_scale
    found = native.analyze(SAMPLES[:2], state, ROWS[:2], mean, scale)
    assert (found.period >= 96).all()
    assert (found.period <= 768).all()


@compiled
def test_other_rows_of_the_state_stay_as_they_are(enhancer: Enhancer) -> None:
    state = enhancer.initial_state(6)
    _, state = enhancer.process(signals.voices(4)[[0, 1, 2, 3, 0, 1]], state)
    before, chosen = copy(state), np.array([1, 2, 5])
    samples = np.ascontiguousarray(SAMPLES[:3, : 3 * HOP])
    enhanced, _ = enhancer.advance(samples, state, chosen)
    alone, after = enhancer.process(samples, take(before, chosen))
    np.testing.assert_array_equal(enhanced, alone)
    for part in ("samples", "spectra", "energies"):
        now, then = getattr(state.analysis, part), getattr(before.analysis, part)
        np.testing.assert_array_equal(now[chosen], getattr(after.analysis, part))
        np.testing.assert_array_equal(now[[0, 3, 4]], then[[0, 3, 4]])
    np.testing.assert_array_equal(state.overlap[chosen], after.overlap)
    np.testing.assert_array_equal(state.overlap[[0, 3, 4]], before.overlap[[0, 3, 4]])


@compiled
def test_numpy_takes_over_where_the_compiled_code_was(
    enhancer: Enhancer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And enhances much the same: the network's integers may fall to one side or the other."""
    first, second = np.split(SAMPLES[:4], 2, axis=1)
    begun, state = enhancer.process(first, enhancer.initial_state(4))
    whole, _ = enhancer.process(SAMPLES[:4], enhancer.initial_state(4))
    monkeypatch.setattr(native, "AVAILABLE", False)
    ended, _ = enhancer.process(second, state)
    assert reference.agreement_db(np.concatenate([begun, ended], axis=1), whole) > 50


def test_without_it_any_division_gives_the_same_bits(
    enhancer: Enhancer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "AVAILABLE", False)
    whole, _ = enhancer.process(SAMPLES[:3], enhancer.initial_state(3))
    state = enhancer.initial_state(3)
    for start in range(0, N_FRAMES * HOP, HOP):
        piece, _ = enhancer.advance(SAMPLES[:3, start : start + HOP], state, slice(None))
        np.testing.assert_array_equal(piece, whole[:, start : start + HOP])


@compiled
@pytest.mark.parametrize(
    ("rows", "shape", "error"),
    [
        ([0, 2], (2, HOP), IndexError),
        ([-1, 0], (2, HOP), IndexError),
        ([0], (1, HOP + 1), ValueError),
        ([0, 1], (4, HOP), ValueError),
        ([], (0, HOP), ValueError),
    ],
    ids=["row beyond the state", "negative row", "part of a frame", "fewer rows than streams", "no stream"],
)
def test_memory_outside_an_array_is_never_touched(
    manifest: Manifest, rows: list[int], shape: tuple[int, int], error: type[Exception]
) -> None:
    samples, state = np.zeros(shape, np.float32), AnalysisState.initial(2)
    with pytest.raises(error):
        native.analyze(
            samples, state, np.array(rows, np.int64), manifest.feature_mean, manifest.feature_scale
        )


@compiled
def test_states_of_other_sizes_are_refused(manifest: Manifest) -> None:
    state = AnalysisState.initial(2)
    state.spectra = state.spectra[:1]
    with pytest.raises(ValueError, match="bytes"):
        native.analyze(SAMPLES[:2], state, ROWS[:2], manifest.feature_mean, manifest.feature_scale)
    frames = native.analyze(
        SAMPLES[:2], AnalysisState.initial(2), ROWS[:2], manifest.feature_mean, manifest.feature_scale
    )
    gains = np.ones((2, N_FRAMES - 1, 34), np.float32)
    with pytest.raises(ValueError, match="bytes"):
        native.synthesize(
            frames, gains, gains, np.zeros((2, HOP), np.float32), ROWS[:2], FrameControls.of(Controls())
        )
