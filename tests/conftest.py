"""Fixtures shared by the tests."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
from scipy import signal

from percepnet.constants import N_BANDS, N_FEATURES
from percepnet.constants import SAMPLE_RATE as RATE
from percepnet.enhancer import Enhancer
from percepnet.model import Model


def random_weights(
    seed: int = 0, *, fc: int = 128, conv: int = 512, gru: int = 512, strength_gru: int = 128
) -> dict[str, np.ndarray]:
    """Weights of an untrained PercepNet by their PyTorch names, scaled so that every layer is well driven."""
    rng = np.random.default_rng(seed)
    weights: dict[str, np.ndarray] = {}

    def add(name: str, *shape: int, gain: float = 1.5) -> None:
        fan_in = np.prod(shape[1:])
        weights[name] = (gain / np.sqrt(fan_in) * rng.standard_normal(shape)).astype(np.float32)

    def add_bias(name: str, size: int) -> None:
        weights[name] = (0.1 * rng.standard_normal(size)).astype(np.float32)

    layers = {
        "fc_in": (fc, N_FEATURES),
        "conv1": (conv, fc, 5),
        "conv2": (conv, conv, 3),
        "gain_out": (N_BANDS, gru),
        "strength_out": (N_BANDS, strength_gru),
    }
    for name, shape in layers.items():
        add(f"{name}.weight", *shape)
        add_bias(f"{name}.bias", shape[0])
    cells = {
        "gru1": (gru, conv),
        "gru2": (gru, gru),
        "gru3": (gru, gru),
        "gru_gain": (gru, gru),
        "gru_strength": (strength_gru, gru),
    }
    for name, (hidden, inputs) in cells.items():
        add(f"{name}.weight_ih", 3 * hidden, inputs)
        add(f"{name}.weight_hh", 3 * hidden, hidden, gain=1.0)
        add_bias(f"{name}.bias_ih", 3 * hidden)
        add_bias(f"{name}.bias_hh", 3 * hidden)
    return weights


def export_random_model(directory: Path, *, quantized: bool = True, **sizes: int) -> Path:
    """Export a model of random weights of the given sizes; returns the path of model.onnx."""
    pytest.importorskip("onnx")
    from percepnet.training.export import export

    return export(
        random_weights(**sizes),
        directory,
        name="random",
        version="0",
        feature_mean=np.zeros(N_FEATURES, np.float32),
        feature_scale=np.ones(N_FEATURES, np.float32),
        license="Apache-2.0",
        quantized=quantized,
    )


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A small int8 model with random weights: gains and strengths that move, but mean nothing."""
    directory = tmp_path_factory.mktemp("random_model")
    return Model.load(export_random_model(directory, fc=32, conv=64, gru=64, strength_gru=32))


def synthetic_voice(rng: np.random.Generator, rate: int) -> np.ndarray:
    """Syllables of a buzzing voice with pauses."""
    time = np.arange(3 * rate) / rate
    buzz = signal.sawtooth(2 * np.pi * rng.uniform(90, 250) * time) + 0.1 * rng.normal(size=len(time))
    return 0.3 * buzz * (np.sin(2 * np.pi * 2 * time) > -0.3)


@pytest.fixture(scope="session")
def enhancer(random_model: Model) -> Enhancer:
    return Enhancer(random_model)


@pytest.fixture(scope="session")
def training_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small cache of synthetic voices, noises and rooms, with speakers held out for validation."""
    from percepnet.training.prepare import prepare

    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    # Of these names, the fixed hash holds out some for validation.
    for index in range(40):
        folder = root / "speech" / f"speaker-{index}"
        folder.mkdir(parents=True)
        rate = RATE if index % 2 else 16_000
        soundfile.write(folder / "a.wav", synthetic_voice(rng, rate), rate)
    for index in range(40):
        folder = root / "noise" / f"kind-{index}"
        folder.mkdir(parents=True)
        soundfile.write(folder / "a.wav", rng.normal(0, 0.1, RATE * (1 + index % 5)), RATE)
    (root / "rooms").mkdir()
    for index in range(40):
        response = rng.normal(0, 0.01, RATE // 2) * np.exp(-np.arange(RATE // 2) / 5000)
        response[:49] = 0
        response[48] = 1.0
        soundfile.write(root / "rooms" / f"room{index // 2}-{index % 2}.flac", response, RATE)
    prepare(
        root / "cache",
        speech=[root / "speech"],
        noise=[root / "noise"],
        rooms=[root / "rooms"],
        simulated_rooms=0,
        progress=False,
    )
    return root / "cache"


@pytest.fixture(scope="session")
def voice() -> Callable[[np.random.Generator, int], np.ndarray]:
    """Makes three seconds of a synthetic voice at a given rate."""
    return synthetic_voice


@pytest.fixture(scope="session")
def dnsmos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small predictors with random weights and DNSMOS's layers; their inputs are windows, and a picture."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    folder = tmp_path_factory.mktemp("dnsmos")
    rng = np.random.default_rng(0)
    nodes, constants = [], []

    def constant(*shape: int, scale: float) -> str:
        return named(rng.normal(0, scale, shape).astype(np.float32))

    def named(values: np.ndarray) -> str:
        constants.append(numpy_helper.from_array(values, f"constant{len(constants)}"))
        return constants[-1].name

    def op(kind: str, *inputs: str, **attributes: object) -> str:
        nodes.append(helper.make_node(kind, inputs, [f"value{len(nodes)}"], **attributes))
        return nodes[-1].output[0]

    def scores(x: str, channels: tuple[int, ...], pooled: tuple[int, ...], n_scores: int) -> str:
        for layer, (inputs, outputs) in enumerate(pairwise(channels)):
            weight = constant(outputs, inputs, 3, 3, scale=(2 / 9 / inputs) ** 0.5)
            x = op("Relu", op("Conv", x, weight, constant(outputs, scale=0.1), pads=[1, 1, 1, 1]))
            if layer in pooled:
                x = op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
        x = op("ReduceMax", x, axes=[2, 3], keepdims=0)
        for layer, (inputs, outputs) in enumerate(((8, 16), (16, 8), (8, n_scores))):
            x = op("Add", op("MatMul", x, constant(inputs, outputs, scale=0.3)), constant(outputs, scale=0.1))
            x = op("Relu", x) if layer < 2 else x
        return x

    def save(name: str, output: str, source: str, *shape: int | None) -> None:
        ends = (
            helper.make_tensor_value_info(source, TensorProto.FLOAT, shape),
            helper.make_tensor_value_info(output, TensorProto.FLOAT, None),
        )
        graph = helper.make_graph(nodes, "predictor", ends[:1], ends[1:], constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.save(model, folder / name)
        nodes.clear()
        constants.clear()

    parts = [op("Conv", "windows", constant(161, 320, 1, scale=0.1)) for _ in range(2)]
    power = op("Add", *(op("Mul", part, part) for part in parts))
    logarithm = op("Div", op("Log", power), named(np.array(np.log(10), np.float32)))
    picture = op("Transpose", op("Reshape", logarithm, named(np.array([1, 1, 161, -1]))), perm=[0, 1, 3, 2])
    output = scores(picture, (1, 8, 6, 6, 4, 4, 4, 8), (3, 4, 5), 3)
    save("sig_bak_ovr.onnx", output, "windows", 1, 320, None)
    save("model_v8.onnx", scores("picture", (1, 6, 6, 4, 4, 8), (0, 1, 3), 1), "picture", 1, 1, None, 120)
    return folder
