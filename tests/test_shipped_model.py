"""The bundled model does what the product promises, on the README's example."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from scipy import signal

from percepnet.constants import SAMPLE_RATE
from percepnet.model import ASSETS, INT8, MODEL_FILE, Model
from percepnet.stream import Stream, enhance
from percepnet.synthesis import MAX_ATTENUATION_LIMIT_DB, Controls

EXAMPLE = Path(__file__).parent / "data" / "noisy.wav"
VOICE_STARTS = SAMPLE_RATE // 4


@pytest.fixture(scope="module")
def noisy() -> np.ndarray:
    samples, rate = soundfile.read(EXAMPLE, dtype="float32")
    assert rate == SAMPLE_RATE
    return samples


@pytest.fixture(scope="module")
def enhanced(noisy: np.ndarray) -> np.ndarray:
    return enhance(noisy, SAMPLE_RATE)


def level_db(samples: np.ndarray) -> float:
    return float(10 * np.log10(np.mean(np.square(samples, dtype=np.float64)) + 1e-12))


def test_the_bundled_model_is_the_documented_network() -> None:
    """8 M weights, 8 bit each, in at most 9 MB."""
    manifest = Model.load().manifest
    assert manifest.n_weights == pytest.approx(7.8e6, rel=0.05)
    assert manifest.quantization == INT8
    assert (ASSETS / MODEL_FILE).stat().st_size <= 9_000_000


def test_noise_before_the_voice_is_lowered(noisy: np.ndarray, enhanced: np.ndarray) -> None:
    """The passage before the first word, once the network has heard 100 ms of it."""
    passage = slice(SAMPLE_RATE // 10, VOICE_STARTS)
    assert level_db(noisy[passage]) - level_db(enhanced[passage]) > 10


def test_the_voice_keeps_its_level(noisy: np.ndarray, enhanced: np.ndarray) -> None:
    """The loudest tenths of a second are speech far above the noise."""
    length = len(noisy) // 4800 * 4800
    noisy_db = np.array([level_db(part) for part in noisy[:length].reshape(-1, 4800)])
    enhanced_db = np.array([level_db(part) for part in enhanced[:length].reshape(-1, 4800)])
    loud = noisy_db > np.percentile(noisy_db, 80)
    assert np.abs(np.median(enhanced_db[loud] - noisy_db[loud])) < 2


def test_the_attenuation_limit_leaves_that_much_noise(noisy: np.ndarray, enhanced: np.ndarray) -> None:
    passage = slice(SAMPLE_RATE // 10, VOICE_STARTS)
    limited = enhance(noisy, SAMPLE_RATE, controls=Controls(attenuation_limit_db=6))
    lowered = level_db(noisy[passage]) - level_db(limited[passage])
    assert 3 < lowered < 6.5
    assert level_db(enhanced[passage]) < level_db(limited[passage])


def test_the_postfilter_removes_more_the_stronger_it_is(noisy: np.ndarray) -> None:
    """Over the whole example, without a limit in the way; 0.5 lies between, 1 is the default."""
    levels = [
        level_db(
            enhance(noisy, SAMPLE_RATE, controls=Controls(MAX_ATTENUATION_LIMIT_DB, postfilter=strength))
        )
        for strength in (0, 0.5, 1)
    ]
    assert levels[2] < levels[1] < levels[0]


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000])
def test_the_output_is_as_long_as_the_input_and_in_step_with_it(noisy: np.ndarray, rate: int) -> None:
    """The cross-correlation of output and input peaks at lag 0, at every rate, to half a sample of 48 kHz."""
    samples = signal.resample_poly(noisy, rate, SAMPLE_RATE).astype(np.float32)
    output = enhance(samples, rate)
    assert output.shape == samples.shape
    correlation = signal.correlate(output, samples, method="fft")
    assert abs(int(np.argmax(correlation)) - (len(samples) - 1)) <= rate / SAMPLE_RATE / 2


def test_a_stream_equals_the_file(noisy: np.ndarray, enhanced: np.ndarray) -> None:
    """Pushed in 10 ms chunks, the samples are the same to the last bit."""
    stream = Stream(SAMPLE_RATE)
    parts = [stream.push(noisy[start : start + 480]) for start in range(0, len(noisy), 480)]
    live = np.concatenate([*parts, stream.flush()])
    assert np.array_equal(live[stream.latency_samples :], enhanced)


def test_a_model_runs_without_telemetry(tmp_path: Path) -> None:
    """onnxruntime, where it reports, keeps a device's number in the home folder."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")
    }
    load = "from percepnet.model import Model; Model.load()"
    subprocess.run([sys.executable, "-c", load], env=environment | {"HOME": str(tmp_path)}, check=True)
    assert list(tmp_path.rglob("*")) == []
