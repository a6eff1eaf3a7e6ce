"""The training loop: from a prepared cache to a checkpoint, on CPU or CUDA, resumable at any step."""

import argparse
import csv
import dataclasses
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from percepnet.errors import ParameterError
from percepnet.model import MANIFEST_FILE, Manifest
from percepnet.training.dataset import Pool, PoolConfig, validation_batches
from percepnet.training.export import restore
from percepnet.training.losses import LossConfig, SpectralLoss
from percepnet.training.mixing import Mixer
from percepnet.training.network import NetworkConfig, PercepNet, State
from percepnet.training.opinion import (
    P808_FILE,
    P835_FILE,
    ListeningPredictor,
    OpinionPredictor,
    Predictor,
)

CHECKPOINT = "checkpoint.pt"
LOG = "log.csv"
CONFIG = "config.json"


@dataclass(frozen=True)
class TrainConfig:
    """Everything that shapes a run; written beside its checkpoint."""

    steps: int = 2000
    batch: int = 32
    parts: int = 2
    """Each batch is trained on in so many parts, a step each; the network's state carries over."""
    learning_rate: float = 5e-4
    warmup_steps: int = 50
    final_share: float = 0.02
    """The learning rate falls along a cosine to this share of its peak."""
    weight_decay: float = 0.01
    clip_norm: float = 0.05
    muon_iterations: int = 3
    """Newton-Schulz iterations of Muon, which trains the recurrent layers; 0 for AdamW alone."""
    opinion: float = 0.0
    """Weight of the overall quality that DNSMOS P.835 predicts; takes `--dnsmos`."""
    opinion_examples: int = 4
    """Examples of each step that it judges; it costs more than the network."""
    listening: float = 0.0
    """Weight of the quality that DNSMOS P.808 predicts; takes `--dnsmos`."""
    listening_examples: int = 16
    """Examples of each step that it judges."""
    average_decay: float = 0.98
    """Decay per step of the averaged weights, which are what is exported."""
    seed: int = 1
    validation_shards: int = 3
    validation_every: int = 100
    checkpoint_every: int = 50
    network: NetworkConfig = field(default_factory=NetworkConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    pool: PoolConfig = field(default_factory=PoolConfig)

    @classmethod
    def from_json(cls, text: str) -> "TrainConfig":
        """Read a config; absent names keep their defaults. Raises ParameterError for unknown ones."""
        parts = {"network": NetworkConfig, "loss": LossConfig, "pool": PoolConfig}
        try:
            fields: dict[str, Any] = json.loads(text)
            return cls(**{k: parts[k](**v) if k in parts else v for k, v in fields.items()})
        except (TypeError, ValueError, AttributeError) as error:
            raise ParameterError(f"the training config cannot be used: {error}") from error

    def to_json(self) -> str:
        """The config as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


@dataclass
class Checkpoint:
    """A run at a step, complete enough to go on as if it had never stopped."""

    step: int
    network: dict[str, Tensor]
    average: dict[str, Tensor]
    optimizers: list[dict[str, Any]]
    feature_mean: Tensor
    feature_scale: Tensor
    config: str
    state: State
    """Of the network after the last part of a batch; empty between batches."""

    @classmethod
    def load(cls, path: Path) -> "Checkpoint":
        return cls(**torch.load(path, map_location="cpu", weights_only=True))

    def save(self, path: Path) -> None:
        partial = path.with_suffix(".partial")
        torch.save(vars(self), partial)
        partial.rename(path)


def grow(small: dict[str, Tensor], network: PercepNet) -> None:
    """Start a wide network from a narrow one's weights, computing the same function (after Net2Net).

    The narrow network's units keep their weights and don't listen to the new units yet; the new units start
    at random and listen to everything, so that both learn from the first step.
    """

    def blocks(name: str, rows: int, old_rows: int) -> list[tuple[slice, slice]]:
        """Matching row ranges (new, old): a GRU's three gates are stacked."""
        gates = 3 if name.startswith("gru") else 1
        new, old = rows // gates, old_rows // gates
        return [(slice(g * new, g * new + old), slice(g * old, (g + 1) * old)) for g in range(gates)]

    with torch.no_grad():
        for name, parameter in network.named_parameters():
            source = small[name]
            for new, old in blocks(name, len(parameter), len(source)):
                if parameter.ndim == 1:
                    parameter[new] = source[old]
                else:
                    parameter[new] = 0
                    parameter[new, : source.shape[1]] = source[old]


def _starting_point(path: Path) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Weights and normalization of a checkpoint or of an exported model."""
    if path.suffix == ".onnx":
        manifest = Manifest.read(path.with_name(MANIFEST_FILE))
        weights = {name: torch.from_numpy(value) for name, value in restore(path).items()}
        normalization = (torch.tensor(v.copy()) for v in (manifest.feature_mean, manifest.feature_scale))
        return weights, *normalization
    checkpoint = Checkpoint.load(path)
    return checkpoint.average, checkpoint.feature_mean, checkpoint.feature_scale


def _optimizers(network: PercepNet, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the recurrent layers' matrices, AdamW for everything else."""
    named = list(network.named_parameters())
    recurrent = [p for name, p in named if name.startswith("gru") and p.ndim == 2]
    others = [p for name, p in named if not (name.startswith("gru") and p.ndim == 2)]
    decay = config.weight_decay
    if config.muon_iterations == 0:
        return [torch.optim.AdamW(network.parameters(), lr=config.learning_rate, betas=(0.9, 0.98))]
    return [
        torch.optim.Muon(
            recurrent,
            lr=config.learning_rate,
            weight_decay=decay,
            ns_steps=config.muon_iterations,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(others, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=decay),
    ]


@dataclass(frozen=True)
class _Judge:
    """A predictor of opinions, its weight in the loss, and how many examples of a step it judges."""

    name: str
    predictor: Predictor
    weight: float
    examples: int


def _judges(config: TrainConfig, dnsmos: Path | None, device: torch.device) -> list[_Judge]:
    judges = []
    for name, kind, weight, examples in (
        ("opinion", OpinionPredictor, config.opinion, config.opinion_examples),
        ("listening", ListeningPredictor, config.listening, config.listening_examples),
    ):
        if weight:
            if dnsmos is None:
                raise ParameterError(f"a config with '{name}' takes --dnsmos, the folder with {kind.file}")
            judges.append(_Judge(name, kind(dnsmos / kind.file).to(device), weight, examples))
    return judges


class Trainer:
    """A run in a folder: builds, resumes, trains and saves."""

    def __init__(
        self,
        cache: Path,
        directory: Path,
        config: TrainConfig,
        *,
        device: str,
        workers: int,
        start_from: Path | None = None,
        dnsmos: Path | None = None,
    ) -> None:
        Mixer(cache, split="valid", seed=config.seed)  # there must be something to validate with
        self.config = config
        self.directory = directory
        self.device = torch.device(device)
        directory.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(config.seed)
        self.network = PercepNet(config.network).to(self.device)
        self.loss = SpectralLoss(config.loss).to(self.device)
        self.judges = _judges(config, dnsmos, self.device)
        self.average = {k: v.detach().clone() for k, v in self.network.state_dict().items()}
        self.optimizers = _optimizers(self.network, config)
        self.step = 0
        self._batch: dict[str, np.ndarray] = {}
        self._state: State = {}
        path = directory / CHECKPOINT
        if path.exists():
            self._resume(Checkpoint.load(path))
        (directory / CONFIG).write_text(config.to_json())
        self.pool = Pool(
            cache,
            directory / "shards",
            seed=config.seed,
            config=config.pool,
            step=self.step // config.parts,
            workers=workers,
        )
        self._cache = cache
        if self.step == 0:
            self._measure_features(start_from)

    def _resume(self, checkpoint: Checkpoint) -> None:
        if checkpoint.config != self.config.to_json():
            raise ParameterError(f"{self.directory} holds a run with another config; choose another folder")
        self.network.load_state_dict(checkpoint.network)
        self.average = {k: v.to(self.device) for k, v in checkpoint.average.items()}
        for optimizer, state in zip(self.optimizers, checkpoint.optimizers, strict=True):
            optimizer.load_state_dict(state)
        self.mean = checkpoint.feature_mean.to(self.device)
        self.scale = checkpoint.feature_scale.to(self.device)
        self.step = checkpoint.step
        self._state = {k: v.to(self.device) for k, v in checkpoint.state.items()}

    def _measure_features(self, start_from: Path | None) -> None:
        """Normalization constants: from the first examples, or taken over with the weights."""
        if start_from:
            weights, mean, scale = _starting_point(start_from)
            grow(weights, self.network)
            self.average = {k: v.detach().clone() for k, v in self.network.state_dict().items()}
            self.mean, self.scale = mean.to(self.device), scale.to(self.device)
            return
        features = self.pool.batch(0, 256)["features"].astype(np.float64).reshape(-1, 70)
        self.mean = torch.tensor(features.mean(0), dtype=torch.float32, device=self.device)
        scale = 1 / np.maximum(features.std(0), 1e-3)
        self.scale = torch.tensor(scale, dtype=torch.float32, device=self.device)

    def _learning_rate(self) -> float:
        config = self.config
        if self.step < config.warmup_steps:
            return config.learning_rate * (self.step + 1) / config.warmup_steps
        progress = (self.step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
        cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
        return config.learning_rate * (config.final_share + (1 - config.final_share) * cosine)

    def _evaluate(
        self, network: PercepNet, batch: dict[str, np.ndarray], state: State | None
    ) -> tuple[Tensor, dict[str, float], State]:
        tensors = {k: torch.from_numpy(v).to(self.device).float() for k, v in batch.items()}
        features = (tensors["features"] - self.mean) * self.scale
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            gains, strengths, state = network(features, state)
        loss, terms = self.loss(gains, strengths, tensors)
        for judge in self.judges if network.training else ():
            first = self.step * judge.examples % self.config.batch
            judged = slice(first, first + judge.examples)
            parts = (tensors["noisy"], tensors["comb"], gains, strengths)
            score = judge.predictor(self.loss.enhance(*(part[judged] for part in parts)))[:, -1].mean()
            loss = loss - judge.weight * score
            terms[judge.name] = float(score.detach())
        return loss, terms, state

    def _next_part(self) -> tuple[dict[str, np.ndarray], State | None]:
        """What the next step learns from, and the network's state before it."""
        index, part = divmod(self.step, self.config.parts)
        if part == 0:
            self._state = {}
        if part == 0 or not self._batch:
            self._batch = self.pool.batch(index, self.config.batch)
        n_frames = self._batch["features"].shape[1]
        bounds = np.linspace(0, n_frames, self.config.parts + 1).astype(int)
        frames = slice(bounds[part], bounds[part + 1])
        cut = {k: v if v.ndim == 1 else v[:, frames] for k, v in self._batch.items()}
        return cut, self._state or None

    def train_step(self) -> dict[str, float]:
        """One optimizer step; returns the loss and its terms."""
        rate = self._learning_rate()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        loss, terms, self._state = self._evaluate(self.network, *self._next_part())
        self.network.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        decay = min(self.config.average_decay, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            for name, value in self.network.state_dict().items():
                self.average[name].lerp_(value, 1 - decay)
        self.step += 1
        return {"loss": float(loss.detach()), **terms, "gradient_norm": float(norm), "learning_rate": rate}

    def validate(self) -> float:
        """Mean loss of the averaged weights on held-out speakers and noises."""
        network = PercepNet(self.config.network).to(self.device)
        network.load_state_dict(self.average)
        network.eval()
        batches = validation_batches(
            self._cache,
            self.directory / "validation",
            seed=self.config.seed,
            config=self.config.pool,
            shards=self.config.validation_shards,
        )
        with torch.no_grad():
            losses = [float(self._evaluate(network, batch, None)[0]) for batch in batches]
        return sum(losses) / len(losses)

    def save(self) -> None:
        """Write the checkpoint; a kill at any moment leaves the old or the new one."""
        Checkpoint(
            self.step,
            self.network.state_dict(),
            self.average,
            [optimizer.state_dict() for optimizer in self.optimizers],
            self.mean,
            self.scale,
            self.config.to_json(),
            self._state,
        ).save(self.directory / CHECKPOINT)

    def run(self) -> None:
        """Train to the last step with a progress bar; log every step to CSV."""
        log_path = self.directory / LOG
        rows = [row for row in _read_log(log_path) if int(row["step"]) < self.step]
        progress = tqdm(total=self.config.steps, initial=self.step, unit="step", dynamic_ncols=True)
        smooth = None
        with log_path.open("w", newline="") as file:
            columns = (
                "step loss magnitude phase gains strengths intelligibility high_band pesq distortion opinion "
                "listening gradient_norm learning_rate validation seconds"
            )
            log = csv.DictWriter(file, columns.split(), restval="")
            log.writeheader()
            log.writerows(rows)
            started = time.monotonic()
            while self.step < self.config.steps:
                row: dict[str, Any] = {"step": self.step, **self.train_step()}
                row["seconds"] = round(time.monotonic() - started, 2)
                smooth = row["loss"] if smooth is None else 0.98 * smooth + 0.02 * row["loss"]
                last = self.step == self.config.steps
                if last or self.step % self.config.validation_every == 0:
                    row["validation"] = self.validate()
                    progress.write(f"step {self.step}: validation loss {row['validation']:.5f}")
                log.writerow(row)
                progress.set_postfix(loss=f"{smooth:.5f}", refresh=False)
                progress.update()
                if last or self.step % self.config.checkpoint_every == 0:
                    file.flush()
                    self.save()
        progress.close()


def _read_log(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `percepnet train`."""
    parser.add_argument("cache", type=Path, help="folder that `percepnet prepare` has written")
    parser.add_argument("directory", type=Path, help="folder of the run; an unfinished run there is resumed")
    parser.add_argument("--config", type=Path, help="JSON file with the fields of TrainConfig that differ")
    parser.add_argument("--steps", type=int, help="train for this many steps")
    parser.add_argument(
        "--start-from", type=Path, help="checkpoint of an as wide or narrower network to start from"
    )
    parser.add_argument(
        "--dnsmos",
        type=Path,
        help=f"folder of DNSMOS's {P835_FILE} and {P808_FILE}, for configs that ask for them",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads of the network (default: all)")
    parser.add_argument("--workers", type=int, default=1, help="processes that mix and analyse (default: 1)")


def run(arguments: argparse.Namespace) -> int:
    """Train; returns the exit code."""
    config = TrainConfig.from_json(arguments.config.read_text()) if arguments.config else TrainConfig()
    if arguments.steps:
        config = dataclasses.replace(config, steps=arguments.steps)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    trainer = Trainer(
        arguments.cache,
        arguments.directory,
        config,
        device=arguments.device,
        workers=arguments.workers,
        start_from=arguments.start_from,
        dnsmos=arguments.dnsmos,
    )
    try:
        trainer.run()
    finally:
        trainer.pool.close()
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `python -m percepnet.training.train`."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
