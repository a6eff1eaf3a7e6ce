"""Files get what live streams leave, and come out the same."""

import io
import threading

import httpx
import numpy as np
import pytest
import soundfile
from running import running

from percepnet.constants import HOP
from percepnet.enhancer import Enhancer
from percepnet.model import Model
from percepnet.stream import enhance
from service.behind_live import PIECE_FRAMES, BehindLive
from service.client import Client
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


def test_a_call_beside_uploads_is_enhanced_like_any_other(enhancer):
    """Over real sockets, while three files are worked on; a frame ten seconds late would come dry."""
    noise = (0.1 * np.random.default_rng(0).standard_normal((100, 160))).astype(np.float32)
    upload = io.BytesIO()
    soundfile.write(upload, np.tile(noise.ravel(), 5), 16_000, format="WAV")
    sent, statuses = [], []

    def speech():
        while sender.is_alive():
            sent.append(noise[len(sent) % len(noise)])
            yield sent[-1]

    with (
        running(enhancer) as server,
        Client(f"127.0.0.1:{server.grpc.port}") as client,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("service.engine.LATE_SECONDS", 10.0)
        url = "http://{}:{}/enhance".format(*server.servers[0].sockets[0].getsockname())

        def send_files():
            for _ in range(3):
                statuses.append(httpx.post(url, files={"file": upload.getvalue()}, timeout=100).status_code)

        sender = threading.Thread(target=send_files)
        with client.stream(16_000, compensate_delay=True) as call:
            sender.start()
            heard = list(call.pipe(speech(), realtime=True))
        sender.join()
    assert statuses == [200] * 3
    expected = enhance(np.concatenate(sent), 16_000, enhancer=enhancer)
    np.testing.assert_array_equal(np.concatenate(heard), expected)
