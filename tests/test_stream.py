"""A stream, an array and a file are one: the same samples, however they are cut, as late as stated."""

import io
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import export_random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import firwin, lfilter

from percepnet.enhancer import Enhancer
from percepnet.errors import AudioError, ParameterError
from percepnet.stream import Stream, enhance, enhance_file
from percepnet.synthesis import Controls

RATES = [8_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000]
DRY = Controls(mix=0)


def noise(n_samples: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    """(n_samples, channels) float32."""
    samples = 0.1 * np.random.default_rng(seed).standard_normal((n_samples, channels))
    return samples.astype(np.float32)


def speech_band(rate: int, n_samples: int) -> np.ndarray:
    """Noise below 3.4 kHz, which every rate holds, that fades in and out; (n_samples,) float32."""
    lowpass = firwin(2 * (rate // 100) + 1, 3_400, fs=rate)
    return (lfilter(lowpass, 1, noise(n_samples)[:, 0]) * np.hanning(n_samples)).astype(np.float32)


def streamed(samples: np.ndarray, rate: int, cuts: list[int], enhancer: Enhancer, **options) -> np.ndarray:
    """The whole output of a stream cut at the given sample numbers."""
    stream = Stream(rate, enhancer=enhancer, **options)
    outputs = [stream.push(chunk) for chunk in np.split(samples, cuts)]
    return np.concatenate([*outputs, stream.flush()])


def lag(output: np.ndarray, reference: np.ndarray) -> int:
    """Where their cross-correlation peaks, in samples."""
    size = 2 * len(reference)
    correlation = np.fft.irfft(np.fft.rfft(output, size) * np.conj(np.fft.rfft(reference, size)), size)
    peak = int(np.argmax(correlation))
    return peak if peak < size // 2 else peak - size


def wav(samples: np.ndarray, rate: int, subtype: str = "FLOAT") -> io.BytesIO:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, subtype, format="WAV")
    return file


@pytest.mark.parametrize("rate", [16_000, 44_100, 48_000])
@settings(deadline=None, max_examples=8)
@given(cuts=st.lists(st.integers(0, 6_000), max_size=12))
def test_any_chunking_gives_the_same_samples(enhancer, rate, cuts):
    samples = noise(6_000)[:, 0]
    expected = streamed(samples, rate, [], enhancer)
    np.testing.assert_array_equal(streamed(samples, rate, sorted(cuts), enhancer), expected)


@pytest.mark.parametrize("rate", [12_345, 16_000, 48_000])
def test_a_file_an_array_and_a_stream_hold_the_same_samples(enhancer, rate):
    """Over more than one block of a file, with two channels that share a batch."""
    samples = noise(5 * rate // 2 + 7, 2)
    array = enhance(samples, rate, enhancer=enhancer)
    target = io.BytesIO()
    enhance_file(wav(samples, rate), target, enhancer=enhancer)
    target.seek(0)
    np.testing.assert_array_equal(soundfile.read(target, dtype="float32")[0], array)
    for channel in range(2):
        output = streamed(samples[:, channel], rate, list(range(999, len(samples), 999)), enhancer)
        np.testing.assert_array_equal(output[-len(samples) :], array[:, channel])


@pytest.mark.parametrize("rate", RATES)
def test_a_file_keeps_its_length_and_its_place_at_every_rate(enhancer, rate):
    """Without enhancement the output is the input, up to 16-bit steps; a delay of a sample would show."""
    samples = speech_band(rate, rate // 2 + 131)
    target = io.BytesIO()
    summary = enhance_file(wav(samples, rate, "PCM_16"), target, controls=DRY, enhancer=enhancer)
    target.seek(0)
    output, output_rate = soundfile.read(target, dtype="float32")
    assert (output_rate, len(output)) == (rate, len(samples))
    assert (summary.sample_rate, summary.n_samples, summary.channels) == (rate, len(samples), 1)
    assert lag(output, samples) == 0
    assert np.abs(output - samples).max() < 2 / 32_768


@pytest.mark.parametrize("rate", [*RATES, 11_025, 12_347, 192_000])
def test_the_stated_latency_is_exact(enhancer, rate):
    """And short: 30 ms of the algorithm and 52 samples of the lower rate for the way to 48 kHz and back."""
    samples = speech_band(rate, rate // 3)
    stream = Stream(rate, controls=DRY, enhancer=enhancer)
    output = np.concatenate([stream.push(samples), stream.flush()])
    latency = stream.latency_samples
    assert len(output) == len(samples) + latency
    assert np.abs(output[latency:] - samples).max() < 1e-4
    # The pieces of a filter before its centre answer early, by less than -80 dB of full scale in all.
    assert np.abs(output[: latency - rate // 100]).max(initial=0) < 1e-4
    resampling = 0 if rate == 48_000 else 52 / min(rate, 48_000) + 2 / rate
    assert 0.03 <= latency / rate <= 0.03 + resampling


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100, 48_000, 96_000])
def test_a_live_stream_holds_back_less_than_a_frame(enhancer, rate):
    """Whoever pushes 10 ms gets 10 ms, on average and never more than a frame later."""
    stream = Stream(rate, enhancer=enhancer)
    n_in = n_out = 0
    for length in [rate // 100] * 12 + [1, 0, 17, rate // 50]:
        n_in += length
        n_out += len(stream.push(np.zeros(length, np.float32)))
        assert -math.ceil(rate / 48_000) <= n_in - n_out <= rate / 100 + 1


@pytest.mark.parametrize("rate", [16_000, 48_000])
def test_the_caller_may_overwrite_its_buffer(enhancer, rate):
    samples = noise(4_000)[:, 0]
    expected = streamed(samples, rate, [], enhancer)
    stream = Stream(rate, enhancer=enhancer)
    buffer = np.empty(250, np.float32)
    outputs = []
    for start in range(0, 4_000, 250):
        buffer[:] = samples[start : start + 250]
        outputs.append(stream.push(buffer))
        buffer[:] = np.nan
    np.testing.assert_array_equal(np.concatenate([*outputs, stream.flush()]), expected)


@pytest.mark.parametrize("rate", [16_000, 48_000])
@pytest.mark.parametrize(
    "signal",
    [
        np.zeros(1),
        np.ones(1),
        -np.ones(1),
        np.sign(np.sin(np.arange(480) / 9)),
        np.array([np.nan]),
        np.array([np.inf, -np.inf, 0.1]),
        np.array([1e300, -1e300]),
        np.array([3e38, -1e20, 1e5]),
        np.array([1e-40, -1e-44]),
    ],
    ids=["silence", "DC", "-DC", "square", "NaN", "infinity", "float64", "float32", "denormal"],
)
def test_extreme_signals_come_out_finite(enhancer, rate, signal):
    samples = np.resize(signal, 5_000)
    output = streamed(samples, rate, [700, 701, 2_000], enhancer)
    assert output.dtype == np.float32
    assert np.isfinite(output).all()
    if not samples.any():
        assert np.abs(output).max() < 1e-6


def test_a_stream_recovers_from_samples_that_are_not_finite_or_too_soft(enhancer):
    """They count as silence and leave no trace: nobody may slow others down with denormal numbers."""
    samples = noise(9_000)[:, 0]
    broken, silenced = samples.copy(), samples.copy()
    broken[3_000:3_500] = np.resize([np.nan, np.inf, -np.inf, 1e-11, -1e-39], 500)
    silenced[3_000:3_500] = 0
    np.testing.assert_array_equal(
        streamed(broken, 48_000, [], enhancer), streamed(silenced, 48_000, [], enhancer)
    )


def test_each_stream_has_its_own_controls(enhancer):
    samples = noise(6_000)[:, 0]
    outputs = [
        streamed(samples, 48_000, [], enhancer, controls=controls)
        for controls in (Controls(), Controls(mix=0.5), Controls(attenuation_limit_db=6), DRY)
    ]
    for one in range(len(outputs)):
        for other in range(one):
            assert np.abs(outputs[one] - outputs[other]).max() > 1e-4


@pytest.mark.parametrize("after", [DRY, Controls(attenuation_limit_db=6, postfilter=0)])
def test_new_controls_are_faded_to_in_10_ms_without_a_click(enhancer, after):
    """Before and after it is as if nothing had changed; between them nothing is rougher than there."""
    tone = (0.3 * np.sin(2 * np.pi * 440 / 48_000 * np.arange(24_000))).astype(np.float32)

    def output(changes: dict[int, Controls]) -> np.ndarray:
        stream, outputs = Stream(enhancer=enhancer), []
        for start in range(0, len(tone), 480):
            stream.controls = changes.get(start, stream.controls)
            outputs.append(stream.push(tone[start : start + 480]))
        return np.concatenate(outputs)

    changed, before, later = 12_000, output({}), output({0: after})
    faded = output({changed: after})
    hop = slice(changed, changed + 480)
    np.testing.assert_array_equal(faded[: hop.start], before[: hop.start])
    np.testing.assert_array_equal(faded[hop.stop :], later[hop.stop :])

    def roughness(signal: np.ndarray) -> float:
        return np.abs(np.diff(signal, 2))[hop.start - 960 : hop.stop + 960].max()

    switched = np.concatenate([before[:changed], later[changed:]])
    steady = max(roughness(before), roughness(later))
    assert roughness(faded) < 1.2 * steady < roughness(switched)


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 2), (0, 2), (480, 5)])
@pytest.mark.parametrize("rate", [8_000, 48_000])
def test_short_and_empty_arrays_keep_their_shape(enhancer, rate, shape):
    output = enhance(np.full(shape, 0.1), rate, enhancer=enhancer)
    assert output.shape == shape
    assert output.dtype == np.float32


def test_an_empty_stream_is_as_long_as_its_latency(enhancer):
    stream = Stream(16_000, enhancer=enhancer)
    assert stream.push(np.empty(0)).shape == (0,)
    assert len(stream.flush()) == stream.latency_samples


@pytest.mark.parametrize(
    "samples", [np.zeros(10, np.int16), [1, 2, 3], np.zeros(10, complex), np.zeros(4, bool), ["a"], None]
)
def test_samples_that_are_no_floats_are_refused(enhancer, samples):
    for call in (Stream(enhancer=enhancer).push, lambda x: enhance(x, 48_000, enhancer=enhancer)):
        with pytest.raises(ParameterError, match="float32 and float64"):
            call(samples)


@pytest.mark.parametrize("shape", [(), (10, 2, 2), (10, 0), (2, 48_000)])
def test_samples_of_another_shape_are_refused(enhancer, shape):
    with pytest.raises(ParameterError, match=r"\(n,\) and \(n, channels\)"):
        enhance(np.zeros(shape), 48_000, enhancer=enhancer)
    with pytest.raises(ParameterError, match=r"shape \(n,\)"):
        Stream(enhancer=enhancer).push(np.zeros(shape))


@pytest.mark.parametrize("rate", [0, 7_999, 192_001, 48_000.5, "48000", None])
def test_other_rates_are_refused(enhancer, rate):
    with pytest.raises(ParameterError, match="8000 to 192000"):
        Stream(rate, enhancer=enhancer)
    with pytest.raises(ParameterError, match="8000 to 192000"):
        enhance(np.zeros(10), rate, enhancer=enhancer)


@pytest.mark.parametrize(
    "controls", [{"mix": -0.1}, {"mix": 1.1}, {"mix": np.nan}, {"attenuation_limit_db": -1.0}]
)
def test_other_controls_are_refused(controls):
    with pytest.raises(ParameterError, match="accepted are 0"):
        Controls(**controls)


def test_a_flushed_stream_has_ended(enhancer):
    stream = Stream(enhancer=enhancer)
    stream.flush()
    for call in (stream.flush, lambda: stream.push(np.zeros(10))):
        with pytest.raises(ParameterError, match="ended"):
            call()


def test_progress_reaches_the_end_and_may_stop_the_work(enhancer, tmp_path):
    source = wav(noise(5 * 8_000), 8_000)
    calls = []
    enhance_file(source, io.BytesIO(), enhancer=enhancer, progress=lambda *call: calls.append(call))
    assert calls[-1] == (40_000, 40_000)
    assert len(calls) > 2
    assert calls == sorted(calls)

    def stop(done: int, total: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        enhance_file(source, tmp_path / "out.wav", enhancer=enhancer, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_the_summary_counts_what_was_clipped(enhancer):
    samples = np.clip(10 * speech_band(16_000, 16_000), -1, 1)
    loud = Controls(mix=0)
    summary = enhance_file(
        wav(1.5 * samples, 16_000), io.BytesIO(), controls=loud, enhancer=enhancer, format="flac"
    )
    assert abs(summary.clipped_samples - np.count_nonzero(np.abs(1.5 * samples) > 1)) < 100
    assert summary.seconds == 1
    assert summary.real_time_factor == summary.processing_seconds > 0


def test_a_bad_file_leaves_no_output(enhancer, tmp_path):
    samples = noise(40_000)
    samples[39_000] = np.nan
    with pytest.raises(AudioError, match="sample 39000"):
        enhance_file(wav(samples, 8_000), tmp_path / "out.wav", enhancer=enhancer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_a_long_file_needs_no_more_memory_than_a_short_one(tmp_path):
    """A minute more, 11 MB of samples, held anywhere would show. The peak is a process's of its own."""
    model = export_random_model(tmp_path, fc=32, conv=64, gru=64, strength_gru=32)
    script = (
        "import re, sys; from pathlib import Path; from percepnet.enhancer import Enhancer;"
        "from percepnet.model import Model; from percepnet.stream import enhance_file;"
        "enhance_file(sys.argv[2], sys.argv[3], enhancer=Enhancer(Model.load(Path(sys.argv[1]))));"
        "print(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])"
    )
    peaks_mb = []
    for minutes in (0.2, 1.2):
        soundfile.write(tmp_path / "in.wav", noise(int(minutes * 60 * 48_000)), 48_000)
        command = [sys.executable, "-c", script, model, tmp_path / "in.wav", tmp_path / "out.wav"]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks_mb.append(int(result.stdout) / 1024)
    assert peaks_mb[1] - peaks_mb[0] < 6
    assert peaks_mb[1] < 300
