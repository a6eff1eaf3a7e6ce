"""From spectra as the loss sees them to samples at 16 kHz, for the models of hearing that judge such."""

import torch
from torch import Tensor, nn

RATE = 16_000
HOP = 160
WINDOW = 2 * HOP  # at 16 kHz: the same 20 ms, and bins 50 Hz apart, as in the signal path
_ALL_BINS = 81  # the loss looks at all up to 4 kHz,
_EVEN_BINS = 40  # and at every second one from there to 8 kHz

_LONGEST = 1000
"""Frames of an example at most."""


class Wideband(nn.Module):
    """The differentiable twin of `percepnet.stft.inverse`, for the band up to 8 kHz."""

    def __init__(self) -> None:
        super().__init__()
        phase = torch.arange(0.5, WINDOW) / WINDOW * torch.pi
        self.register_buffer("_window", torch.sin(torch.pi / 2 * torch.sin(phase) ** 2))
        phases = torch.rand(_LONGEST, _EVEN_BINS, generator=torch.Generator().manual_seed(0))
        self.register_buffer("_noise", torch.exp(2j * torch.pi * phases))

    def forward(self, spectra: Tensor) -> Tensor:
        """Samples at 16 kHz, (batch, (frames - 1)·160), of spectra (batch, frames, 181, 2).

        A bin that the loss leaves out becomes noise as loud as its neighbours, which there is what speech is.
        """
        bins = torch.view_as_complex(spectra.contiguous())
        below, even = (bins[..., first : first + _EVEN_BINS] for first in (_ALL_BINS - 1, _ALL_BINS))
        level = ((below.abs().square() + even.abs().square()) / 2 + 1e-12).sqrt()
        pairs = torch.stack([level * self._noise[: bins.shape[1]], even], -1)
        spectrum = torch.cat([bins[..., :_ALL_BINS], pairs.flatten(-2)], -1) / 3  # a third of the samples
        frames = torch.fft.irfft(spectrum, WINDOW) * self._window
        return (frames[:, 1:, :HOP] + frames[:, :-1, HOP:]).flatten(1)
