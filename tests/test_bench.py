"""The benchmark: its clocks change nothing, its reference is right, its report is complete."""

import os

import numpy as np
import pytest

from percepnet import bands, bench
from percepnet.constants import HOP
from percepnet.enhancer import Enhancer
from percepnet.model import Model


@pytest.fixture
def engine(random_model: Model) -> Enhancer:
    return Enhancer(random_model)


def test_the_signal_path_is_as_exact_as_float32_can_be(engine):
    assert bench.error_db(engine, 0.5) < -120


def test_a_small_fault_shows_against_the_reference(engine, monkeypatch):
    """A reference with bands that are off by a thousandth is far from the signal path."""
    weights = bands.band_weights() * 1.001
    monkeypatch.setattr(bands, "band_weights", lambda: weights)
    assert bench.error_db(engine, 0.5) > -80


def test_stages_are_timed_without_changing_the_samples(engine):
    samples = bench.voices(2, 0.1)
    plain, _ = engine.process(samples, engine.initial_state(2))
    with bench.stage_clock() as spent:
        timed, _ = engine.process(samples, engine.initial_state(2))
    np.testing.assert_array_equal(timed, plain)
    assert set(spent) == {"analysis", "network", "synthesis"}
    assert all(time_ns > 0 for time_ns in spent.values())


def test_the_clocks_are_taken_off_again(engine):
    functions = [getattr(owner, name) for _, owner, name in bench.STAGES]
    with bench.stage_clock():
        assert [getattr(owner, name) for _, owner, name in bench.STAGES] != functions
    assert [getattr(owner, name) for _, owner, name in bench.STAGES] == functions


def test_stages_are_disjoint_parts_of_a_tick(engine):
    stages = bench._by_stage(engine, bench.voices(1, 0.2))
    assert stages[bench.REST] > 0, "a stage inside another would be counted twice"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot pin a process")
def test_the_process_is_pinned_only_while_it_measures():
    allowed = os.sched_getaffinity(0)
    with bench.one_core() as pinned:
        assert os.sched_getaffinity(0) == {min(allowed)}
        assert pinned == f"pinned to core {min(allowed)}"
    assert os.sched_getaffinity(0) == allowed


def test_voices_are_whole_frames_within_full_scale_and_differ():
    samples = bench.voices(3, 0.5)
    assert samples.shape == (3, 50 * HOP)
    assert samples.dtype == np.float32
    assert 0.05 < np.abs(samples).max() < 1
    assert not np.array_equal(samples[0], samples[1])
    np.testing.assert_array_equal(samples, bench.voices(3, 0.5))


def test_the_report_names_machine_and_model_and_fills_its_table(engine):
    machine, model, _, table, file, error, quiet = bench.report(engine, [1, 3], 0.1, 0.2)
    assert "onnxruntime" in machine
    assert "core" in machine
    assert model == "Model random 0, 0.1 M weights, int8."
    header, _, *rows = (line.strip("| ").split(" | ") for line in table.splitlines())
    assert header[:3] == ["streams", "each", "analysis"]
    assert header[-3:] == ["rest", "tick p50 ms", "tick p99 ms"]
    assert [row[0] for row in rows] == ["1", "3"]
    for row in rows:
        assert len(row) == len(header)
        assert float(row[1].removesuffix(" %")) > 0
        assert float(row[-2]) <= float(row[-1])
    assert file.startswith("A file of 0.2 s: ")
    assert error.endswith(" dB.")
    assert "% of its core" in quiet
