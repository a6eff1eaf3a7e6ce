"""Files get what live streams leave, and come out the same."""

import threading

import numpy as np
import pytest

from percepnet.constants import HOP
from percepnet.enhancer import Enhancer
from percepnet.model import Model
from service.behind_live import PIECE_FRAMES, BehindLive
from service.engine import Engine, Options
from service.metrics import Metrics


@pytest.fixture
def engine(random_model: Model) -> Engine:
    return Engine(Enhancer(random_model), 1, Metrics(random_model))


def test_a_file_is_done_at_once_without_live_streams_and_in_pieces_beside_them(engine, random_model):
    sizes = []

    class Watched(Enhancer):
        def process(self, samples, state, controls):
            sizes.append(samples.shape[1] // HOP)
            return super().process(samples, state, controls)

    files = BehindLive(Watched(random_model), engine)
    samples = (0.1 * np.random.default_rng(0).standard_normal((2, 10 * HOP))).astype(np.float32)
    whole, _ = files.process(samples, files.initial_state(2))
    assert sizes == [10]
    engine.open(Options(48_000), lambda: None)
    in_pieces, _ = files.process(samples, files.initial_state(2))
    assert sizes[1:] == [PIECE_FRAMES, PIECE_FRAMES, 2]
    np.testing.assert_array_equal(in_pieces, whole)
    assert engine.cpu.files > 0


def test_a_file_waits_while_frames_of_a_live_stream_wait(engine, random_model, monkeypatch):
    monkeypatch.setattr("service.behind_live._LONGEST_WAIT_SECONDS", 100)
    files = BehindLive(Enhancer(random_model), engine)
    session = engine.open(Options(48_000), lambda: None)
    session.push(np.zeros(HOP, np.float32), 0.0)
    samples = np.zeros((1, HOP), np.float32)
    thread = threading.Thread(target=files.process, args=(samples, files.initial_state(1)))
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    engine.run_round(0.0)
    thread.join(100)
    assert not thread.is_alive()
