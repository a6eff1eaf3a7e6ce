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
            vector = np.asarray(fields[name], np.float32)
            if vector.shape != (N_FEATURES,) or not np.isfinite(vector).all():
                raise ModelError(f"{path}: {name} must be {N_FEATURES} finite numbers")
            vector.setflags(write=False)
            fields[name] = vector
        return cls(**fields)


class Model:
    """A loaded network: immutable, shared by all streams."""

    def __init__(self, manifest: Manifest, session: onnxruntime.InferenceSession, precision: str) -> None:
        self.manifest = manifest
        self.precision = precision
        self._session = session
        self._states = {node.name: node for node in session.get_inputs() if node.name != "features"}
        self._outputs = ["gains", "strengths", *(f"next_{name}" for name in self._states)]

    @classmethod
    def load(cls, path: Path | None = None) -> "Model":
        """Load a model and verify it against its manifest.

        path: a model.onnx with its model.json beside it, or their folder; None for the bundled model.
        Raises ModelError with what was found and what was expected.
        """
        path = ASSETS if path is None else Path(path)
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
        return cls(manifest, session, "int8" if manifest.quantization != "none" else "fp32")

    def initial_state(self, n_streams: int) -> State:
        """The memory of streams that have heard nothing: named arrays (streams, …)."""
        return {
            name: np.full((n_streams, *node.shape[1:]), ACTIVATION_ZERO, np.uint8)
            if node.type == "tensor(uint8)"
            else np.zeros((n_streams, *node.shape[1:]), np.float32)
            for name, node in self._states.items()
        }

    def step(self, features: np.ndarray, state: State) -> tuple[np.ndarray, np.ndarray, State]:
        """Advance every stream by the same number of frames.

        features: (streams, frames, 70) float32, normalized. state: what `initial_state` or an earlier step
        returned; it stays as it was. Returns gains and strengths, (streams, frames, 34) float32 in [0, 1],
        and the new state. A stream's values depend neither on the other streams nor on the number of frames.
        """
        gains, strengths, *states = self._session.run(self._outputs, {"features": features, **state})
        return gains, strengths, dict(zip(self._states, states, strict=True))


def _session(data: bytes) -> onnxruntime.InferenceSession:
    """A session on one thread that never spins: processes, not threads, use the cores."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ModelError(f"onnxruntime refuses the model: {error}") from error
