"""What listeners would say: the DNSMOS P.835 predictor as a differentiable part of the loss.

Reddy, Gopal, Cutler: "DNSMOS P.835" (2022). Its weights are `sig_bak_ovr.onnx` in the repository
github.com/microsoft/DNS-Challenge.
"""

from collections.abc import Iterator
from pathlib import Path

import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from percepnet.errors import ParameterError
from percepnet.training.network import native_bfloat16
from percepnet.training.wideband import HOP, WINDOW, Wideband

_LEVEL = 17.6
"""Takes a shard's spectra, whose target has a root-mean-square bin of 0.1, to speech of -26 dBFS."""

_LEVELS_DB = (-6.0, 6.0)
"""Around it, the levels at which the examples of a batch are judged."""


class OpinionPredictor(nn.Module):
    """Scores on the scale of the predictor's own outputs, about 1 (bad) to 5 (excellent)."""

    def __init__(self, path: Path) -> None:
        """path: `sig_bak_ovr.onnx`. Raises ParameterError for another file."""
        super().__init__()
        try:
            self._load(onnx.load(path, format="protobuf").graph)
        except (OSError, ValueError, RuntimeError, DecodeError) as error:
            raise ParameterError(f"{path} is not DNSMOS's sig_bak_ovr.onnx: {error}") from error
        self.requires_grad_(False)
        self._wideband = Wideband()

    def _load(self, graph: onnx.GraphProto) -> None:
        weights = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}

        def layers(kind: str) -> Iterator[list[Tensor]]:
            for node in graph.node:
                constants = [weights[name] for name in node.input if name in weights]
                if node.op_type == kind and constants:
                    yield constants

        (real,), (imaginary,), *convolutions = layers("Conv")
        self.register_buffer("_fourier", torch.stack([real[..., 0], imaginary[..., 0]]))
        self._convolutions = nn.ModuleList()
        for weight, bias in convolutions:
            layer = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
            layer.load_state_dict({"weight": weight, "bias": bias})
            self._convolutions.append(layer)
        self._dense = nn.ModuleList()
        for (matrix,), (bias,) in zip(layers("MatMul"), layers("Add"), strict=True):
            dense = nn.Linear(*matrix.shape)
            dense.load_state_dict({"weight": matrix.T, "bias": bias})
            self._dense.append(dense)

    def forward(self, spectra: Tensor) -> Tensor:
        """Quality of signal, background and overall, (batch, 3), of spectra (batch, frames, 181, 2)."""
        levels_db = torch.linspace(*_LEVELS_DB, len(spectra), device=spectra.device)
        return self.judge(self._wideband(spectra) * (_LEVEL * 10 ** (levels_db[:, None] / 20)))

    def judge(self, samples: Tensor) -> Tensor:
        """Quality of signal, background and overall, (batch, 3), of samples (batch, n) at 16 kHz."""
        frames = samples.unfold(-1, WINDOW, HOP)
        power = sum((frames @ kernel.T).square() for kernel in self._fourier)
        x = power.clamp(min=1e-12).log10()[:, None]
        with torch.autocast(x.device.type, torch.bfloat16, enabled=native_bfloat16(x.device.type)):
            for layer, convolution in enumerate(self._convolutions):
                x = functional.relu(convolution(x))
                if layer in (3, 4, 5):
                    x = functional.max_pool2d(x, 2)
        x = x.amax((2, 3)).float()
        for dense in self._dense[:-1]:
            x = functional.relu(dense(x))
        return self._dense[-1](x)
