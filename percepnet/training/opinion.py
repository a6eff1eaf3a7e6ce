"""What listeners would say: the DNSMOS predictors as differentiable parts of the loss.

Reddy, Gopal, Cutler: "DNSMOS" (2021), which predicts ratings after ITU-T P.808, and "DNSMOS P.835" (2022).
Their weights are `model_v8.onnx` and `sig_bak_ovr.onnx` in the repository github.com/microsoft/DNS-Challenge.
"""

from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from percepnet.errors import ParameterError
from percepnet.training.network import native_bfloat16
from percepnet.training.wideband import HOP, RATE, WINDOW, Wideband

P835_FILE = "sig_bak_ovr.onnx"
P808_FILE = "model_v8.onnx"

_LEVEL = 17.6
"""Takes a shard's spectra, whose target has a root-mean-square bin of 0.1, to speech of -26 dBFS."""

_LEVELS_DB = (-6.0, 6.0)
"""Around it, the levels at which the examples of a batch are judged."""

_MEL_WINDOW = 321
_MELS = 120


class Predictor(nn.Module, ABC):
    """A picture of the sound, convolutions, the largest value of each channel, dense layers."""

    file: str

    def __init__(self, path: Path) -> None:
        super().__init__()
        try:
            self._load(onnx.load(path, format="protobuf").graph)
        except (OSError, ValueError, RuntimeError, DecodeError) as error:
            raise ParameterError(f"{path} is not DNSMOS's {self.file}: {error}") from error
        self.requires_grad_(False)
        self._wideband = Wideband()

    def _load(self, graph: onnx.GraphProto) -> None:
        weights = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
        layers = [
            (node.op_type, [weights[name] for name in node.input if name in weights]) for node in graph.node
        ]
        self._picture([constants[0] for kind, constants in layers if kind == "Conv" and len(constants) == 1])
        convolutions: list[nn.Module] = []
        for kind, constants in layers:
            if kind == "MaxPool":
                convolutions.append(nn.MaxPool2d(2))
            elif kind == "Conv" and len(constants) == 2:
                weight, bias = constants
                layer = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
                layer.load_state_dict({"weight": weight, "bias": bias})
                convolutions += [layer, nn.ReLU()]
        self._convolutions = nn.Sequential(*convolutions)
        self._dense = nn.ModuleList()
        matrices, biases = ([c for kind, c in layers if kind == of and c] for of in ("MatMul", "Add"))
        for (matrix,), (bias,) in zip(matrices, biases, strict=True):
            dense = nn.Linear(*matrix.shape)
            dense.load_state_dict({"weight": matrix.T, "bias": bias})
            self._dense.append(dense)

    @abstractmethod
    def _picture(self, kernels: list[Tensor]) -> None:
        """Prepare `_seen`. kernels: of the convolutions without a bias. Raises ValueError for wrong ones."""

    @abstractmethod
    def _seen(self, samples: Tensor) -> Tensor:
        """The picture, (batch, frames, bins), of samples (batch, n) at 16 kHz."""

    def forward(self, spectra: Tensor) -> Tensor:
        """Scores, (batch, scores), of spectra (batch, frames, 181, 2)."""
        levels_db = torch.linspace(*_LEVELS_DB, len(spectra), device=spectra.device)
        return self.judge(self._wideband(spectra) * (_LEVEL * 10 ** (levels_db[:, None] / 20)))

    def judge(self, samples: Tensor) -> Tensor:
        """Scores, (batch, scores), of samples (batch, n) at 16 kHz: about 1 (bad) to 5 (excellent)."""
        x = self._seen(samples)[:, None]
        with torch.autocast(x.device.type, torch.bfloat16, enabled=native_bfloat16(x.device.type)):
            x = self._convolutions(x)
        x = x.amax((2, 3)).float()
        for dense in self._dense[:-1]:
            x = functional.relu(dense(x))
        scores: Tensor = self._dense[-1](x)
        return scores


class OpinionPredictor(Predictor):
    """The quality of signal, background and overall; path: `sig_bak_ovr.onnx`, ParameterError for another."""

    file = P835_FILE

    def _picture(self, kernels: list[Tensor]) -> None:
        real, imaginary = kernels
        self.register_buffer("_fourier", torch.stack([real[..., 0], imaginary[..., 0]]))

    def _seen(self, samples: Tensor) -> Tensor:
        frames = samples.unfold(-1, WINDOW, HOP)
        power = sum((frames @ kernel.T).square() for kernel in self._fourier)
        return power.clamp(min=1e-12).log10()


class ListeningPredictor(Predictor):
    """The quality in a listening test; path: `model_v8.onnx`, ParameterError for another."""

    file = P808_FILE

    def _picture(self, kernels: list[Tensor]) -> None:
        if kernels:
            raise ValueError("it has convolutions without a bias")
        self.register_buffer("_window", torch.hann_window(_MEL_WINDOW))
        self.register_buffer("_mels", mel_weights())

    def _seen(self, samples: Tensor) -> Tensor:
        padded = functional.pad(samples, (_MEL_WINDOW // 2, _MEL_WINDOW // 2))
        power = torch.fft.rfft(padded.unfold(-1, _MEL_WINDOW, HOP) * self._window).abs().square()
        level_db = 10 * (power @ self._mels).clamp(min=1e-10).log10()
        level_db = level_db - level_db.amax((1, 2), keepdim=True)
        return level_db.clamp(min=-80) / 40 + 1


def mel_weights() -> Tensor:
    """Slaney's mel filters up to 8 kHz, each of area one, (161, 120); as librosa makes them."""
    highest = 15 + 27 * np.log(RATE / 2 / 1000) / np.log(6.4)
    mel = np.linspace(0, highest, _MELS + 2)
    edges = np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))  # in Hz: even up to 1 kHz
    hz = np.fft.rfftfreq(_MEL_WINDOW, 1 / RATE)[:, None]
    low, center, high = edges[:-2], edges[1:-1], edges[2:]
    rise, fall = (hz - low) / (center - low), (high - hz) / (high - center)
    return torch.from_numpy(np.clip(np.minimum(rise, fall), 0, None) * 2 / (high - low)).float()
