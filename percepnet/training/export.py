"""Turns trained weights into the step graph that serves: model.onnx and its manifest model.json.

Every matrix becomes int8 with one scale per output channel and multiplies uint8 activations of static scale,
the one combination with fast x86 kernels. Gates stay float32: onnxruntime has no quantized GRU, so each cell
is written out as integer matrix products and element-wise operators.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from percepnet.constants import HOP, LOOKAHEAD_FRAMES, N_BANDS, N_FEATURES, SAMPLE_RATE
from percepnet.model import ACTIVATION_ZERO, FORMAT, MANIFEST_FILE, MODEL_FILE

Weights = Mapping[str, np.ndarray]

OPSET = 17

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


class _Constants:
    """The main graph's named constants; branches and loop bodies refer to them by name."""

    def __init__(self) -> None:
        self.tensors: dict[str, TensorProto] = {}

    def add(self, name: str, value: np.ndarray) -> str:
        if name not in self.tensors:
            self.tensors[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def floats(self, name: str, value: np.ndarray | float) -> str:
        return self.add(name, np.asarray(value, np.float32))

    def ints(self, *values: int) -> str:
        return self.add("ints_" + "_".join(map(str, values)), np.array(values, np.int64))


class _Graph:
    """Nodes of one graph, branch or loop body, added one operator at a time."""

    def __init__(self, name: str, weights: Weights, constants: _Constants, quantized: bool) -> None:
        self.name, self.weights, self.constants, self.quantized = name, weights, constants, quantized
        self.nodes: list[onnx.NodeProto] = []

    def op(
        self, kind: str, *inputs: str, output: str | None = None, domain: str = "", **attributes: object
    ) -> str:
        """Append an operator; returns the name of its (only) output."""
        return self.ops(
            kind,
            *inputs,
            outputs=[output or f"{self.name}/{kind}_{len(self.nodes)}"],
            domain=domain,
            **attributes,
        )[0]

    def ops(
        self, kind: str, *inputs: str, outputs: Sequence[str], domain: str = "", **attributes: object
    ) -> Sequence[str]:
        self.nodes.append(helper.make_node(kind, inputs, outputs, domain=domain, **attributes))
        return outputs

    def split(self, x: str, sizes: Sequence[int]) -> Sequence[str]:
        """Cut the last axis into consecutive pieces."""
        outputs = [f"{self.name}/Split_{len(self.nodes)}_{i}" for i in range(len(sizes))]
        return self.ops("Split", x, self.constants.ints(*sizes), outputs=outputs, axis=-1)

    def activation(self, x: str, output: str | None = None) -> str:
        """Values in [-1, 1] as matrix products take them."""
        if not self.quantized:
            return x if output is None else self.op("Identity", x, output=output)
        return self.quantize(x, ACTIVATION_SCALE, output)

    def quantize(self, x: str, scale: float, output: str | None = None) -> str:
        return self.op("QuantizeLinear", x, *self.quantization(scale), output=output)

    def quantization(self, scale: float) -> tuple[str, str]:
        zero = self.constants.add("activation_zero", np.array(ACTIVATION_ZERO, np.uint8))
        return self.constants.floats(f"scale_{scale:.9g}", scale), zero

    def dense(
        self, x: str, name: str, matrix: np.ndarray, bias: np.ndarray | None, scale: float = ACTIVATION_SCALE
    ) -> str:
        """x (…, inputs) times matrix (inputs, outputs) plus bias, in float32."""
        constants = self.constants
        offset = [] if bias is None else [constants.floats(f"{name}.bias", bias)]
        if not self.quantized:
            product = self.op("MatMul", x, constants.floats(f"{name}.weight", matrix))
            return self.op("Add", product, *offset) if offset else product
        integers, scales = quantize_matrix(matrix)
        x_scale, x_zero = self.quantization(scale)
        return self.op(
            "MatMulIntegerToFloat", x, constants.add(f"{name}.weight", integers),
            x_scale, constants.floats(f"{name}.scale", scales), x_zero, "", *offset, domain="com.microsoft",
        )  # fmt: skip

    def fc_in(self, features: str) -> str:
        """tanh of the input layer, from float features at 16-bit precision."""
        matrix, bias = self.weights["fc_in.weight"].T, self.weights["fc_in.bias"]
        if not self.quantized:
            return self.op("Tanh", self.dense(features, "fc_in", matrix, bias))
        step = INPUT_RANGE / 127
        coarse = self.quantize(features, step)
        error = self.op("Sub", features, self.op("DequantizeLinear", coarse, *self.quantization(step)))
        fine = self.quantize(error, step / FINE_STEPS)
        product = self.op(
            "Add",
            self.dense(coarse, "fc_in", matrix, bias, step),
            self.dense(fine, "fc_in", matrix, None, step / FINE_STEPS),
        )
        return self.op("Tanh", product)

    def convolve(self, x: str, name: str) -> str:
        """tanh of a causal convolution over frames of x (streams, frames, channels); updates its history."""
        constants = self.constants
        kernel = self.weights[f"{name}.weight"]  # (outputs, channels, taps)
        taps = kernel.shape[2]
        matrix = kernel.transpose(2, 1, 0).reshape(-1, len(kernel))
        frames = self.op("Concat", f"{name}_state", x, axis=1)
        self.op(
            "Slice",
            frames,
            constants.ints(1 - taps),
            constants.ints(2**31),
            constants.ints(1),
            output=f"{self.name}/{name}_next",
        )
        shifted = [
            self.op(
                "Slice",
                frames,
                constants.ints(tap),
                constants.ints(tap - taps + 1 or 2**31),
                constants.ints(1),
            )
            for tap in range(taps)
        ]
        window = self.op("Concat", *shifted, axis=2)
        return self.op("Tanh", self.dense(window, name, matrix, self.weights[f"{name}.bias"]))

    def input_gates(self, x: str, name: str) -> str:
        """What the input adds to a GRU's gates, (…, 3 · hidden) in the order r, z, n."""
        bias = self.weights[f"{name}.bias_ih"].copy()
        summed = len(bias) // 3 * 2
        bias[:summed] += self.weights[f"{name}.bias_hh"][:summed]
        return self.dense(x, f"{name}.ih", self.weights[f"{name}.weight_ih"].T, bias)

    def cell(self, gates: str, hidden: str, name: str, output: str) -> str:
        """One frame of a GRU: h' = n + z·(h - n), n = tanh(W x + r·(U h + b))."""
        bias = self.weights[f"{name}.bias_hh"].copy()
        size = len(bias) // 3
        bias[: 2 * size] = 0
        recurrent = self.dense(
            self.activation(hidden), f"{name}.hh", self.weights[f"{name}.weight_hh"].T, bias
        )
        x_rz, x_n = self.split(gates, [2 * size, size])
        h_rz, h_n = self.split(recurrent, [2 * size, size])
        reset, update = self.split(self.op("Sigmoid", self.op("Add", x_rz, h_rz)), [size, size])
        candidate = self.op("Tanh", self.op("Add", x_n, self.op("Mul", reset, h_n)))
        change = self.op("Mul", update, self.op("Sub", hidden, candidate))
        return self.op("Add", candidate, change, output=output)

    def recur(self, x: str, name: str) -> str:
        """A GRU over all frames of x (frames, streams, inputs); returns its states, as activations."""
        gates = self.input_gates(x, name)
        body = _Graph(f"{self.name}/{name}", self.weights, self.constants, self.quantized)
        inputs = [f"{body.name}/hidden", f"{body.name}/gates"]
        outputs = [f"{body.name}/next", f"{body.name}/frame"]
        body.cell(inputs[1], inputs[0], name, outputs[0])
        body.op("Identity", outputs[0], output=outputs[1])
        scan = body.proto(inputs, outputs)
        _, states = self.ops(
            "Scan", f"{name}_state", gates,
            outputs=[f"{self.name}/{name}_next", f"{self.name}/{name}_states"], body=scan, num_scan_inputs=1,
        )  # fmt: skip
        return self.activation(states)

    def proto(self, inputs: Sequence[str], outputs: Sequence[str]) -> onnx.GraphProto:
        def infos(names: Sequence[str]) -> list[onnx.ValueInfoProto]:
            return [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]

        return helper.make_graph(self.nodes, self.name, infos(inputs), infos(outputs))


def build(weights: Weights, *, quantized: bool = True) -> onnx.ModelProto:
    """The step graph of a network: features and state in, gains, strengths and the next state out.

    weights: PercepNet parameters by their PyTorch names; quantized: int8 matrices, or float32 for comparison.
    """
    weights = {name: np.asarray(value, np.float32) for name, value in weights.items()}
    constants = _Constants()
    graph = _Graph("block", weights, constants, quantized)
    x = graph.activation(graph.fc_in("features"))
    for name in CONVOLUTIONS:
        x = graph.activation(graph.convolve(x, name))
    x = graph.op("Transpose", x, perm=[1, 0, 2])
    for name in STACKED_GRUS:
        x = graph.recur(x, name)
    for output, (gru, dense) in HEADS.items():
        logits = graph.dense(
            graph.recur(x, gru), dense, weights[f"{dense}.weight"].T, weights[f"{dense}.bias"]
        )
        graph.op("Transpose", graph.op("Sigmoid", logits), perm=[1, 0, 2], output=output)

    states = state_shapes(weights)
    history = TensorProto.UINT8 if quantized else TensorProto.FLOAT
    kinds = {name: history if len(shape) == 2 else TensorProto.FLOAT for name, shape in states.items()}
    for name in states:
        graph.op("Identity", f"block/{name.removesuffix('_state')}_next", output=f"next_{name}")
    inputs = [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["streams", "frames", N_FEATURES])]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["streams", "frames", N_BANDS])
        for name in HEADS
    ]
    for name, shape in states.items():
        inputs.append(helper.make_tensor_value_info(name, kinds[name], ["streams", *shape]))
        outputs.append(helper.make_tensor_value_info(f"next_{name}", kinds[name], ["streams", *shape]))
    proto = helper.make_graph(
        graph.nodes, "percepnet", inputs, outputs, initializer=list(constants.tensors.values())
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(proto, opset_imports=opsets, ir_version=8, producer_name="percepnet")


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
        "quantization": "uint8 activations × int8 weights" if quantized else "none",
        "feature_mean": [round(float(value), 6) for value in feature_mean],
        "feature_scale": [round(float(value), 6) for value in feature_scale],
        "training": dict(training or {}),
    }
    (directory / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return directory / MODEL_FILE
