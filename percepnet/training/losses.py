"""Losses on the enhanced spectrum, through comb mix and gains, and on the band values themselves."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from percepnet.bands import BIN_HZ, band_weights
from percepnet.training.dataset import LOSS_BINS
from percepnet.training.pesq import BEST, WidebandPesq
from percepnet.training.wideband import Wideband

_TINY = 1e-12

_SEGMENT = 38
"""Frames that are correlated at once: 380 ms, as in ESTOI."""

_SEGMENT_HOP = 4
"""Frames from one segment to the next."""

_ACTIVE = 1e-4
"""A frame counts as speech within 40 dB of its example's loudest, as in ESTOI…"""

_AUDIBLE = 1e-3
"""…and with at least this energy, about 30 dB below the mean of an active target."""

_HIGH_BAND_HZ = (8000, 20_000)

_HIGH_BAND_FLOOR = 1e-9
"""Power of a bin 70 dB below the mean of an active target, which counts as silence."""

_SPOKEN_SHARE = 0.1
"""Of such frames, for an example to have a quality."""

_DISTORTION_FLOOR = 1e-3
"""Distortion 30 dB below the speech counts as none."""


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
    intelligibility: float = 0.0
    """Weight of the correlation that is missing between enhanced and clean envelopes (ESTOI)."""
    beyond: float = 0.0
    """Weight of what lies above an example's bandwidth: its recording is silent there, its talker wasn't."""
    high_band: float = 0.0
    """Weight of the log-spectral distance in dB from 8 to 20 kHz, where speech is weak."""
    pesq: float = 0.0
    """Weight of the points that PESQ-WB misses."""
    distortion: float = 0.0
    """Weight of the scale-invariant ratio of distortion to signal up to 8 kHz, in dB."""


def _bin_weights() -> Tensor:
    """Weights of the bins, which give every band the same say; mean one."""
    bands = torch.from_numpy(band_weights()[:, LOSS_BINS])
    weights = (bands / bands.sum(-1, keepdim=True)).sum(0)
    return weights / weights.mean()


def third_octaves() -> Tensor:
    """Power weights of the bins in ESTOI's 15 third-octave bands from 150 Hz up, (15, 181).

    A bin that lies in two bands, or stands for two bins, counts in proportion.
    """
    hz = np.arange(5000)
    bins = np.searchsorted((LOSS_BINS[:-1] + LOSS_BINS[1:]) / 2 * BIN_HZ, hz, side="right")
    center = 150 * 2 ** (np.arange(15) / 3)[:, None]
    inside = (hz >= center * 2 ** (-1 / 6)) & (hz < center * 2 ** (1 / 6))
    shares = [np.bincount(bins[band], minlength=len(LOSS_BINS)) for band in inside]
    return torch.from_numpy(np.stack(shares) / BIN_HZ).float()


def _active(clean: Tensor) -> Tensor:
    """1 where somebody speaks, else 0, (batch, frames); clean: (batch, frames, 181, 2)."""
    power = clean.square().sum((-1, -2))
    return ((power > _ACTIVE * power.amax(1, keepdim=True)) & (power > _AUDIBLE)).float()


def _spoken(clean: Tensor) -> Tensor:
    """Whether enough is said in each example to judge it, (batch,) bool; clean: (batch, frames, 181, 2)."""
    return (clean.square().sum((-1, -2)) > _AUDIBLE).float().mean(1) > _SPOKEN_SHARE


def _unit(values: Tensor, dim: int, weights: Tensor | float = 1.0) -> Tensor:
    """Deviations from the weighted mean along an axis, scaled to length one."""
    total = (torch.ones_like(values) * weights).sum(dim, keepdim=True).clamp(min=1)
    deviations = (values - (values * weights).sum(dim, keepdim=True) / total) * weights
    return deviations / (deviations.square().sum(dim, keepdim=True) + 1e-8).sqrt()


class SpectralLoss(torch.nn.Module):
    """The training loss; a module, so that its constant tensors move with the network."""

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self.config = config
        bands = torch.from_numpy(band_weights()[:, LOSS_BINS])
        self.register_buffer("_bands", bands)
        self.register_buffer("_bin_weights", _bin_weights())
        self.register_buffer("_third_octaves", third_octaves())
        self.register_buffer("_bins_meant", torch.from_numpy(np.gradient(LOSS_BINS)).float())
        self.register_buffer("_frequency_hz", torch.from_numpy(LOSS_BINS * BIN_HZ).float())
        self._wideband = Wideband()
        self._pesq = WidebandPesq()

    def enhance(self, noisy: Tensor, comb: Tensor, gains: Tensor, strengths: Tensor) -> Tensor:
        """The differentiable twin of `percepnet.synthesis.synthesize` up to the spectrum, without postfilter.

        noisy, comb: (…, 181, 2); gains, strengths: (…, 34). Returns the enhanced spectrum (…, 181, 2).
        """
        mixed = torch.lerp(noisy, comb, (strengths @ self._bands)[..., None])
        energy = noisy.square().sum(-1) @ self._bands.T
        mixed_energy = mixed.square().sum(-1) @ self._bands.T
        restoration = torch.sqrt((energy + _TINY) / (mixed_energy + _TINY))
        return mixed * ((gains * restoration) @ self._bands)[..., None]

    def missing_correlation(self, enhanced: Tensor, clean: Tensor) -> Tensor:
        """One minus ESTOI of the enhanced spectra, (batch, frames, 181, 2), on this module's frames and bins.

        Jensen, Taal: "An algorithm for predicting the intelligibility of speech masked by modulated noise
        maskers" (2016), with frames of 20 ms each 10 ms, and pauses left out of each segment's sums.
        """
        length = min(_SEGMENT, clean.shape[1])
        active = _active(clean).unfold(1, length, _SEGMENT_HOP)  # (batch, segments, frames)

        def normalized(spectra: Tensor) -> Tensor:
            envelopes = (spectra.square().sum(-1) @ self._third_octaves.T + 1e-9).sqrt()
            segments = envelopes.unfold(1, length, _SEGMENT_HOP)  # (batch, segments, bands, frames)
            return _unit(_unit(segments, -1, active[:, :, None]), 2)

        correlation = (normalized(clean) * normalized(enhanced)).sum(2)
        weights = active * (active.sum(-1, keepdim=True) > length / 2)
        return 1 - (correlation * weights).sum() / weights.sum().clamp(min=1)

    def high_band_distance(self, enhanced: Tensor, clean: Tensor, known: Tensor) -> Tensor:
        """Log-spectral distance in dB above 8 kHz in frames of speech; known: (batch, 181), bins' weights."""
        low, high = _HIGH_BAND_HZ
        bins = (self._frequency_hz >= low) & (self._frequency_hz < high)
        levels = [(s[:, :, bins].square().sum(-1) + _HIGH_BAND_FLOOR).log10() for s in (enhanced, clean)]
        weights = known[:, bins] / known[:, bins].sum(-1, keepdim=True).clamp(min=1e-6)
        squares = ((10 * (levels[0] - levels[1])).square() * weights[:, None]).sum(-1)
        active = _active(clean) * known[:, None, bins].mean(-1)
        return ((squares + 1).sqrt() * active).sum() / active.sum().clamp(min=1)

    def missing_quality(self, enhanced: Tensor, clean: Tensor) -> Tensor:
        """Points of PESQ-WB below the best, a mean over the examples in which somebody speaks."""
        spoken = _spoken(clean)
        if not spoken.any():
            return torch.zeros((), device=clean.device)
        pairs = (self._wideband(spectra[spoken]) for spectra in (clean, enhanced))
        return BEST - self._pesq(*pairs).mean()

    def distortion(self, enhanced: Tensor, clean: Tensor) -> Tensor:
        """Minus SI-SDR in dB up to 8 kHz, a mean over the examples in which somebody speaks.

        Le Roux, Wisdom, Erdogan, Hershey: "SDR – half-baked or well done?" (2019), on spectra instead of
        samples, and bounded at 30 dB, or examples that are nearly clean would own the gradient.
        """
        spoken = _spoken(clean)
        if not spoken.any():
            return torch.zeros((), device=clean.device)
        below = self._frequency_hz < _HIGH_BAND_HZ[0]
        weights = self._bins_meant[below][:, None]
        clean, enhanced = clean[spoken][:, :, below], enhanced[spoken][:, :, below]
        dimensions = (1, 2, 3)
        energy = (clean.square() * weights).sum(dimensions, keepdim=True)
        target = (clean * enhanced * weights).sum(dimensions, keepdim=True) / energy * clean
        target_energy = (target.square() * weights).sum(dimensions)
        error_energy = ((enhanced - target).square() * weights).sum(dimensions)
        ratio = (error_energy + _DISTORTION_FLOOR * target_energy) / (target_energy + _TINY)
        return (10 * (ratio + _TINY).log10()).mean()

    def forward(
        self, gains: Tensor, strengths: Tensor, batch: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        """Mean loss of a batch and its terms."""
        config = self.config
        clean = batch["clean"]
        enhanced = self.enhance(batch["noisy"], batch["comb"], gains, strengths)
        known = torch.where(self._frequency_hz <= batch["bandwidth_hz"][:, None], 1, config.beyond)
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

        band_known = ((known @ self._bands.T) / self._bands.sum(-1))[:, None]
        root_error = (gains + 1e-4).sqrt() - batch["gains"].sqrt()
        gain_error = root_error.square() + 10 * root_error.square().square()
        gain = (gain_error * band_known).mean()
        strength_error = (1 - strengths + 1e-4).sqrt() - (1 - batch["strengths"]).clamp(min=0).sqrt()
        strength = (strength_error.square() * band_known).mean()

        terms = {"magnitude": magnitude, "phase": phase, "gains": gain, "strengths": strength}
        if config.intelligibility:
            terms["intelligibility"] = self.missing_correlation(enhanced, clean)
        if config.high_band:
            terms["high_band"] = self.high_band_distance(enhanced, clean, known)
        if config.pesq:
            terms["pesq"] = self.missing_quality(enhanced, clean)
        if config.distortion:
            terms["distortion"] = self.distortion(enhanced, clean)
        total = sum((getattr(config, name) * value for name, value in terms.items()), torch.zeros(()))
        return total, {name: float(value.detach()) for name, value in terms.items()}
