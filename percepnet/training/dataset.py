"""Training examples: mixtures, analysed by the code that serves, in shards that are replaced over time.

Mixing and analysis cost about as much as training a small network on the same core, so every example is used
a few times: a shard is a function of (seed, split, index) alone, the pool at a step is a function of the step
alone, and a run therefore repeats and resumes exactly, however fast the shards were made.
"""

import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch

from percepnet.analysis import AnalysisState, analyze
from percepnet.bands import BIN_HZ, TOP_HZ
from percepnet.constants import HOP, LATENCY_SAMPLES, N_BANDS
from percepnet.targets import clean_spectra, ideal
from percepnet.training.mixing import Mixer


def _loss_bins() -> np.ndarray:
    bins = np.arange(int(TOP_HZ / BIN_HZ) + 1)
    step = np.select([bins < 80, bins < 160], [1, 2], 4)
    return bins[bins % step == 0]


LOSS_BINS = _loss_bins()
"""Bins that the loss looks at: all up to 4 kHz, every second up to 8 kHz, every fourth up to 20 kHz.

High bands hold dozens of bins that share a gain: a quarter of them tells the loss as much at half the cost.
"""

_ACTIVE = 0.1  # spectra are scaled so that the target's root-mean-square bin has this magnitude
_LOUDEST = 2.0  # and the noisy one's at most this many times as much: examples with hardly any speech, scaled
# up to its level, would make up most of the gradient

FIELDS = ("features", "noisy", "comb", "clean", "gains", "strengths", "bandwidth_hz")


@dataclass(frozen=True)
class PoolConfig:
    """How examples are made and how often each is used."""

    seconds: float = 4.0
    """Length of an example."""
    shard_examples: int = 32
    """Examples in one file."""
    first_shards: int = 16
    """Shards that exist before the first step."""
    shards: int = 190
    """Shards in the pool once it is full; older ones are deleted."""
    batches_per_shard: float = 3.0
    """A new shard joins after so many batches: the times an example is used, if a batch holds as many."""


def _as_half(spectrum: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Real and imaginary part side by side, float16 (examples, frames, 181, 2), scaled per example."""
    bins = spectrum[..., LOSS_BINS] * scale[:, None, None].astype(np.float32)
    pairs = torch.view_as_real(torch.from_numpy(bins.astype(np.complex64)))
    return pairs.clamp(-60000, 60000).half().numpy()


def make_shard(mixer: Mixer, index: int, config: PoolConfig) -> dict[str, np.ndarray]:
    """Examples of one shard, by field name; all but the last (examples, frames, …) float16.

    features: (…, 70) before normalization; noisy, comb, clean: spectra (…, 181, 2), each example scaled so
    that its target has the same level, or less where it holds little speech; gains, strengths: ideal band
    values (…, 34); bandwidth_hz: (examples,) float32, above which the target says nothing.
    """
    count = config.shard_examples
    mixtures = mixer.mixtures(index * count, count, config.seconds)
    n_samples = int(config.seconds * 100) * HOP
    padding = ((0, 0), (0, LATENCY_SAMPLES - HOP))
    noisy = np.pad(np.stack([m.noisy[:n_samples] for m in mixtures]), padding)
    clean = np.pad(np.stack([m.clean[:n_samples] for m in mixtures]), padding)

    analysis, _ = analyze(noisy, AnalysisState.initial(count))
    clean_spectrum, clean_comb = clean_spectra(clean, analysis.period)
    coherences = analysis.features[..., N_BANDS : 2 * N_BANDS]
    targets = ideal(clean_spectrum, clean_comb, analysis.energy, coherences, analysis.period)
    level = np.sqrt(np.mean(np.abs(clean_spectrum[..., LOSS_BINS]) ** 2, axis=(1, 2)))
    noisy_level = np.sqrt(np.mean(np.abs(analysis.noisy[..., LOSS_BINS]) ** 2, axis=(1, 2)))
    scale = _ACTIVE / np.maximum(np.maximum(level, noisy_level / _LOUDEST), 1e-6)
    ahead = slice(LATENCY_SAMPLES // HOP - 1, None)  # the frames before hold nothing yet
    return {
        "features": analysis.features[:, ahead].astype(np.float16),
        "noisy": _as_half(analysis.noisy[:, ahead], scale),
        "comb": _as_half(analysis.comb[:, ahead], scale),
        "clean": _as_half(clean_spectrum[:, ahead], scale),
        "gains": targets.gains[:, ahead].astype(np.float16),
        "strengths": targets.strengths[:, ahead].astype(np.float16),
        "bandwidth_hz": np.array([m.bandwidth_hz for m in mixtures], np.float32),
    }


def _write_shard(directory: Path, shard: dict[str, np.ndarray]) -> None:
    """Write the fields as .npy files and make the folder appear at once."""
    partial = directory.with_name(f"{directory.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    for name, values in shard.items():
        np.save(partial / f"{name}.npy", values)
    try:
        partial.rename(directory)
    except OSError:  # another process made the same shard meanwhile
        _remove(partial)


def _remove(directory: Path) -> None:
    for file in directory.iterdir():
        file.unlink()
    directory.rmdir()


def _produce(
    cache: Path, directory: Path, split: str, seed: int, config: PoolConfig, first: int, stride: int
) -> None:
    """Make every stride-th shard, never more than one pool ahead of the oldest that is still in use."""
    os.nice(10)
    torch.set_num_threads(1)
    parent = os.getppid()
    mixer = Mixer(cache, split=split, seed=seed)
    index = first
    while os.getppid() == parent:
        oldest = int((directory / "oldest").read_text())
        if index < oldest:
            index += stride
        elif index >= oldest + config.shards + config.first_shards:
            time.sleep(0.5)
        else:
            target = directory / f"{index:06d}"
            if not target.exists():
                _write_shard(target, make_shard(mixer, index, config))
            index += stride


class Pool:
    """The examples that may be drawn at a step; makes new shards in background processes."""

    def __init__(
        self, cache: Path, directory: Path, *, seed: int, config: PoolConfig, step: int, workers: int
    ) -> None:
        self._directory = directory
        self._config = config
        self._seed = seed
        self._shards: dict[int, dict[str, np.ndarray]] = {}
        directory.mkdir(parents=True, exist_ok=True)
        for unfinished in directory.glob("[0-9]*.partial"):
            _remove(unfinished)
        self._publish_oldest(self._window(step).start)
        context = multiprocessing.get_context("spawn")
        self._workers: list[BaseProcess] = []
        for worker in range(workers):
            first = self._window(step).start + worker
            arguments = (cache, directory, "train", seed, config, first, workers)
            self._workers.append(context.Process(target=_produce, args=arguments, daemon=True))
            self._workers[-1].start()

    def _window(self, step: int) -> range:
        """Shards in use at a step."""
        end = self._config.first_shards + int(step / self._config.batches_per_shard)
        return range(max(0, end - self._config.shards), end)

    def _forget(self, oldest: int) -> None:
        """Remove the shards before one, those of an earlier process as well."""
        self._shards = {index: shard for index, shard in self._shards.items() if index >= oldest}
        self._publish_oldest(oldest)
        for path in self._directory.glob("[0-9]" * 6):
            if int(path.name) < oldest:
                _remove(path)

    def _publish_oldest(self, index: int) -> None:
        self._oldest = index
        partial = self._directory / "oldest.partial"
        partial.write_text(str(index))
        partial.rename(self._directory / "oldest")

    def _shard(self, index: int) -> dict[str, np.ndarray]:
        if index not in self._shards:
            directory = self._directory / f"{index:06d}"
            while not directory.exists():
                if not any(worker.is_alive() for worker in self._workers):
                    raise RuntimeError(f"no process is left to make shard {index}; see its traceback above")
                time.sleep(0.1)
            self._shards[index] = {name: np.load(directory / f"{name}.npy", mmap_mode="r") for name in FIELDS}
        return self._shards[index]

    def batch(self, step: int, size: int) -> dict[str, np.ndarray]:
        """Draw examples for a step, the same for the same seed and step; fields as in `make_shard`."""
        window = self._window(step)
        if window.start > self._oldest:
            self._forget(window.start)
        rng = np.random.default_rng((self._seed, step))
        total = len(window) * self._config.shard_examples
        draws = np.sort(rng.choice(total, size=min(size, total), replace=False))
        picks = [divmod(int(draw), self._config.shard_examples) for draw in draws]
        rows = [(self._shard(window.start + shard), row) for shard, row in picks]
        return {name: np.stack([shard[name][row] for shard, row in rows]) for name in FIELDS}

    def close(self) -> None:
        """Stop the background processes; the shards stay for a later run."""
        for worker in self._workers:
            worker.terminate()
            worker.join()


def validation_batches(
    cache: Path, directory: Path, *, seed: int, config: PoolConfig, shards: int
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of held-out speakers and noises, made once and kept."""
    mixer: Mixer | None = None
    for index in range(shards):
        target = directory / f"{index:06d}"
        if not target.exists():
            mixer = mixer or Mixer(cache, split="valid", seed=seed)
            _write_shard(target, make_shard(mixer, index, config))
        yield {name: np.load(target / f"{name}.npy") for name in FIELDS}
