"""The listener's opinion in the loss: the same predictor in PyTorch, on the spectra of the loss."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

from signals import white_noise  # noqa: E402

from percepnet import stft  # noqa: E402
from percepnet.cli import main  # noqa: E402
from percepnet.constants import SAMPLE_RATE, WINDOW  # noqa: E402
from percepnet.training.dataset import LOSS_BINS  # noqa: E402
from percepnet.training.opinion import OpinionPredictor  # noqa: E402


def pairs(signal: np.ndarray) -> torch.Tensor:
    """A signal's spectra as a shard holds them."""
    spectrum = stft.forward(stft.windows(signal[np.newaxis], WINDOW))
    return torch.view_as_real(torch.from_numpy(spectrum[..., LOSS_BINS])).float()


def test_it_judges_as_the_published_model_does(opinion_model: Path) -> None:
    samples = white_noise(16000).astype(np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(samples, 320)[::160].T[np.newaxis]
    expected = onnxruntime.InferenceSession(opinion_model).run(None, {"windows": windows})[0]
    found = OpinionPredictor(opinion_model).judge(torch.from_numpy(samples)[None]).numpy()
    np.testing.assert_allclose(found, expected, rtol=0.03, atol=0.03)  # its layers compute in bfloat16


def test_a_better_opinion_can_be_learned(opinion_model: Path) -> None:
    """The gradient reaches the spectra, and a step along it raises the score."""
    spectra = pairs(white_noise(SAMPLE_RATE // 2)).requires_grad_()
    opinion = OpinionPredictor(opinion_model)
    score = opinion(0.01 * spectra)[:, 2].mean()
    score.backward()
    step = 1e-3 * spectra.detach().norm() / spectra.grad.norm() * spectra.grad
    with torch.no_grad():
        assert opinion(0.01 * (spectra + 100 * step))[:, 2].mean() > score


def test_another_file_is_refused(
    training_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"opinion": 0.01, "steps": 1}')
    arguments = ["train", str(training_cache), str(tmp_path / "run"), "--config", str(config)]
    assert main(arguments) == 2
    assert "--opinion-model" in capsys.readouterr().err
    assert main([*arguments, "--opinion-model", str(config)]) == 2
    assert "is not DNSMOS's sig_bak_ovr.onnx" in capsys.readouterr().err
