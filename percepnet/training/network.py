"""The PercepNet network in PyTorch, for training and as the source of the exported step graph.

Inside, tensors are time-major, (frames, batch, channels): one frame of a whole batch is contiguous, and so is
any span of frames, which makes a causal convolution a sum of plain matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from percepnet.constants import N_BANDS, N_FEATURES

State = dict[str, Tensor]

INITIAL_GAIN_BIAS = 0.8
"""sigmoid(0.8) ≈ 0.69: an untrained network attenuates a little instead of halving everything."""

INITIAL_STRENGTH_BIAS = -1.0
"""sigmoid(-1) ≈ 0.27: an untrained network filters the pitch only lightly."""

DERIVATIVE_FRAMES = 8
"""Frames of local derivatives computed at once: few enough to stay in the cache."""


@dataclass(frozen=True)
class NetworkConfig:
    """Widths of the layers; the default has 7.7 million weights ([P] section 4)."""

    fc: int = 128
    conv: int = 512
    gru: int = 512
    strength_gru: int = 128


class GRU(nn.Module):
    """One recurrent layer on time-major input, as torch.nn.GRU computes it (gates in the order r, z, n)."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
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
        if self.training and x.device.type == "cpu":
            return TrainableRecurrence.apply(x, state, *weights)
        return torch.gru(x, state[None].to(x.dtype), weights, True, 1, 0.0, self.training, False, False)[0]


class TrainableRecurrence(torch.autograd.Function):
    """torch.gru for training on a CPU, in the input's precision and several times faster.

    The two loops over time hold only what is sequential; input products, weight gradients and the local
    derivatives are computed for many frames at once. Each frame's gates lie side by side as

        s: the recurrent part of the candidate;  r: reset gate;  u = 1 - z: update;  n: candidate

    so that the recurrent product writes s, r, u and the input product r, u, n, each in one piece. The
    update u stands in for z (its weights change sign): bfloat16 resolves small updates, but not z near one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        state: Tensor,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor,
        bias_hh: Tensor,
    ) -> Tensor:
        frames, batch, inputs = x.shape
        hidden = weight_hh.shape[1]
        input_weight = _as_run(weight_ih).to(x.dtype)
        recurrent_weight = _as_sru(weight_hh).to(x.dtype)
        s_bias = bias_hh[2 * hidden :]
        run_bias = _as_run(torch.cat([bias_ih[: 2 * hidden] + bias_hh[: 2 * hidden], bias_ih[2 * hidden :]]))

        gates = x.new_empty(frames, batch, 4 * hidden)
        gates[..., :hidden] = s_bias
        run = gates.view(-1, 4 * hidden)[:, hidden:]
        torch.addmm(run_bias.to(x.dtype), x.reshape(-1, inputs), input_weight.t(), out=run)

        states = x.new_empty(frames + 1, batch, hidden)
        states[0] = state
        exact = state.to(torch.float32, copy=True)  # small updates would be lost in a bfloat16 state
        change = torch.empty_like(exact)
        transposed = recurrent_weight.t()
        views = zip(
            gates[..., : 3 * hidden].unbind(),
            gates[..., hidden : 3 * hidden].unbind(),
            *(gate.unbind() for gate in gates.split(hidden, 2)),
            states[:-1].unbind(),
            states[1:].unbind(),
            strict=True,
        )
        for sru, ru, s, r, u, n, before, after in views:
            sru.addmm_(before, transposed)
            ru.sigmoid_()
            n.addcmul_(r, s).tanh_()
            torch.sub(n, exact, out=change)
            exact.addcmul_(u, change)
            after.copy_(exact)
        ctx.save_for_backward(x, gates, states, input_weight, recurrent_weight)
        return states[1:]

    @staticmethod
    def backward(ctx: Any, grad_states: Tensor) -> tuple[Tensor | None, ...]:
        x, gates, states, input_weight, recurrent_weight = ctx.saved_tensors
        frames, batch, inputs = x.shape
        hidden = states.shape[2]
        grads = torch.empty_like(gates)
        exact = torch.zeros(batch, hidden, dtype=torch.float32)
        rounded = states.new_empty(batch, hidden)
        recurrent = states.new_zeros(batch, hidden)
        no_update = states.new_zeros(batch, hidden)
        for start in reversed(range(0, frames, DERIVATIVE_FRAMES)):
            span = slice(start, min(start + DERIVATIVE_FRAMES, frames))
            s, r, u, n = gates[span].split(hidden, 2)
            _local_derivatives(s, r, u, n, states[span], grads[span])
            views = zip(
                grads[span].unflatten(2, (4, hidden)).unbind(),
                grads[span][..., : 3 * hidden].unbind(),
                grad_states[span].unbind(),
                u.unbind(),
                strict=True,
            )
            for frame_grads, sru, grad_state, update in reversed(list(views)):
                exact.addcmul_(exact, no_update, value=-1).add_(recurrent).add_(grad_state)
                rounded.copy_(exact)
                frame_grads.mul_(rounded[:, None])
                torch.mm(sru, recurrent_weight, out=recurrent)
                no_update = update

        flat = grads.view(-1, 4 * hidden)
        sru_grads, run_grads = flat[:, : 3 * hidden], flat[:, hidden:]
        grad_x = torch.mm(run_grads, input_weight).view(x.shape) if ctx.needs_input_grad[0] else None
        grad_weight_ih = _from_run(torch.mm(run_grads.t(), x.reshape(-1, inputs)).float())
        grad_weight_hh = _from_sru(torch.mm(sru_grads.t(), states[:-1].view(-1, hidden)).float())
        grad_bias = torch.mm(flat.new_ones(1, len(flat)), flat)[0].float()
        grad_bias_ih = _from_run(grad_bias[hidden:])
        grad_bias_hh = _from_sru(grad_bias[: 3 * hidden])
        return grad_x, None, grad_weight_ih, grad_weight_hh, grad_bias_ih, grad_bias_hh


def _local_derivatives(s: Tensor, r: Tensor, u: Tensor, n: Tensor, before: Tensor, out: Tensor) -> None:
    """Writes d(state after a frame)/d(inputs of s, r, u, n), each (frames, batch, hidden), side by side."""
    d_s, d_r, d_u, d_n = out.chunk(4, 2)
    product = torch.empty_like(before)
    aten = torch.ops.aten
    aten.tanh_backward.grad_input(u, n, grad_input=d_n)
    torch.mul(d_n, r, out=d_s)
    torch.mul(d_n, s, out=product)
    aten.sigmoid_backward.grad_input(product, r, grad_input=d_r)
    torch.sub(n, before, out=product)
    aten.sigmoid_backward.grad_input(product, u, grad_input=d_u)


def _as_run(rows: Tensor) -> Tensor:
    """Rows r, z, n as r, u, n."""
    r, z, n = rows.chunk(3)
    return torch.cat([r, -z, n])


_from_run = _as_run


def _as_sru(rows: Tensor) -> Tensor:
    """Rows r, z, n as s, r, u."""
    r, z, n = rows.chunk(3)
    return torch.cat([n, r, -z])


def _from_sru(rows: Tensor) -> Tensor:
    """Rows s, r, u as r, z, n."""
    s, r, u = rows.chunk(3)
    return torch.cat([r, -u, s])


class CausalConv(nn.Conv1d):
    """A convolution over the current and the preceding frames of time-major input."""

    def __init__(self, inputs: int, outputs: int, taps: int) -> None:
        super().__init__(inputs, outputs, taps)

    def forward(self, x: Tensor) -> Tensor:
        """Maps x (taps - 1 + frames, batch, inputs) to (frames, batch, outputs)."""
        if self.training and x.device.type == "cpu":
            return TapProducts.apply(x, self.weight, self.bias)
        return super().forward(x.permute(1, 2, 0)).permute(2, 0, 1)


class TapProducts(torch.autograd.Function):
    """A causal convolution as one matrix product per tap, in the input's precision."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        outputs, inputs, taps = weight.shape
        frames = len(x) - taps + 1
        tap_weights = weight.permute(2, 0, 1).to(x.dtype, memory_format=torch.contiguous_format)
        y = bias.to(x.dtype).expand(frames * x.shape[1], outputs).contiguous()
        for tap, tap_weight in enumerate(tap_weights):
            y.addmm_(x[tap : tap + frames].view(-1, inputs), tap_weight.t())
        ctx.save_for_backward(x, tap_weights)
        return y.view(frames, -1, outputs)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, tap_weights = ctx.saved_tensors
        frames = len(grad_y)
        taps, outputs, inputs = tap_weights.shape
        grad_y = grad_y.reshape(-1, outputs)
        grad_x = torch.zeros_like(x)
        grad_weight = x.new_empty(taps, outputs, inputs)
        for tap, tap_weight in enumerate(tap_weights):
            span = slice(tap, tap + frames)
            grad_x[span].view(-1, inputs).addmm_(grad_y, tap_weight)
            torch.mm(grad_y.t(), x[span].view(-1, inputs), out=grad_weight[tap])
        grad_bias = torch.mm(grad_y.new_ones(1, len(grad_y)), grad_y)[0]
        return grad_x, grad_weight.permute(1, 2, 0).float(), grad_bias.float()


def native_bfloat16(device: str) -> bool:
    """Whether a device multiplies bfloat16 numbers itself: a GPU, or a CPU with instructions for it."""
    capabilities = torch.cpu.get_capabilities()
    return device != "cpu" or any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))


class PercepNet(nn.Module):
    """Band gains and pitch-filter strengths from features, causally ([P] section 4).

    fast: while training, matrix products take bfloat16 inputs; weights, outputs and the states' sums stay
    float32. In evaluation mode everything is float32. On a CPU matrix products take half the time where
    bfloat16 is native, three times as long elsewhere; without a choice it is taken where it is native.
    """

    def __init__(self, config: NetworkConfig | None = None, *, fast: bool | None = None) -> None:
        super().__init__()
        self.fast = fast
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

        device = features.device.type
        bfloat16 = self.training and (native_bfloat16(device) if self.fast is None else self.fast)
        x = torch.tanh(self.fc_in(features.transpose(0, 1)))
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16 and device != "cpu"):
            x = x.bfloat16() if bfloat16 else x
            x = convolve("conv1", x)
            x = convolve("conv2", x)
            x = recur("gru1", x)
            x = recur("gru2", x)
            x = recur("gru3", x)
            for_gains = recur("gru_gain", x)
            for_strengths = recur("gru_strength", x)
        gains = torch.sigmoid(self.gain_out(for_gains.float()))
        strengths = torch.sigmoid(self.strength_out(for_strengths.float()))
        return gains.transpose(0, 1), strengths.transpose(0, 1), new_state
