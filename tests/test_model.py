"""The exported network: its graph, its arithmetic, and what is refused at load."""

import json
from collections import Counter
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from conftest import export_random_model, random_weights

from percepnet import model as model_module
from percepnet.constants import N_BANDS, N_FEATURES
from percepnet.model import STATES, Model, ModelError, State

onnx = pytest.importorskip("onnx")

SMALL = {"fc": 32, "conv": 64, "gru": 64, "strength_gru": 32}
ODD = {"fc": 30, "conv": 52, "gru": 45, "strength_gru": 19}


def random_features(streams: int, frames: int, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    drift = np.cumsum(0.3 * rng.standard_normal((streams, frames, N_FEATURES)), axis=1)
    return (np.tanh(drift) * 2 + 0.5 * rng.standard_normal(drift.shape)).astype(np.float32)


def naive_network(weights: dict[str, np.ndarray], features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gains and strengths of one stream, features (frames, 70), in float64 with loops and no state."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    def convolve(name: str, x: np.ndarray) -> np.ndarray:
        kernel = w[f"{name}.weight"]
        taps = kernel.shape[2]
        padded = np.concatenate([np.zeros((taps - 1, x.shape[1])), x])
        y = [np.einsum("oct,tc->o", kernel, padded[t : t + taps]) for t in range(len(x))]
        return np.tanh(np.array(y) + w[f"{name}.bias"])

    def recur(name: str, x: np.ndarray) -> np.ndarray:
        h = np.zeros(w[f"{name}.weight_hh"].shape[1])
        states = []
        for frame in x:
            x_r, x_z, x_n = np.split(w[f"{name}.weight_ih"] @ frame + w[f"{name}.bias_ih"], 3)
            h_r, h_z, h_n = np.split(w[f"{name}.weight_hh"] @ h + w[f"{name}.bias_hh"], 3)
            z = sigmoid(x_z + h_z)
            n = np.tanh(x_n + sigmoid(x_r + h_r) * h_n)
            h = (1 - z) * n + z * h
            states.append(h)
        return np.array(states)

    x = np.tanh(features @ w["fc_in.weight"].T + w["fc_in.bias"])
    x = convolve("conv2", convolve("conv1", x))
    x = recur("gru3", recur("gru2", recur("gru1", x)))
    heads = []
    for gru, dense in (("gru_gain", "gain_out"), ("gru_strength", "strength_out")):
        heads.append(sigmoid(recur(gru, x) @ w[f"{dense}.weight"].T + w[f"{dense}.bias"]))
    return heads[0], heads[1]


def tensors_of(graph: "onnx.GraphProto") -> list["onnx.TensorProto"]:
    """Constants of a graph and of the bodies in it."""
    bodies = [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    return [*graph.initializer, *(tensor for body in bodies for tensor in tensors_of(body))]


def operators_of(graph: "onnx.GraphProto") -> Counter[str]:
    count = Counter(node.op_type for node in graph.node)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                count += operators_of(attribute.g)
    return count


def assert_same_state(state: State, expected: State) -> None:
    assert state.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(state[name], expected[name], err_msg=name)


@pytest.fixture(scope="module", params=[SMALL, ODD], ids=["small", "odd widths"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model.load(export_random_model(tmp_path_factory.mktemp("model"), **request.param))


def test_a_batch_gives_each_stream_the_bits_it_gets_alone(model: Model) -> None:
    features = random_features(7, 9)
    gains, strengths, state = model.step(features, model.initial_state(7))
    for i in range(7):
        alone = model.step(features[i : i + 1], model.initial_state(1))
        np.testing.assert_array_equal(gains[i], alone[0][0])
        np.testing.assert_array_equal(strengths[i], alone[1][0])
        assert_same_state(alone[2], {name: rows[i : i + 1] for name, rows in state.items()})


@pytest.mark.parametrize("block", [1, 2, 3, 5, 11])
def test_blocks_of_any_length_give_the_same_bits(model: Model, block: int) -> None:
    features = random_features(3, 23)
    gains, strengths, final = model.step(features, model.initial_state(3))
    state = model.initial_state(3)
    for start in range(0, 23, block):
        part = slice(start, start + block)
        part_gains, part_strengths, state = model.step(features[:, part], state)
        np.testing.assert_array_equal(part_gains, gains[:, part])
        np.testing.assert_array_equal(part_strengths, strengths[:, part])
    assert_same_state(state, final)


def test_a_step_leaves_its_arguments_alone(random_model: Model) -> None:
    features = random_features(2, 4)
    state = random_model.step(features, random_model.initial_state(2))[2]
    before = {name: rows.copy() for name, rows in state.items()}
    first = random_model.step(features, state)
    second = random_model.step(features, state)
    assert_same_state(state, before)
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(features, random_features(2, 4))


def test_states_have_the_networks_shapes(random_model: Model) -> None:
    state = random_model.initial_state(3)
    assert tuple(state) == STATES
    assert {name: rows.shape[1:] for name, rows in state.items()} == {
        "conv1_state": (4, 32),
        "conv2_state": (2, 64),
        "gru1_state": (64,),
        "gru2_state": (64,),
        "gru3_state": (64,),
        "gru_gain_state": (64,),
        "gru_strength_state": (32,),
    }


def test_absurd_features_come_out_as_gains(random_model: Model) -> None:
    features = random_features(4, 6)
    features[0], features[1], features[2, :, ::2] = 1e30, -1e30, 1e4
    gains, strengths, _ = random_model.step(features, random_model.initial_state(4))
    for values in (gains, strengths):
        assert values.shape == (4, 6, N_BANDS)
        assert values.dtype == np.float32
        assert np.all((values >= 0) & (values <= 1))


def test_the_float_graph_is_the_network(tmp_path: Path) -> None:
    """Against a naive float64 network: -100 dB is what float32 rounding allows."""
    float_model = Model.load(export_random_model(tmp_path, quantized=False, **SMALL))
    features = random_features(2, 40)
    outputs = float_model.step(features, float_model.initial_state(2))[:2]
    for i in range(2):
        for found, expected in zip(outputs, naive_network(random_weights(**SMALL), features[i]), strict=True):
            np.testing.assert_allclose(found[i], expected, atol=1e-5)
    assert float_model.precision == "fp32"


def test_int8_stays_close_to_float(random_model: Model) -> None:
    """A small random network averages little; a trained one of full size is closer."""
    features = random_features(1, 60)
    found = random_model.step(features, random_model.initial_state(1))[:2]
    for values, expected in zip(found, naive_network(random_weights(**SMALL), features[0]), strict=True):
        assert expected.std() > 0.1
        assert np.sqrt(np.mean((values[0] - expected) ** 2)) < 0.01


def test_features_enter_with_more_than_eight_bits(random_model: Model) -> None:
    """One uint8 step over the input range is 0.13; a smaller move still changes the gains."""
    still = np.zeros((1, 1, N_FEATURES), np.float32)
    gains = [
        random_model.step(x, random_model.initial_state(1))[0] for x in (still, still + np.float32(0.05))
    ]
    assert not np.array_equal(gains[0], gains[1])


def test_the_full_network_is_int8_throughout(tmp_path: Path) -> None:
    """onnxruntime has no quantized GRU: one left in the graph would run in float32 without a word."""
    path = export_random_model(tmp_path)
    assert 7_500_000 < path.stat().st_size < 9_000_000
    graph = onnx.load(path).graph
    assert operators_of(graph) == {
        "MatMulIntegerToFloat": 26,
        "QuantizeLinear": 15,
        "DequantizeLinear": 1,
        "Tanh": 8,
        "Sigmoid": 7,
        "Add": 16,
        "Mul": 10,
        "Sub": 6,
        "Split": 5,
        "Scan": 5,
        "Slice": 10,
        "Concat": 4,
        "Transpose": 3,
        "MatMulInteger": 1,  # the overflow check, two products
    }
    matrices = [tensor for tensor in tensors_of(graph) if len(tensor.dims) > 1 and np.prod(tensor.dims) > 2]
    assert {tensor.data_type for tensor in matrices} == {onnx.TensorProto.INT8}
    assert sum(np.prod(tensor.dims) for tensor in matrices) > 7_500_000


def test_a_cpu_whose_sums_overflow_computes_the_same(
    tmp_path: Path, random_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = export_random_model(tmp_path, **SMALL)
    monkeypatch.setattr(model_module, "EXACT_SUM", 0)
    rewritten = Model.load(path)
    assert random_model.precision == "int8"
    assert "uint8" in rewritten.precision
    features = random_features(2, 5)
    gains = random_model.step(features, random_model.initial_state(2))[0]
    np.testing.assert_array_equal(rewritten.step(features, rewritten.initial_state(2))[0], gains)


def test_the_network_runs_on_one_thread(random_model: Model) -> None:
    options = random_model._session.get_session_options()
    assert options.intra_op_num_threads == options.inter_op_num_threads == 1
    for pool in ("intra_op", "inter_op"):
        assert options.get_session_config_entry(f"session.{pool}.allow_spinning") == "0"


def test_the_manifest_describes_the_model(tmp_path: Path) -> None:
    path = export_random_model(tmp_path, **SMALL)
    manifest = Model.load(tmp_path).manifest
    assert manifest.sha256 == Model.load(path).manifest.sha256 == sha256(path.read_bytes()).hexdigest()
    assert (manifest.name, manifest.version, manifest.license) == ("random", "0", "Apache-2.0")
    assert manifest.n_weights == sum(value.size for value in random_weights(**SMALL).values())
    assert manifest.feature_mean.dtype == manifest.feature_scale.dtype == np.float32
    np.testing.assert_array_equal(manifest.feature_scale, np.ones(N_FEATURES))


class TestRefused:
    """A model that is not exactly what this version expects does not load."""

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return export_random_model(tmp_path, **SMALL)

    def edit(self, path: Path, **fields: object) -> None:
        manifest = path.with_name("model.json")
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | fields))

    def test_damaged_model(self, path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        with pytest.raises(ModelError, match="damaged: its sha256 is"):
            Model.load(path)

    def test_truncated_manifest(self, path: Path) -> None:
        manifest = path.with_name("model.json")
        manifest.write_bytes(manifest.read_bytes()[:100])
        with pytest.raises(ModelError, match="cannot read the model's manifest"):
            Model.load(path)

    @pytest.mark.parametrize("name", ["model.json", "model.onnx"])
    def test_missing_file(self, path: Path, name: str) -> None:
        path.with_name(name).unlink()
        with pytest.raises(ModelError, match=name):
            Model.load(path)

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"there is no model .*/nope; accepted are a model.onnx"):
            Model.load(tmp_path / "nope")

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"format": "rnnoise-9"}, "no percepnet-1 manifest .* 'rnnoise-9'"),
            ({"hop": 160}, "for hop = 160, this version needs 480"),
            ({"sample_rate": 16_000}, "for sample_rate = 16000"),
            ({"feature_mean": [0.0] * 42}, "feature_mean must be 70 finite numbers"),
            ({"feature_scale": [float("nan")] * 70}, "feature_scale must be 70 finite numbers"),
            ({"feature_scale": "loud"}, "feature_scale must be 70 finite numbers"),
            ({"surprise": 1}, "surprise"),
        ],
    )
    def test_foreign_manifest(self, path: Path, fields: dict[str, object], message: str) -> None:
        self.edit(path, **fields)
        with pytest.raises(ModelError, match=message):
            Model.load(path)

    def test_what_is_no_graph(self, path: Path) -> None:
        self.replace(path, b"not a graph")
        with pytest.raises(ModelError, match="refuses the model"):
            Model.load(path)

    def test_other_graph(self, path: Path) -> None:
        graph = onnx.load(path)
        graph.graph.input[1].name = "memory"
        graph.graph.node.append(onnx.helper.make_node("Identity", ["memory"], ["conv1_state"]))
        graph.graph.node.insert(0, graph.graph.node.pop())
        self.replace(path, graph.SerializeToString())
        with pytest.raises(ModelError, match=r"has the inputs .*'memory'.*, expected .*'conv1_state'"):
            Model.load(path)

    def replace(self, path: Path, data: bytes) -> None:
        """Other bytes with a manifest that vouches for them."""
        path.write_bytes(data)
        self.edit(path, sha256=sha256(data).hexdigest())
