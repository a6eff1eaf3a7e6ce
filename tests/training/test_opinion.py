"""The listener's opinion in the loss: the same predictor in PyTorch, on the spectra of the loss."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from signals import harmonics, vibrato, white_noise  # noqa: E402

from percepnet import stft  # noqa: E402
from percepnet.cli import main  # noqa: E402
from percepnet.constants import SAMPLE_RATE, WINDOW  # noqa: E402
from percepnet.training.dataset import LOSS_BINS  # noqa: E402
from percepnet.training.opinion import OpinionPredictor  # noqa: E402

CHANNELS = (1, 8, 6, 6, 4, 4, 4, 8)


@pytest.fixture(scope="session")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small predictor with random weights and DNSMOS's layers; its input is cut into windows already."""
    rng = np.random.default_rng(0)
    nodes, constants = [], []

    def constant(*shape: int, scale: float) -> str:
        name = f"constant{len(constants)}"
        values = rng.normal(0, scale, shape).astype(np.float32)
        constants.append(numpy_helper.from_array(values, name))
        return name

    def op(kind: str, *inputs: str, **attributes: object) -> str:
        nodes.append(helper.make_node(kind, inputs, [f"value{len(nodes)}"], **attributes))
        return nodes[-1].output[0]

    parts = [op("Conv", "windows", constant(161, 320, 1, scale=0.1)) for _ in range(2)]
    power = op("Add", *(op("Mul", part, part) for part in parts))
    shape = numpy_helper.from_array(np.array([1, 1, 161, -1]), "shape")
    constants.append(shape)
    x = op("Transpose", op("Reshape", op("Log", power), "shape"), perm=[0, 1, 3, 2])
    constants.append(numpy_helper.from_array(np.array(np.log(10), np.float32), "ln10"))
    x = op("Div", x, "ln10")
    for layer, (inputs, outputs) in enumerate(pairwise(CHANNELS)):
        weight = constant(outputs, inputs, 3, 3, scale=(2 / 9 / inputs) ** 0.5)
        x = op("Relu", op("Conv", x, weight, constant(outputs, scale=0.1), pads=[1, 1, 1, 1]))
        if layer in (3, 4, 5):
            x = op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = op("ReduceMax", x, axes=[2, 3], keepdims=0)
    for layer, (inputs, outputs) in enumerate(((8, 16), (16, 8), (8, 3))):
        x = op("Add", op("MatMul", x, constant(inputs, outputs, scale=0.3)), constant(outputs, scale=0.1))
        x = op("Relu", x) if layer < 2 else x
    windows = helper.make_tensor_value_info("windows", TensorProto.FLOAT, [1, 320, None])
    scores = helper.make_tensor_value_info(x, TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "predictor", [windows], [scores], constants)
    path = tmp_path_factory.mktemp("predictor") / "sig_bak_ovr.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def pairs(signal: np.ndarray) -> torch.Tensor:
    """A signal's spectra as a shard holds them."""
    spectrum = stft.forward(stft.windows(signal[np.newaxis], WINDOW))
    return torch.view_as_real(torch.from_numpy(spectrum[..., LOSS_BINS])).float()


def test_it_judges_as_the_published_model_does(predictor: Path) -> None:
    samples = white_noise(16000).astype(np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(samples, 320)[::160].T[np.newaxis]
    expected = onnxruntime.InferenceSession(predictor).run(None, {"windows": windows})[0]
    found = OpinionPredictor(predictor).judge(torch.from_numpy(samples)[None]).numpy()
    np.testing.assert_allclose(found, expected, rtol=0.03, atol=0.03)  # its layers compute in bfloat16


def test_it_hears_the_signal_of_the_spectra(predictor: Path) -> None:
    """Below 4 kHz, where the loss has every bin, the samples are the signal at 16 kHz."""
    signal = harmonics(vibrato(150, SAMPLE_RATE), SAMPLE_RATE, top_hz=3500)
    heard = OpinionPredictor(predictor).samples(pairs(signal))[0].numpy()
    expected = signal[SAMPLE_RATE // 100 :][1::3][: len(heard)]
    assert np.corrcoef(heard[160:-160], expected[160 : len(heard) - 160])[0, 1] > 0.99


def test_a_better_opinion_can_be_learned(predictor: Path) -> None:
    """The gradient reaches the spectra, and a step along it raises the score."""
    spectra = pairs(white_noise(SAMPLE_RATE // 2)).requires_grad_()
    opinion = OpinionPredictor(predictor)
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
