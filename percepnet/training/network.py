"""The PercepNet network in PyTorch, for training and as the source of the exported step graph.

Inside, tensors are time-major, (frames, batch, channels): one frame of a whole batch is contiguous, and so is
any span of frames, which makes a causal convolution a sum of plain matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from percepnet.constants import N_BANDS, N_FEATURES

State = dict[str, Tensor]

INITIAL_GAIN_BIAS = 0.8
"""sigmoid(0.8) ≈ 0.69: an untrained network attenuates a little instead of halving everything."""

INITIAL_STRENGTH_BIAS = -1.0
"""sigmoid(-1) ≈ 0.27: an untrained network filters the pitch only lightly."""


@dataclass(frozen=True)
class NetworkConfig:
    """Widths of the layers; the default has 7.8 million weights ([P] section 4)."""

    fc: int = 128
    conv: int = 512
    gru: int = 512
    strength_gru: int = 128


class GRU(nn.Module):
    """One recurrent layer on time-major input, as torch.nn.GRU computes it (gates in the order r, z, n)."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.weight_ih = nn.Parameter(torch.empty(3 * hidden, inputs))
        self.weight_hh = nn.Parameter(torch.empty(3 * hidden, hidden))
        self.bias_ih = nn.Parameter(torch.zeros(3 * hidden))
        self.bias_hh = nn.Parameter(torch.zeros(3 * hidden))
        for gate in range(3):
            rows = slice(gate * hidden, (gate + 1) * hidden)
            nn.init.xavier_uniform_(self.weight_ih.data[rows])
            nn.init.orthogonal_(self.weight_hh.data[rows])

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        """Maps x (frames, batch, inputs) and state (batch, hidden) to all states (frames, batch, hidden)."""
        weights = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        return torch.gru(x, state[None].to(x.dtype), weights, True, 1, 0.0, self.training, False, False)[0]


class CausalConv(nn.Conv1d):
    """A convolution over the current and the preceding frames of time-major input."""

    def __init__(self, inputs: int, outputs: int, taps: int) -> None:
        super().__init__(inputs, outputs, taps)

    def forward(self, x: Tensor) -> Tensor:
        """Maps x (taps - 1 + frames, batch, inputs) to (frames, batch, outputs)."""
        return super().forward(x.permute(1, 2, 0)).permute(2, 0, 1)


class PercepNet(nn.Module):
    """Band gains and pitch-filter strengths from features, causally ([P] section 4)."""

    def __init__(self, config: NetworkConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or NetworkConfig()
        self.fc_in = nn.Linear(N_FEATURES, config.fc)
        self.conv1 = CausalConv(config.fc, config.conv, 5)
        self.conv2 = CausalConv(config.conv, config.conv, 3)
        self.gru1 = GRU(config.conv, config.gru)
        self.gru2 = GRU(config.gru, config.gru)
        self.gru3 = GRU(config.gru, config.gru)
        self.gru_gain = GRU(config.gru, config.gru)
        self.gain_out = nn.Linear(config.gru, N_BANDS)
        self.gru_strength = GRU(config.gru, config.strength_gru)
        self.strength_out = nn.Linear(config.strength_gru, N_BANDS)
        nn.init.constant_(self.gain_out.bias, INITIAL_GAIN_BIAS)
        nn.init.constant_(self.strength_out.bias, INITIAL_STRENGTH_BIAS)

    def initial_state(self, batch: int) -> State:
        """The state before the first frame: zeros, each tensor (batch, …) float32."""
        shapes = {
            "conv1_state": (self.conv1.kernel_size[0] - 1, self.config.fc),
            "conv2_state": (self.conv2.kernel_size[0] - 1, self.config.conv),
            "gru1_state": (self.config.gru,),
            "gru2_state": (self.config.gru,),
            "gru3_state": (self.config.gru,),
            "gru_gain_state": (self.config.gru,),
            "gru_strength_state": (self.config.strength_gru,),
        }
        device = self.fc_in.weight.device
        return {name: torch.zeros(batch, *shape, device=device) for name, shape in shapes.items()}

    def forward(self, features: Tensor, state: State | None = None) -> tuple[Tensor, Tensor, State]:
        """Band gains, pitch-filter strengths and the state after the last frame.

        Parameters: features (batch, frames, 70), normalized; state, what an earlier call returned (None at
        a stream's start). Returns gains and strengths, (batch, frames, 34) float32 in [0, 1], and the new
        state, named tensors (batch, …) float32. No gradient flows through the state.
        """
        state = self.initial_state(len(features)) if state is None else state
        new_state: State = {}

        def convolve(name: str, x: Tensor) -> Tensor:
            layer: CausalConv = getattr(self, name)
            history = torch.cat([state[f"{name}_state"].transpose(0, 1).to(x.dtype), x])
            new_state[f"{name}_state"] = history[len(x) :].detach().transpose(0, 1).float()
            return torch.tanh(layer(history))

        def recur(name: str, x: Tensor) -> Tensor:
            layer: GRU = getattr(self, name)
            hidden = layer(x, state[f"{name}_state"])
            new_state[f"{name}_state"] = hidden[-1].detach().float()
            return hidden

        x = torch.tanh(self.fc_in(features.transpose(0, 1)))
        x = convolve("conv1", x)
        x = convolve("conv2", x)
        x = recur("gru1", x)
        x = recur("gru2", x)
        x = recur("gru3", x)
        gains = torch.sigmoid(self.gain_out(recur("gru_gain", x)))
        strengths = torch.sigmoid(self.strength_out(recur("gru_strength", x)))
        return gains.transpose(0, 1).float(), strengths.transpose(0, 1).float(), new_state
