"""The network as an onnxruntime session: named state in, named state out."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from percepnet.constants import HOP, LOOKAHEAD_FRAMES, N_BANDS, N_FEATURES, SAMPLE_RATE
from percepnet.errors import PercepNetError

FORMAT = "percepnet-1"
"""Name of this layout of model.onnx and model.json; a model of another layout is refused."""

MODEL_FILE = "model.onnx"
MANIFEST_FILE = "model.json"

ASSETS = Path(__file__).parent / "assets"

ACTIVATION_ZERO = 128
"""The uint8 that stands for an activation of zero."""

OVERFLOW_CHECK = "overflow_check"
"""Output of a quantized model: 255·127 + 255·127, or less where the CPU sums such products in 16 bits."""
EXACT_SUM = 2 * 255 * 127

INT8 = "uint8 activations × int8 weights"
FP32 = "none"
"""What a manifest says of its model's quantization."""

STATES = (
    "conv1_state",
    "conv2_state",
    "gru1_state",
    "gru2_state",
    "gru3_state",
    "gru_gain_state",
    "gru_strength_state",
)
"""The network's memory: the last inputs of the convolutions, the last outputs of the GRUs."""

_INPUTS = {"features", *STATES}
_OUTPUTS = {"gains", "strengths", *(f"next_{name}" for name in STATES)}
_FIXED_SIZES = {
    "sample_rate": SAMPLE_RATE,
    "hop": HOP,
    "n_bands": N_BANDS,
    "n_features": N_FEATURES,
    "lookahead_frames": LOOKAHEAD_FRAMES,
}

State = dict[str, np.ndarray]


class ModelError(PercepNetError):
    """A model file that is missing, damaged, foreign or made for other sizes."""


@dataclass(frozen=True)
class Manifest:
    """What is known about a model; model.json beside model.onnx."""

    format: str
    name: str
    version: str
    sha256: str
    license: str
    sample_rate: int
    hop: int
    n_bands: int
    n_features: int
    lookahead_frames: int
    n_weights: int
    quantization: str
    feature_mean: np.ndarray = field(repr=False)
    """float32 (70,): subtracted from the features first."""
    feature_scale: np.ndarray = field(repr=False)
    """float32 (70,): multiplied with the difference."""
    training: dict[str, Any] = field(repr=False)

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Read and check a model.json; raises ModelError."""
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot read the model's manifest {path}: {error}") from error
        if not isinstance(fields, dict) or fields.get("format") != FORMAT:
            found = fields.get("format") if isinstance(fields, dict) else type(fields).__name__
            raise ModelError(f"{path} is no {FORMAT} manifest (its format is {found!r})")
        if fields.keys() != cls.__dataclass_fields__.keys():
            wrong = sorted(fields.keys() ^ cls.__dataclass_fields__.keys())
            raise ModelError(f"{path} misses fields or has unknown ones: {', '.join(wrong)}")
        for name, expected in _FIXED_SIZES.items():
            if fields[name] != expected:
                raise ModelError(f"{path} is for {name} = {fields[name]}, this version needs {expected}")
        for name in ("feature_mean", "feature_scale"):
            fields[name] = _feature_vector(fields[name], f"{path}: {name}")
        return cls(**fields)


def _feature_vector(values: object, what: str) -> np.ndarray:
    """A read-only float32 (70,)."""
    try:
        vector = np.array(values, np.float32)
    except (TypeError, ValueError):
        vector = np.empty(0, np.float32)
    if vector.shape != (N_FEATURES,) or not np.isfinite(vector).all():
        raise ModelError(f"{what} must be {N_FEATURES} finite numbers")
    vector.setflags(write=False)
    return vector


class Model:
    """A loaded network: immutable, shared by all streams and threads."""

    manifest: Manifest
    precision: str
    """How the matrices are multiplied on this CPU."""

    def __init__(self, manifest: Manifest, session: onnxruntime.InferenceSession, precision: str) -> None:
        self.manifest = manifest
        self.precision = precision
        self._session = session
        self._outputs = ["gains", "strengths", *(f"next_{name}" for name in STATES)]
        self._initial = {node.name: _first_row(node) for node in session.get_inputs() if node.name in STATES}

    @classmethod
    def load(cls, path: Path | None = None) -> "Model":
        """Load a model and verify it against its manifest.

        path: a model.onnx with its model.json beside it, or their folder; None for the bundled model.
        Raises ModelError with what was found and what was expected.
        """
        path = ASSETS if path is None else Path(path)
        if not path.exists():
            raise ModelError(
                f"there is no model {path}; accepted are a {MODEL_FILE} with its {MANIFEST_FILE} beside it, "
                "and their folder"
            )
        path = path / MODEL_FILE if path.is_dir() else path
        manifest = Manifest.read(path.with_name(MANIFEST_FILE))
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ModelError(f"cannot read the model {path}: {error}") from error
        digest = hashlib.sha256(data).hexdigest()
        if digest != manifest.sha256:
            raise ModelError(
                f"{path} is damaged: its sha256 is {digest}, the manifest says {manifest.sha256}"
            )
        session = _session(data)
        _check_signature(session, path)
        if manifest.quantization == FP32:
            return cls(manifest, session, "fp32")
        if _sums_are_exact(session):
            return cls(manifest, session, "int8")
        # x86 before VNNI adds pairs of uint8 × int8 products in 16 bits, where they saturate. onnxruntime can
        # rewrite the weights to uint8, whose kernels are exact: the same samples, about 2.5 times the CPU.
        return cls(manifest, _session(data, uint8_weights=True), "int8 by uint8 kernels (no VNNI)")

    def initial_state(self, n_streams: int) -> State:
        """The memory of streams that have heard nothing: named arrays (streams, …), float32 or uint8."""
        return {name: np.repeat(row, n_streams, axis=0) for name, row in self._initial.items()}

    def step(self, features: np.ndarray, state: State) -> tuple[np.ndarray, np.ndarray, State]:
        """Advance every stream by the same number of frames.

        features: (streams, frames, 70) float32, normalized. state: what `initial_state` or an earlier step
        returned; it stays as it was. Returns gains and strengths, (streams, frames, 34) float32 in [0, 1],
        and the new state. A stream's values depend neither on the other streams nor on how its frames are
        divided into calls, bit for bit. Memory grows with streams · frames, by 20 kB each.
        """
        gains, strengths, *states = self._session.run(self._outputs, {"features": features, **state})
        return gains, strengths, dict(zip(STATES, states, strict=True))


def _session(data: bytes, *, uint8_weights: bool = False) -> onnxruntime.InferenceSession:
    """A session on one thread that never spins: processes, not threads, use the cores."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.add_session_config_entry("session.x64quantprecision", str(int(uint8_weights)))
    try:
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common base class
        raise ModelError(f"onnxruntime {onnxruntime.__version__} refuses the model: {error}") from error


def _check_signature(session: onnxruntime.InferenceSession, path: Path) -> None:
    """The graph must have this version's inputs and outputs, found by name."""
    inputs = {node.name for node in session.get_inputs()}
    outputs = {node.name for node in session.get_outputs()} - {OVERFLOW_CHECK}
    for kind, found, expected in (("inputs", inputs, _INPUTS), ("outputs", outputs, _OUTPUTS)):
        if found != expected:
            raise ModelError(f"{path} has the {kind} {sorted(found)}, expected {sorted(expected)}")


def _sums_are_exact(session: onnxruntime.InferenceSession) -> bool:
    """Whether products of large uint8 and int8 add up without saturating."""
    feeds = {node.name: _first_row(node) for node in session.get_inputs()}
    (total,) = session.run([OVERFLOW_CHECK], feeds)
    return int(total.item()) == EXACT_SUM


def _first_row(node: onnxruntime.NodeArg) -> np.ndarray:
    """Zeros for an input of one stream; a uint8 input holds activations."""
    shape = [size if isinstance(size, int) else 1 for size in node.shape]
    if node.type == "tensor(uint8)":
        return np.full(shape, ACTIVATION_ZERO, np.uint8)
    return np.zeros(shape, np.float32)
