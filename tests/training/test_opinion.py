"""The listeners' opinion in the loss: the same predictors in PyTorch, on the spectra of the loss."""

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
from percepnet.errors import ParameterError  # noqa: E402
from percepnet.training.dataset import LOSS_BINS  # noqa: E402
from percepnet.training.opinion import P808_FILE, P835_FILE, ListeningPredictor, OpinionPredictor, Predictor  # noqa: E402


def pairs(signal: np.ndarray) -> torch.Tensor:
    """A signal's spectra as a shard holds them."""
    spectrum = stft.forward(stft.windows(signal[np.newaxis], WINDOW))
    return torch.view_as_real(torch.from_numpy(spectrum[..., LOSS_BINS])).float()


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path)


def test_p835_judges_as_the_published_model_does(dnsmos: Path) -> None:
    samples = white_noise(16000).astype(np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(samples, 320)[::160].T[np.newaxis]
    expected = session(dnsmos / P835_FILE).run(None, {"windows": windows})[0]
    found = OpinionPredictor(dnsmos / P835_FILE).judge(torch.from_numpy(samples)[None]).numpy()
    np.testing.assert_allclose(found, expected, rtol=0.03, atol=0.03)  # its layers compute in bfloat16


def mel(hz: float) -> float:
    """Slaney's scale: even up to 1 kHz, logarithmic above."""
    return hz / (200 / 3) if hz < 1000 else 15 + 27 * np.log(hz / 1000) / np.log(6.4)


def hertz(mel: float) -> float:
    return mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)


def test_p808_judges_as_the_published_model_does(dnsmos: Path) -> None:
    """Its picture: 120 triangles of area one on the mel scale, in dB below the loudest, 40 dB as one."""
    samples = np.concatenate([white_noise(8000), 1e-6 * white_noise(8000)]).astype(np.float32)
    edges = [hertz(step * mel(8000) / 121) for step in range(122)]
    hz = np.arange(161) * 16000 / 321
    weights = [
        np.interp(hz, [low, center, high], [0, 2 / (high - low), 0])
        for low, center, high in zip(edges, edges[1:], edges[2:], strict=False)
    ]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(321) / 321)
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(samples, 160), 321)[::160]
    power = np.abs(np.fft.rfft(frames * window)) ** 2 @ np.transpose(weights)
    picture = np.maximum(10 * np.log10(np.maximum(power, 1e-10) / power.max()), -80) / 40 + 1
    expected = session(dnsmos / P808_FILE).run(None, {"picture": picture[None, None].astype(np.float32)})[0]
    found = ListeningPredictor(dnsmos / P808_FILE).judge(torch.from_numpy(samples)[None]).numpy()
    np.testing.assert_allclose(found, expected, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("kind", [OpinionPredictor, ListeningPredictor])
def test_a_better_opinion_can_be_learned(dnsmos: Path, kind: type[Predictor]) -> None:
    """The gradient reaches the spectra, and a step along it raises the score."""
    spectra = pairs(white_noise(SAMPLE_RATE // 2)).requires_grad_()
    opinion = kind(dnsmos / kind.file)
    score = opinion(0.01 * spectra)[:, -1].mean()
    score.backward()
    step = 1e-3 * spectra.detach().norm() / spectra.grad.norm() * spectra.grad
    with torch.no_grad():
        assert opinion(0.01 * (spectra + 10 * step))[:, -1].mean() > score


@pytest.mark.parametrize(("term", "file"), [("opinion", P835_FILE), ("listening", P808_FILE)])
def test_another_file_is_refused(
    training_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], term: str, file: str
) -> None:
    config = tmp_path / "config.json"
    config.write_text(f'{{"{term}": 0.01, "steps": 1}}')
    arguments = ["train", str(training_cache), str(tmp_path / "run"), "--config", str(config)]
    assert main(arguments) == 2
    assert f"'{term}' takes --dnsmos, the folder with {file}" in capsys.readouterr().err
    config.rename(tmp_path / file)
    assert main([*arguments[:-1], str(tmp_path / file), "--dnsmos", str(tmp_path)]) == 2
    assert f"is not DNSMOS's {file}" in capsys.readouterr().err


def test_one_predictor_is_not_taken_for_the_other(dnsmos: Path) -> None:
    for kind, other in ((OpinionPredictor, P808_FILE), (ListeningPredictor, P835_FILE)):
        with pytest.raises(ParameterError, match=f"is not DNSMOS's {kind.file}"):
            kind(dnsmos / other)
