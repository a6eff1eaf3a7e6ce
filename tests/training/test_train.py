"""A run of a few steps on a tiny cache: what `percepnet train` promises of long ones."""

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from conftest import export_random_model  # noqa: E402
from signals import harmonics, vibrato, white_noise  # noqa: E402

from percepnet import stft  # noqa: E402
from percepnet.bands import band_energy, to_bins  # noqa: E402
from percepnet.cli import main  # noqa: E402
from percepnet.constants import SAMPLE_RATE, WINDOW  # noqa: E402
from percepnet.metrics import resampled, si_sdr  # noqa: E402
from percepnet.model import Model  # noqa: E402
from percepnet.synthesis import restoration  # noqa: E402
from percepnet.training import train as module  # noqa: E402
from percepnet.training.dataset import LOSS_BINS, PoolConfig, make_shard  # noqa: E402
from percepnet.training.export import export, restore  # noqa: E402
from percepnet.training.losses import LossConfig, SpectralLoss  # noqa: E402
from percepnet.training.mixing import Mixer  # noqa: E402
from percepnet.training.network import NetworkConfig, PercepNet  # noqa: E402
from percepnet.training.train import CHECKPOINT, LOG, Checkpoint, TrainConfig, grow  # noqa: E402

RECIPE = Path(module.__file__).parent
TINY = TrainConfig(
    steps=6,
    batch=4,
    warmup_steps=2,
    validation_shards=1,
    validation_every=3,
    checkpoint_every=3,
    network=NetworkConfig(fc=16, conv=32, gru=32, strength_gru=16),
    pool=PoolConfig(seconds=0.5, shard_examples=4, first_shards=2, shards=3, batches_per_shard=2.0),
)


def train(cache: Path, directory: Path, config: TrainConfig, *more: str) -> Checkpoint:
    path = directory.with_suffix(".json")
    path.write_text(config.to_json())
    arguments = [
        str(cache),
        str(directory),
        "--config",
        str(path),
        "--device",
        "cpu",
        "--threads",
        "1",
        *more,
    ]
    assert main(["train", *arguments]) == 0
    return Checkpoint.load(directory / CHECKPOINT)


def losses(directory: Path) -> list[str]:
    with (directory / LOG).open(newline="") as file:
        return [row["loss"] for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def finished(training_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "finished"
    train(training_cache, directory, TINY)
    return directory


def test_seeded_runs_repeat(training_cache: Path, finished: Path, tmp_path: Path) -> None:
    """The same cache, config and seed give the same losses and weights; another seed gives others."""
    again = train(training_cache, tmp_path / "again", TINY)
    first = Checkpoint.load(finished / CHECKPOINT)
    assert losses(finished) == losses(tmp_path / "again")
    assert all(torch.equal(first.average[name], value) for name, value in again.average.items())
    train(training_cache, tmp_path / "other", dataclasses.replace(TINY, seed=2))
    assert losses(finished) != losses(tmp_path / "other")


def test_a_killed_run_resumes_as_if_it_had_not_been(
    training_cache: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after its first checkpoint and started again, a run ends with the same weights and log."""
    step = module.Trainer.train_step

    def killed(trainer: module.Trainer) -> dict[str, float]:
        if trainer.step == 4:
            raise RuntimeError("killed")
        return step(trainer)

    directory = tmp_path / "resumed"
    with monkeypatch.context() as patch:
        patch.setattr(module.Trainer, "train_step", killed)
        with pytest.raises(RuntimeError, match="killed"):
            train(training_cache, directory, TINY)
    assert Checkpoint.load(directory / CHECKPOINT).step == 3
    resumed = train(training_cache, directory, TINY)
    unbroken = Checkpoint.load(finished / CHECKPOINT)
    assert losses(directory) == losses(finished)
    assert all(torch.equal(unbroken.network[name], value) for name, value in resumed.network.items())


def test_another_config_is_refused_in_the_folder_of_a_run(
    training_cache: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = finished.with_suffix(".other.json")
    path.write_text(dataclasses.replace(TINY, batch=2).to_json())
    assert main(["train", str(training_cache), str(finished), "--config", str(path)]) == 2
    assert "another config" in capsys.readouterr().err


def test_a_run_becomes_a_model_that_loads(finished: Path, tmp_path: Path) -> None:
    """`percepnet export` packages the averaged weights with the run's normalization."""
    assert main(["export", str(finished), str(tmp_path / "model"), "--version", "0.1"]) == 0
    model = Model.load(tmp_path / "model")
    checkpoint = Checkpoint.load(finished / CHECKPOINT)
    np.testing.assert_allclose(model.manifest.feature_mean, checkpoint.feature_mean.numpy(), atol=1e-5)
    assert model.manifest.training["steps"] == TINY.steps


def test_training_lowers_the_loss(training_cache: Path, tmp_path: Path) -> None:
    """On speakers and noises that are not trained on."""
    config = dataclasses.replace(TINY, steps=60, learning_rate=3e-3, validation_every=5, checkpoint_every=60)
    train(training_cache, tmp_path / "run", config)
    with (tmp_path / "run" / LOG).open(newline="") as file:
        values = [float(row["validation"]) for row in csv.DictReader(file) if row["validation"]]
    assert values[-1] < 0.8 * values[0]


def test_the_recipe_of_the_shipped_model_runs(training_cache: Path, dnsmos: Path, tmp_path: Path) -> None:
    """The stages of `make train`, cut to two steps, give a model of the shipped one's size that loads."""
    start: tuple[str, ...] = ()
    for stage in ("narrow", "wide", "judged"):
        config = TrainConfig.from_json((RECIPE / f"{stage}.json").read_text())
        short = dataclasses.replace(config, steps=2, batch=4, validation_shards=1, pool=TINY.pool)
        train(training_cache, tmp_path / stage, short, *start, "--dnsmos", str(dnsmos))
        start = "--start-from", str(tmp_path / stage / CHECKPOINT)
    with (tmp_path / "judged" / LOG).open(newline="") as file:
        terms = ("opinion", "listening", "intelligibility", "pesq", "high_band", "distortion")
        assert all(row[term] for row in csv.DictReader(file) for term in terms)
    assert main(["export", str(tmp_path / "judged"), str(tmp_path / "model"), "--version", "0.1"]) == 0
    model = Model.load(tmp_path / "model")
    assert model.manifest.n_weights == Model.load().manifest.n_weights


def test_a_wider_network_starts_as_the_narrow_one() -> None:
    """`grow` keeps the function: the wider network's outputs equal the narrow one's."""
    torch.manual_seed(0)
    narrow = PercepNet(NetworkConfig(fc=16, conv=24, gru=24, strength_gru=16), fast=False).eval()
    wide = PercepNet(NetworkConfig(fc=16, conv=40, gru=48, strength_gru=24), fast=False).eval()
    grow(narrow.state_dict(), wide)
    features = torch.randn(2, 20, 70)
    with torch.no_grad():
        for expected, found in zip(narrow(features)[:2], wide(features)[:2], strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_the_loss_enhances_as_the_service_does(training_cache: Path) -> None:
    """The differentiable synthesis equals the serving one, up to the bins that the loss leaves out."""
    shard = make_shard(Mixer(training_cache), 0, TINY.pool)
    noisy, comb = (shard[name].astype(np.float32) for name in ("noisy", "comb"))
    loss = SpectralLoss(LossConfig())
    gains, strengths = (torch.from_numpy(shard[name]).float() for name in ("gains", "strengths"))
    found = loss.enhance(torch.from_numpy(noisy), torch.from_numpy(comb), gains, strengths).numpy()

    full = np.zeros((2, *noisy.shape[:2], 481), np.complex64)
    for spectrum, pairs in zip(full, (noisy, comb), strict=True):
        spectrum[..., LOSS_BINS] = pairs[..., 0] + 1j * pairs[..., 1]
    mixed = full[0] + to_bins(strengths.numpy()) * (full[1] - full[0])
    factor = gains.numpy() * restoration(band_energy(full[0]), band_energy(mixed))
    expected = (mixed * to_bins(factor))[..., LOSS_BINS]
    error = np.abs(found[..., 0] + 1j * found[..., 1] - expected).max()
    assert error < 1e-4 * np.abs(expected).max()


def test_what_a_recording_does_not_tell_costs_nothing(training_cache: Path) -> None:
    """Gains above an example's bandwidth change neither the loss nor its gradient."""
    shard = make_shard(Mixer(training_cache), 0, TINY.pool)
    batch = {name: torch.from_numpy(values).float() for name, values in shard.items()}
    batch["bandwidth_hz"][:] = 4000.0
    gains = batch["gains"].clone().requires_grad_()
    loss, _ = SpectralLoss(LossConfig())(gains * 0.5, batch["strengths"], batch)
    loss.backward()
    # Bands 21 and up begin beyond 4 kHz; band 20's upper slope reaches across.
    assert torch.count_nonzero(gains.grad[..., 21:]) == 0
    assert torch.count_nonzero(gains.grad[..., :18]) > 0


def test_noise_above_a_recording_can_be_taught_away(training_cache: Path) -> None:
    """With `beyond`, leaving noise above an example's bandwidth costs more than taking it away."""
    shard = make_shard(Mixer(training_cache), 0, TINY.pool)
    batch = {name: torch.from_numpy(values).float() for name, values in shard.items()}
    batch["bandwidth_hz"][:] = 8000.0
    batch["clean"][:, :, 120:] = 0  # bins from 8 kHz up
    batch["gains"][:, :, 27:] = 0
    loss = SpectralLoss(LossConfig(beyond=0.25))
    muted = batch["gains"].clone()
    left = muted.clone()
    left[..., 27:] = 1
    assert loss(muted, batch["strengths"], batch)[0] < loss(left, batch["strengths"], batch)[0]


def test_the_high_band_distance_is_in_decibels() -> None:
    """Halving everything from 8 kHz up is 6 dB; bins that are not known say nothing."""
    clean = torch.rand(2, 60, 181, 2) + 0.1
    half = clean.clone()
    half[:, :, 120:] *= 0.5
    loss = SpectralLoss(LossConfig())
    assert float(loss.high_band_distance(half, clean, torch.ones(2, 181))) == pytest.approx(6.02, abs=0.2)
    known = torch.ones(2, 181)
    known[:, 120:] = 0
    assert float(loss.high_band_distance(half, clean, known)) == 0


def loss_spectra(signal: np.ndarray) -> torch.Tensor:
    """Spectra as the loss sees them, (1, frames, 181, 2)."""
    spectrum = stft.forward(stft.windows(signal[np.newaxis], WINDOW))
    return torch.view_as_real(torch.from_numpy(spectrum[..., LOSS_BINS])).float()


def test_the_intelligibility_loss_is_estoi(training_cache: Path) -> None:
    """On the loss's own frames it agrees with pystoi within 0.05, at every signal-to-noise ratio."""
    pystoi = pytest.importorskip("pystoi", reason="needs the measure extra")
    n_samples = 3 * SAMPLE_RATE
    syllables = 1 + np.sin(2 * np.pi * 4 * np.arange(n_samples) / SAMPLE_RATE)
    clean = syllables * harmonics(vibrato(120, n_samples), n_samples)
    noise = white_noise(n_samples, level=clean.std())
    loss = SpectralLoss(LossConfig())
    for snr_db in (-10, 0, 10):
        noisy = clean + 10 ** (-snr_db / 20) * noise
        expected = pystoi.stoi(clean, noisy, SAMPLE_RATE, extended=True)
        found = 1 - float(loss.missing_correlation(loss_spectra(noisy), loss_spectra(clean)))
        assert found == pytest.approx(expected, abs=0.05)


def test_the_distortion_loss_is_si_sdr() -> None:
    """On the loss's own frames and bins it agrees with the measure, at any scale; its bound is 30 dB."""
    n_samples = 3 * SAMPLE_RATE
    clean = 0.3 * harmonics(vibrato(120, n_samples), n_samples)
    noise = white_noise(n_samples, level=clean.std())
    loss = SpectralLoss(LossConfig())
    for snr_db in (-15, -5, 5):
        noisy = 0.7 * (clean + 10 ** (-snr_db / 20) * noise)
        expected = si_sdr(*(resampled(signal, SAMPLE_RATE, 16_000) for signal in (clean, noisy)))
        found = -float(loss.distortion(loss_spectra(noisy), loss_spectra(clean)))
        assert found == pytest.approx(expected, abs=0.3)
    assert -float(loss.distortion(loss_spectra(clean), loss_spectra(clean))) == pytest.approx(30, abs=0.1)


def test_silence_has_no_intelligibility_to_lose() -> None:
    """An example without speech costs a constant and moves nothing, rather than dividing by zero."""
    noisy = torch.rand(2, 60, 181, 2).requires_grad_()
    loss = SpectralLoss(LossConfig()).missing_correlation(noisy, torch.zeros(2, 60, 181, 2))
    loss.backward()
    assert loss == 1
    assert not noisy.grad.any()


def test_a_shipped_model_can_be_trained_on(finished: Path, training_cache: Path, tmp_path: Path) -> None:
    """`--start-from model.onnx` begins with the model's own weights and normalization."""
    path = export_random_model(tmp_path / "model", fc=16, conv=32, gru=32, strength_gru=16)
    expected = {name: torch.from_numpy(value) for name, value in restore(path).items()}
    config = dataclasses.replace(TINY, steps=1, learning_rate=0.0, warmup_steps=0)
    checkpoint = train(training_cache, tmp_path / "run", config, "--start-from", str(path))
    assert expected.keys() == checkpoint.network.keys()
    for name, value in checkpoint.network.items():
        torch.testing.assert_close(value, expected[name])
    assert torch.equal(checkpoint.feature_scale, torch.ones(70))


def test_restored_weights_export_to_the_same_model(tmp_path: Path) -> None:
    """Quantizing again what was quantized changes nothing."""
    path = export_random_model(tmp_path / "model", fc=16, conv=32, gru=32, strength_gru=16)
    manifest = {"name": "again", "version": "0", "license": "Apache-2.0"}
    ones = np.ones(70, np.float32)
    again = export(restore(path), tmp_path / "again", feature_mean=ones, feature_scale=ones, **manifest)
    features = np.random.default_rng(0).standard_normal((1, 50, 70)).astype(np.float32)
    first, second = (Model.load(p) for p in (path, again))
    gains, strengths, _ = first.step(features, first.initial_state(1))
    gains_again, strengths_again, _ = second.step(features, second.initial_state(1))
    np.testing.assert_allclose(gains_again, gains, atol=1e-2)
    np.testing.assert_allclose(strengths_again, strengths, atol=1e-2)
