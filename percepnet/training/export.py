"""Turns trained weights into the step graph that serves: model.onnx and its manifest model.json.

Every matrix becomes int8 with one scale per output channel and multiplies uint8 activations of static scale,
the one combination with fast x86 kernels. Gates stay float32: onnxruntime has no quantized GRU, so each cell
is written out as integer matrix products and element-wise operators.
"""

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from percepnet.constants import HOP, LOOKAHEAD_FRAMES, N_BANDS, N_FEATURES, SAMPLE_RATE
from percepnet.model import ACTIVATION_ZERO, FORMAT, FP32, INT8, MANIFEST_FILE, MODEL_FILE, OVERFLOW_CHECK

Weights = Mapping[str, np.ndarray]

OPSET = 17
IR_VERSION = 8
"""Old enough for every onnxruntime that the package accepts."""

END = 2**31
"""Slice up to the last frame."""

ACTIVATION_SCALE = 1 / 127
"""Step of a uint8 activation: tanh outputs and GRU states lie in [-1, 1] by construction."""

INPUT_RANGE = 16.0
"""Features are clipped to ± this many standard deviations; far outside what real signals reach."""

FINE_STEPS = 254
"""A feature is a coarse uint8 plus its rounding error as a second, this many times finer uint8."""

CONVOLUTIONS = ("conv1", "conv2")
STACKED_GRUS = ("gru1", "gru2", "gru3")
HEADS = {"gains": ("gru_gain", "gain_out"), "strengths": ("gru_strength", "strength_out")}


def quantize_matrix(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round a weight matrix to int8, symmetric, one scale per output channel.

    matrix: (inputs, outputs) float. Returns int8 (inputs, outputs) and scales, float32 (outputs,).
    """
    peak = np.abs(matrix).max(axis=0)
    scale = np.where(peak > 0, peak / 127, 1).astype(np.float32)
    return np.rint(matrix / scale).astype(np.int8), scale


class _Graph:
    """A graph or loop body under construction: its nodes and constants, added one operator at a time."""

    def __init__(self, name: str, *, quantized: bool) -> None:
        self.name = name
        self.quantized = quantized
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, TensorProto] = {}

    def op(self, kind: str, *inputs: str, output: str | None = None, **attributes: object) -> str:
        """Append an operator with one output; returns the output's name."""
        output = output or self.fresh(kind)
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def fresh(self, kind: str) -> str:
        """A name for the output of the next node."""
        return f"{self.name}/{len(self.nodes)}_{kind}"

    def constant(self, name: str, value: np.ndarray) -> str:
        name = f"{self.name}/{name}"
        self.constants[name] = numpy_helper.from_array(value, name)
        return name

    def ints(self, *values: int) -> str:
        return self.constant("ints_" + "_".join(map(str, values)), np.array(values, np.int64))

    def quantization(self, scale: float) -> tuple[str, str]:
        """Scale and zero point of a uint8 tensor."""
        return (
            self.constant(f"scale_{scale:.9g}", np.array(scale, np.float32)),
            self.constant("zero", np.array(ACTIVATION_ZERO, np.uint8)),
        )

    def quantize(self, x: str, scale: float, output: str | None = None) -> str:
        return self.op("QuantizeLinear", x, *self.quantization(scale), output=output)

    def activation(self, x: str, output: str | None = None) -> str:
        """Values in [-1, 1] as matrix products take them."""
        if self.quantized:
            return self.quantize(x, ACTIVATION_SCALE, output)
        return self.op("Identity", x, output=output)

    def frames(self, x: str, start: int, stop: int = END, output: str | None = None) -> str:
        """x[:, start:stop] of x (streams, frames, …)."""
        return self.op("Slice", x, self.ints(start), self.ints(stop), self.ints(1), output=output)

    def dense(
        self,
        x: str,
        name: str,
        matrix: np.ndarray,
        bias: np.ndarray | None = None,
        scale: float = ACTIVATION_SCALE,
    ) -> str:
        """x (…, inputs) times matrix (inputs, outputs) plus bias, in float32; scale: the step of x."""
        offset = () if bias is None else (self.constant(f"{name}.bias", bias),)
        if not self.quantized:
            product = self.op("MatMul", x, self.constant(f"{name}.weight", matrix))
            return self.op("Add", product, *offset) if offset else product
        integers, weight_scales = quantize_matrix(matrix)
        weight = self.constant(f"{name}.weight", integers)
        weight_scale = self.constant(f"{name}.scale", weight_scales)
        x_scale, x_zero = self.quantization(scale)
        return self.op(
            "MatMulIntegerToFloat",
            x,
            weight,
            x_scale,
            weight_scale,
            x_zero,
            "",
            *offset,
            domain="com.microsoft",
        )

    def graph(
        self, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[onnx.ValueInfoProto]
    ) -> onnx.GraphProto:
        return helper.make_graph(self.nodes, self.name, inputs, outputs, list(self.constants.values()))


def _input_layer(graph: _Graph, weights: Weights, features: str) -> str:
    """tanh of the first layer; it takes float features, as two uint8 each when quantized."""
    matrix, bias = weights["fc_in.weight"].T, weights["fc_in.bias"]
    if not graph.quantized:
        return graph.op("Tanh", graph.dense(features, "fc_in", matrix, bias))
    step, fine_step = INPUT_RANGE / 127, INPUT_RANGE / 127 / FINE_STEPS
    coarse = graph.quantize(features, step)
    rest = graph.op("Sub", features, graph.op("DequantizeLinear", coarse, *graph.quantization(step)))
    fine = graph.quantize(rest, fine_step)
    # The matrix is stored twice (9 kB): onnxruntime's uint8 rewrite refuses weights that two operators share.
    sum_coarse = graph.dense(coarse, "fc_in", matrix, bias, step)
    sum_fine = graph.dense(fine, "fc_in_fine", matrix, None, fine_step)
    return graph.op("Tanh", graph.op("Add", sum_coarse, sum_fine))


def _convolution(graph: _Graph, weights: Weights, name: str, x: str) -> str:
    """tanh of a causal convolution over the frames of x (streams, frames, channels)."""
    kernel, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    outputs, _, taps = kernel.shape
    past_and_x = graph.op("Concat", f"{name}_state", x, axis=1)
    graph.frames(past_and_x, 1 - taps, output=f"next_{name}_state")
    reach = [graph.frames(past_and_x, tap, tap - taps + 1 or END) for tap in range(taps)]
    matrix = kernel.transpose(2, 1, 0).reshape(-1, outputs)
    return graph.op("Tanh", graph.dense(graph.op("Concat", *reach, axis=2), name, matrix, bias))


def _recurrence(graph: _Graph, weights: Weights, name: str, x: str) -> str:
    """A GRU over x (frames, streams, inputs); returns its states, as activations (frames, streams, hidden).

    r, z = sigmoid(W x + U h + b), n = tanh(W x + b + r·(U h + b)), h' = n + z·(h - n), as in PyTorch. The
    input's part W x + b is one product for all frames; a loop over frames does the rest.
    """
    w, u = weights[f"{name}.weight_ih"].T, weights[f"{name}.weight_hh"].T
    w_bias, u_bias = weights[f"{name}.bias_ih"], weights[f"{name}.bias_hh"]
    rz, n = slice(0, 2 * len(u)), slice(2 * len(u), None)
    x_rz = graph.dense(x, f"{name}.x_rz", w[:, rz], w_bias[rz] + u_bias[rz])
    x_n = graph.dense(x, f"{name}.x_n", w[:, n], w_bias[n])

    body = _Graph(name, quantized=graph.quantized)
    old = body.activation("h")
    gates = body.op("Sigmoid", body.op("Add", "frame_rz", body.dense(old, "h_rz", u[:, rz])))
    reset, update = f"{name}/reset", f"{name}/update"
    body.nodes.append(helper.make_node("Split", [gates], [reset, update], axis=-1))
    recurrent = body.op("Mul", reset, body.dense(old, "h_n", u[:, n], u_bias[n]))
    candidate = body.op("Tanh", body.op("Add", "frame_n", recurrent))
    change = body.op("Mul", update, body.op("Sub", "h", candidate))
    body.activation(body.op("Add", candidate, change, output="next_h"), output="frame_out")

    inputs = [_tensor("h"), _tensor("frame_rz"), _tensor("frame_n")]
    outputs = [_tensor("next_h"), _tensor("frame_out", graph.quantized)]
    states = graph.fresh("Scan")
    loop = helper.make_node(
        "Scan",
        [f"{name}_state", x_rz, x_n],
        [f"next_{name}_state", states],
        body=body.graph(inputs, outputs),
        num_scan_inputs=2,
    )
    graph.nodes.append(loop)
    return states


def _tensor(
    name: str, is_uint8: bool = False, shape: Sequence[int | str] | None = None
) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.UINT8 if is_uint8 else TensorProto.FLOAT, shape)


def build(weights: Weights, *, quantized: bool = True) -> onnx.ModelProto:
    """The step graph of a network: features and state in; gains, strengths and the next state out.

    weights: PercepNet parameters by their PyTorch names, float arrays; the network's sizes are theirs.
    quantized: int8 matrices; False gives float32 ones.
    """
    weights = {name: np.asarray(value, np.float32) for name, value in weights.items()}
    graph = _Graph("percepnet", quantized=quantized)
    x = graph.activation(_input_layer(graph, weights, "features"))
    for name in CONVOLUTIONS:
        x = graph.activation(_convolution(graph, weights, name, x))
    x = graph.op("Transpose", x, perm=[1, 0, 2])  # frames first, for the loops
    for name in STACKED_GRUS:
        x = _recurrence(graph, weights, name, x)
    for output, (gru, dense) in HEADS.items():
        states = _recurrence(graph, weights, gru, x)
        logits = graph.dense(states, dense, weights[f"{dense}.weight"].T, weights[f"{dense}.bias"])
        graph.op("Transpose", graph.op("Sigmoid", logits), perm=[1, 0, 2], output=output)

    inputs = [_tensor("features", shape=["streams", "frames", N_FEATURES])]
    outputs = [_tensor(name, shape=["streams", "frames", N_BANDS]) for name in HEADS]
    for name, shape in state_shapes(weights).items():
        is_uint8 = quantized and name.removesuffix("_state") in CONVOLUTIONS
        inputs.append(_tensor(name, is_uint8, ["streams", *shape]))
        outputs.append(_tensor(f"next_{name}", is_uint8, ["streams", *shape]))
    if quantized:
        _add_overflow_check(graph, outputs)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(
        graph.graph(inputs, outputs), opset_imports=opsets, ir_version=IR_VERSION, producer_name="percepnet"
    )


def _add_overflow_check(graph: _Graph, outputs: list[onnx.ValueInfoProto]) -> None:
    """Add an output that tells whether the CPU's integer products are exact; folded when the model loads."""
    extremes = np.array([[255, 255]], np.uint8), np.array([[127], [127]], np.int8)
    factors = (graph.constant(f"overflow_{i}", value) for i, value in enumerate(extremes))
    graph.op("MatMulInteger", *factors, output=OVERFLOW_CHECK)
    outputs.append(helper.make_tensor_value_info(OVERFLOW_CHECK, TensorProto.INT32, [1, 1]))


def state_shapes(weights: Weights) -> dict[str, tuple[int, ...]]:
    """Each state tensor's shape without the stream axis, from the shapes of the weights."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in CONVOLUTIONS:
        _, channels, taps = weights[f"{name}.weight"].shape
        shapes[f"{name}_state"] = (taps - 1, channels)
    for name in (*STACKED_GRUS, *(gru for gru, _ in HEADS.values())):
        shapes[f"{name}_state"] = (weights[f"{name}.weight_hh"].shape[1],)
    return shapes


def export(
    weights: Weights,
    directory: Path,
    *,
    name: str,
    version: str,
    feature_mean: np.ndarray,
    feature_scale: np.ndarray,
    license: str,
    training: Mapping[str, object] | None = None,
    quantized: bool = True,
) -> Path:
    """Write model.onnx and model.json into a directory.

    weights: PercepNet parameters by their PyTorch names, float arrays. name, version, license: text for the
    manifest. feature_mean, feature_scale: (70,), the normalization (feature - mean) · scale. training: a
    summary of how the weights came about, JSON-serializable. quantized: int8 matrices; False writes float32
    ones, for comparison. Returns the path of model.onnx.
    """
    data = build(weights, quantized=quantized).SerializeToString()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MODEL_FILE).write_bytes(data)
    manifest = {
        "format": FORMAT,
        "name": name,
        "version": version,
        "sha256": hashlib.sha256(data).hexdigest(),
        "license": license,
        "sample_rate": SAMPLE_RATE,
        "hop": HOP,
        "n_bands": N_BANDS,
        "n_features": N_FEATURES,
        "lookahead_frames": LOOKAHEAD_FRAMES,
        "n_weights": sum(value.size for value in weights.values()),
        "quantization": INT8 if quantized else FP32,
        "feature_mean": [round(float(value), 6) for value in feature_mean],
        "feature_scale": [round(float(value), 6) for value in feature_scale],
        "training": dict(training or {}),
    }
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    (directory / MANIFEST_FILE).write_text(text, encoding="utf-8")
    return directory / MODEL_FILE


def restore(path: Path) -> dict[str, np.ndarray]:
    """Weights of an exported model, for training to start from: what `export` took, up to int8 rounding.

    path: a model.onnx. Returns PercepNet parameters by their PyTorch names, float32 arrays.
    """
    graph = onnx.load(path).graph
    loops = [attribute.g for node in graph.node for attribute in node.attribute if attribute.name == "body"]
    tensors = {
        tensor.name.partition("/")[2]: numpy_helper.to_array(tensor).copy()
        for part in (graph, *loops)
        for tensor in part.initializer
    } | {
        f"{loop.name}.{tensor.name.partition('/')[2]}": numpy_helper.to_array(tensor).copy()
        for loop in loops
        for tensor in loop.initializer
    }
    states = {node.name: node.type.tensor_type.shape.dim for node in graph.input}

    def matrix(name: str) -> np.ndarray:
        """A weight matrix (outputs, inputs) in float32."""
        return (tensors[f"{name}.weight"] * tensors.get(f"{name}.scale", np.float32(1))).T

    weights: dict[str, np.ndarray] = {}
    for name in ("fc_in", *CONVOLUTIONS, *(output for _, output in HEADS.values())):
        weights |= {f"{name}.weight": matrix(name), f"{name}.bias": tensors[f"{name}.bias"]}
    for name in CONVOLUTIONS:
        taps = states[f"{name}_state"][1].dim_value + 1
        flat = weights[f"{name}.weight"]
        weights[f"{name}.weight"] = flat.reshape(len(flat), taps, -1).transpose(0, 2, 1).copy()
    for name in (*STACKED_GRUS, *(gru for gru, _ in HEADS.values())):
        recurrent_bias = tensors[f"{name}.h_n.bias"]
        weights[f"{name}.weight_ih"] = np.concatenate([matrix(f"{name}.x_rz"), matrix(f"{name}.x_n")])
        weights[f"{name}.weight_hh"] = np.concatenate([matrix(f"{name}.h_rz"), matrix(f"{name}.h_n")])
        weights[f"{name}.bias_ih"] = np.concatenate(
            [tensors[f"{name}.x_rz.bias"], tensors[f"{name}.x_n.bias"]]
        )
        weights[f"{name}.bias_hh"] = np.pad(recurrent_bias, (2 * len(recurrent_bias), 0))
    return weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `percepnet export`."""
    parser.add_argument("run", type=Path, help="folder of a training run, or a checkpoint file")
    parser.add_argument("directory", type=Path, help="where model.onnx and model.json are written")
    parser.add_argument("--name", default="percepnet", help="name of the model (default: percepnet)")
    parser.add_argument("--version", required=True, help="version of the model, for example 1.0.0")
    parser.add_argument(
        "--license", default="Apache-2.0", help="licence of the weights (default: Apache-2.0)"
    )
    parser.add_argument("--float", action="store_true", help="keep float32 weights, to compare with int8")


def run(arguments: argparse.Namespace) -> int:
    """Export a run's averaged weights; returns the exit code."""
    from percepnet.training.train import CHECKPOINT, Checkpoint

    path = arguments.run / CHECKPOINT if arguments.run.is_dir() else arguments.run
    checkpoint = Checkpoint.load(path)
    written = export(
        {name: value.float().numpy() for name, value in checkpoint.average.items()},
        arguments.directory,
        name=arguments.name,
        version=arguments.version,
        feature_mean=checkpoint.feature_mean.numpy(),
        feature_scale=checkpoint.feature_scale.numpy(),
        license=arguments.license,
        training={"steps": checkpoint.step, "config": json.loads(checkpoint.config)},
        quantized=not arguments.float,
    )
    print(f"{written}: {written.stat().st_size / 1e6:.2f} MB, {checkpoint.step} steps")
    return 0
