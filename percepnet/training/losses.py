"""Losses on the enhanced spectrum, through comb mix and gains, and on the band values themselves."""

from dataclasses import dataclass

import torch
from torch import Tensor

from percepnet.bands import BIN_HZ, band_weights
from percepnet.training.dataset import LOSS_BINS

_TINY = 1e-12


@dataclass(frozen=True)
class LossConfig:
    """Weights of the terms."""

    compression: float = 0.45
    """Magnitudes are raised to this power: about loudness (Zwicker's law)."""
    magnitude: float = 1.0
    phase: float = 0.1
    """Weight of the complex compressed error; it teaches the comb filter's strength."""
    over_suppression: float = 0.5
    """Additional weight of magnitude errors where speech is made too quiet."""
    gains: float = 0.02
    """Weight of the gain loss of [P] equation 13, which speeds up the start."""
    strengths: float = 0.02
    """Weight of the strength loss of [P] equation 14."""


def _bin_weights() -> Tensor:
    """Weights of the bins, which give every band the same say; mean one."""
    bands = torch.from_numpy(band_weights()[:, LOSS_BINS])
    weights = (bands / bands.sum(-1, keepdim=True)).sum(0)
    return weights / weights.mean()


class SpectralLoss(torch.nn.Module):
    """The training loss; a module, so that its constant tensors move with the network."""

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self.config = config
        bands = torch.from_numpy(band_weights()[:, LOSS_BINS])
        self.register_buffer("_bands", bands)
        self.register_buffer("_bin_weights", _bin_weights())
        self.register_buffer("_frequency_hz", torch.from_numpy(LOSS_BINS * BIN_HZ).float())

    def enhance(self, noisy: Tensor, comb: Tensor, gains: Tensor, strengths: Tensor) -> Tensor:
        """The differentiable twin of `percepnet.synthesis.synthesize` up to the spectrum, without postfilter.

        noisy, comb: (…, 181, 2); gains, strengths: (…, 34). Returns the enhanced spectrum (…, 181, 2).
        """
        mixed = torch.lerp(noisy, comb, (strengths @ self._bands)[..., None])
        energy = noisy.square().sum(-1) @ self._bands.T
        mixed_energy = mixed.square().sum(-1) @ self._bands.T
        restoration = torch.sqrt((energy + _TINY) / (mixed_energy + _TINY))
        return mixed * ((gains * restoration) @ self._bands)[..., None]

    def forward(
        self, gains: Tensor, strengths: Tensor, batch: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        """Mean loss of a batch and its terms. Bins above an example's bandwidth don't count."""
        config = self.config
        clean = batch["clean"]
        enhanced = self.enhance(batch["noisy"], batch["comb"], gains, strengths)
        known = self._frequency_hz <= batch["bandwidth_hz"][:, None]
        weights = (known * self._bin_weights)[:, None]
        weights = weights / (weights.sum() * gains.shape[1])

        floor = 1e-8  # 60 dB below the mean level of an active target
        clean_power = clean.square().sum(-1) + floor
        power = enhanced.square().sum(-1) + floor
        clean_loudness = clean_power ** (config.compression / 2)
        loudness = power ** (config.compression / 2)
        error = loudness - clean_loudness
        too_quiet = torch.relu(-error)
        magnitude = ((error.square() + config.over_suppression * too_quiet.square()) * weights).sum()

        compressed = enhanced * (loudness / power.sqrt())[..., None]
        clean_compressed = clean * (clean_loudness / clean_power.sqrt())[..., None]
        phase = ((compressed - clean_compressed).square().sum(-1) * weights).sum()

        band_known = (known.float() @ self._bands.T > 0.5 * self._bands.sum(-1))[:, None]
        root_error = (gains + 1e-4).sqrt() - batch["gains"].sqrt()
        gain_error = root_error.square() + 10 * root_error.square().square()
        gain = (gain_error * band_known).mean()
        strength_error = (1 - strengths + 1e-4).sqrt() - (1 - batch["strengths"]).clamp(min=0).sqrt()
        strength = (strength_error.square() * band_known).mean()

        terms = {"magnitude": magnitude, "phase": phase, "gains": gain, "strengths": strength}
        total = sum((getattr(config, name) * value for name, value in terms.items()), torch.zeros(()))
        return total, {name: float(value.detach()) for name, value in terms.items()}
