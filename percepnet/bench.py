"""What the signal path costs on this machine, in CPU time on one core, and how exact it is."""

import argparse
import io
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np

from percepnet import bands, comb, enhancer, native
from percepnet.audio import AudioWriter, Encoding
from percepnet.constants import COMB_ORDER, HOP, LOOKAHEAD_FRAMES, SAMPLE_RATE, WINDOW
from percepnet.enhancer import Enhancer
from percepnet.model import Model
from percepnet.report import count, machine, markdown
from percepnet.stream import enhance_file
from percepnet.synthesis import Controls

STREAMS = (1, 4, 8, 16, 32, 64)

STAGES: tuple[tuple[str, Any, str], ...] = (
    ("analysis", native, "analyze"),
    ("analysis", enhancer, "analyze"),
    ("network", Model, "step"),
    ("synthesis", native, "synthesize"),
    ("synthesis", enhancer, "synthesize"),
)
"""The functions of the block diagram by stage, where `Enhancer` looks them up, compiled or not."""

REST = "rest"
"""What no stage accounts for: keeping the state and moving arrays."""

TICK_NS = 1e9 * HOP / SAMPLE_RATE

REPEATS = 3
"""The quickest run of so many counts: other work on the machine only ever adds to a time."""


@contextmanager
def stage_clock() -> Iterator[dict[str, int]]:
    """Count the CPU nanoseconds that each stage takes while the `with` block runs."""
    spent = dict.fromkeys((stage for stage, _, _ in STAGES), 0)

    def timed(function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        @wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            begun = time.process_time_ns()
            try:
                return function(*args, **kwargs)
            finally:
                spent[stage] += time.process_time_ns() - begun

        return wrapper

    with ExitStack() as restored:
        for stage, owner, name in STAGES:
            function = getattr(owner, name)
            restored.callback(setattr, owner, name, function)
            setattr(owner, name, timed(function, stage))
        yield spent


@contextmanager
def one_core() -> Iterator[str]:
    """Pin the process to the first core it may use, where the system can; tells which."""
    if not hasattr(os, "sched_setaffinity"):
        yield "not pinned"
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        yield f"pinned to core {min(allowed)}"
    finally:
        os.sched_setaffinity(0, allowed)


def voices(n_streams: int, seconds: float, seed: int = 0) -> np.ndarray:
    """Buzzing tones of moving pitch in noise, float32 (streams, samples) at 48 kHz, whole frames."""
    rng = np.random.default_rng(seed)
    n_samples = round(seconds * SAMPLE_RATE / HOP) * HOP
    t = np.arange(n_samples) / SAMPLE_RATE
    pitch_hz = rng.uniform(90, 250, (n_streams, 1)) * (1 + 0.1 * np.sin(2 * np.pi * t))
    phase = 2 * np.pi * np.cumsum(pitch_hz, axis=1) / SAMPLE_RATE
    signal = sum(np.cos(k * phase) / k for k in range(1, 16)) * (np.sin(2 * np.pi * 3 * t) > -0.5)
    return (0.1 * signal + 0.03 * rng.standard_normal(phase.shape)).astype(np.float32)


def tick_times(engine: Enhancer, samples: np.ndarray) -> np.ndarray:
    """CPU nanoseconds, int (frames,), of enhancing streams (streams, frames·480) one frame at a time."""
    state = engine.initial_state(len(samples))
    times = []
    for hop in np.split(samples, samples.shape[1] // HOP, axis=1):
        frame = np.ascontiguousarray(hop)
        begun = time.process_time_ns()
        _, state = engine.process(frame, state)
        times.append(time.process_time_ns() - begun)
    return np.array(times)


def live_row(engine: Enhancer, n_streams: int, seconds: float) -> list[str]:
    """Cost of live streams: share of a core for each stream, in all and by stage, and CPU ms of a tick."""
    samples = voices(n_streams, seconds)
    tick_times(engine, samples[:, : 10 * HOP])
    times = min((tick_times(engine, samples) for _ in range(REPEATS)), key=np.sum)
    stages = min((_by_stage(engine, samples) for _ in range(REPEATS)), key=lambda spent: sum(spent.values()))
    per_stream = 100 / (TICK_NS * len(times) * n_streams)
    shares = [int(times.sum()) * per_stream, *(time_ns * per_stream for time_ns in stages.values())]
    p50, p99 = np.percentile(times, [50, 99]) / 1e6
    return [str(n_streams), *(f"{share:.2f} %" for share in shares), f"{p50:.2f}", f"{p99:.2f}"]


def _by_stage(engine: Enhancer, samples: np.ndarray) -> dict[str, int]:
    """CPU nanoseconds of enhancing streams one frame at a time, stage by stage."""
    with stage_clock() as spent:
        total = int(tick_times(engine, samples).sum())
    return spent | {REST: total - sum(spent.values())}


def file_seconds(engine: Enhancer, seconds: float) -> float:
    """CPU seconds for enhancing a mono 16-bit WAV, decoding and encoding included."""
    samples = voices(1, seconds)
    recording = io.BytesIO()
    with AudioWriter(recording, Encoding("WAV", "PCM_16"), SAMPLE_RATE, 1, samples.shape[1]) as writer:
        writer.write(samples)
    begun = time.process_time()
    enhance_file(recording, io.BytesIO(), enhancer=engine)
    return time.process_time() - begun


def reference(
    samples: np.ndarray, period: np.ndarray, gains: np.ndarray, strengths: np.ndarray
) -> np.ndarray:
    """The signal path around the network in plain float64, at the default limit, for given decisions.

    samples: (n,), whole frames; period: (frames,); gains, strengths: (frames, 34), as the network gives them
    two frames late. Returns the enhanced samples (n,), `LATENCY_SAMPLES` late.
    """
    weights = bands.band_weights().astype(np.float64)
    window = np.sin(np.pi / 2 * np.sin(np.pi * (np.arange(WINDOW) + 0.5) / WINDOW) ** 2)
    start = comb.REACH + WINDOW - HOP + LOOKAHEAD_FRAMES * HOP
    heard = np.concatenate([np.zeros(start), samples.astype(np.float64)])
    output = np.zeros(len(samples) + HOP)
    floor = 10 ** (-Controls.attenuation_limit_db / 20)
    for frame, lag in enumerate(period):
        here = comb.REACH + frame * HOP
        orders = [k for k in range(-COMB_ORDER, COMB_ORDER + 1) if -k * lag <= comb.LOOKAHEAD]
        hann = [0.5 + 0.5 * np.cos(np.pi * k / (COMB_ORDER + 1)) for k in orders]
        passages = [heard[here - k * lag : here - k * lag + WINDOW] for k in orders]
        combed = np.fft.rfft(window * np.average(passages, axis=0, weights=hann))
        noisy = np.fft.rfft(window * heard[here : here + WINDOW])
        mixed = noisy + (strengths[frame] @ weights) * (combed - noisy)
        energy, mixed_energy = weights @ np.abs(noisy) ** 2, weights @ np.abs(mixed) ** 2
        warped = gains[frame] * np.cbrt(np.sin(np.pi / 2 * gains[frame]))
        ratio = (gains[frame] ** 2 @ energy + 1e-20) / (warped**2 @ energy + 1e-20)
        gain = warped * np.sqrt(1.02 * ratio / (1 + 0.02 * ratio**2))
        gain *= np.sqrt((energy + 1e-12) / (mixed_energy + 1e-12))
        spectrum = floor * noisy + (1 - floor) * (gain @ weights) * mixed
        output[frame * HOP : frame * HOP + WINDOW] += window * np.fft.irfft(spectrum)
    return output[: len(samples)]


def error_db(engine: Enhancer, seconds: float) -> float:
    """Energy of the difference between the signal path and its float64 reference, against the output's."""
    samples = voices(1, seconds)
    enhanced, found = engine.advance(samples, engine.initial_state(1), slice(None))
    exact = reference(
        samples[0], found.period[0], found.gains[0].astype(float), found.strengths[0].astype(float)
    )
    return float(10 * np.log10(np.sum((enhanced[0] - exact) ** 2) / np.sum(exact**2)))


def report(engine: Enhancer, streams: Sequence[int], seconds: float, file_length: float) -> Iterator[str]:
    """The report, piece by piece as it is measured, in Markdown."""
    manifest = engine.model.manifest
    with one_core() as pinned:
        begun = time.perf_counter()
        cpu_begun = time.process_time()
        yield f"{machine()}; signal path {native.DESCRIPTION}; {pinned}."
        yield (
            f"Model {manifest.name} {manifest.version}, {manifest.n_weights / 1e6:.1f} M weights, "
            f"{engine.model.precision}."
        )
        stages = [*dict.fromkeys(stage for stage, _, _ in STAGES), REST]
        header = ["streams", "each", *stages, "tick p50 ms", "tick p99 ms"]
        rows = [live_row(engine, n_streams, seconds) for n_streams in streams]
        yield "Live, 10 ms at a time: CPU time of each stream as a share of one core."
        yield markdown(header, rows)
        cpu_seconds = min(file_seconds(engine, file_length) for _ in range(REPEATS))
        yield (
            f"A file of {file_length:g} s: {cpu_seconds:.2f} s of CPU, "
            f"{file_length / cpu_seconds:.0f} × real time."
        )
        yield f"Difference from the signal path in float64: {error_db(engine, min(seconds, 3)):.0f} dB."
        own_share = (time.process_time() - cpu_begun) / (time.perf_counter() - begun)
        yield (
            f"This process had {own_share:.0%} of its core; the machine's load was {os.getloadavg()[0]:.1f} "
            "(1.0: nothing else ran). Work on other cores raises these times, too: it shares the caches."
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe `percepnet bench`."""
    parser.description = (
        "Measure the CPU time of live streams and of a file on one core, and the numerical error."
    )
    parser.add_argument(
        "--streams",
        type=count,
        nargs="+",
        default=STREAMS,
        metavar="N",
        help="numbers of streams in one batch",
    )
    parser.add_argument(
        "--seconds", type=count, default=3, metavar="S", help="audio of each live stream (default: 3)"
    )
    parser.add_argument(
        "--file-seconds", type=count, default=60, metavar="S", help="length of the file (default: 60)"
    )
    parser.add_argument(
        "--model", type=Path, help="a model.onnx with its model.json beside it (default: the bundled model)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; returns the exit status."""
    engine = Enhancer(Model.load(arguments.model))
    for paragraph in report(engine, arguments.streams, arguments.seconds, arguments.file_seconds):
        print(paragraph, flush=True, end="\n\n")
    return 0
