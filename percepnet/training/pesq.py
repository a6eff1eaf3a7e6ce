"""What PESQ would say: the perceptual model of ITU-T P.862, in its wideband form, as a part of the loss.

Without the time alignment, which training pairs don't need, and with filters applied to power spectra.
"""

import torch
from torch import Tensor, nn

BEST = 4.64
"""Of a signal that equals its reference."""

_WINDOW = 512
_HOP = 256
_OWN_SHARE = 0.8
"""Share of a frame's own level correction; the rest is the one before."""

# Of P.862's 49 Bark bands at 16 kHz: bins, widths in Bark, power corrections and thresholds of hearing.
# fmt: off
_BINS = [
    1, 1, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 4, 3, 4, 5,
    4, 5, 6, 6, 7, 8, 9, 9, 12, 12, 15, 16, 18, 21, 25, 20,
]
_WIDTHS = [
    0.157344, 0.317994, 0.322441, 0.326934, 0.331474, 0.336061, 0.340697, 0.345381, 0.350114, 0.354897,
    0.359729, 0.364611, 0.369544, 0.374529, 0.379565, 0.384653, 0.389794, 0.394989, 0.400236, 0.405538,
    0.410894, 0.416306, 0.421773, 0.427297, 0.432877, 0.438514, 0.444209, 0.449962, 0.455774, 0.461645,
    0.467577, 0.473569, 0.479621, 0.485736, 0.491912, 0.498151, 0.504454, 0.510819, 0.51725, 0.523745,
    0.530308, 0.536934, 0.543629, 0.55039, 0.55722, 0.564119, 0.571085, 0.578125, 0.585232,
]
_CORRECTIONS = [
    100.0, 100.0, 100.0, 100.0, 100.0, 100.0, 100.0, 100.0, 50.0, 100.0, 100.0, 100.0, 100.0, 100.0,
    53.047077, 110.000046, 117.991989, 65.0, 68.760147, 69.999931, 71.428818, 75.000038, 76.843384,
    80.968781, 88.646126, 63.864388, 68.15535, 72.547775, 75.584831, 58.379192, 80.950836, 64.135651,
    54.384785, 73.821884, 64.437073, 59.176456, 65.521278, 61.399822, 58.144047, 57.004543, 64.126297,
    54.311001, 61.114979, 55.077751, 56.849335, 55.628868, 53.137054, 54.985844, 79.546974,
]
_THRESHOLDS = [
    51286152.0, 2454709.5, 70794.59375, 4897.788574, 1174.897705, 389.045166, 104.71286, 45.70882,
    17.782795, 9.772372, 4.897789, 3.090296, 1.905461, 1.258925, 0.977237, 0.724436, 0.562341, 0.457088,
    0.389045, 0.331131, 0.295121, 0.269153, 0.25704, 0.251189, 0.251189, 0.251189, 0.251189, 0.263027,
    0.288403, 0.30903, 0.338844, 0.371535, 0.398107, 0.436516, 0.467735, 0.489779, 0.501187, 0.501187,
    0.512861, 0.524807, 0.524807, 0.524807, 0.512861, 0.47863, 0.42658, 0.371535, 0.363078, 0.416869,
    0.537032,
]
# fmt: on
_POWER_SCALE = 6.910853e-6
_LOUDNESS_SCALE = 0.1866055
_ZWICKER_POWER = 0.23

_LEVEL = 1e7
"""Mean power from 325 to 3250 Hz to which both signals are brought."""


def _input_filter() -> Tensor:
    """Power response at the bins of the filter that stands for a headphone in P.862.2."""
    z = torch.exp(-2j * torch.pi * torch.arange(_WINDOW // 2, dtype=torch.float64) / _WINDOW)
    response = 2.740826 * (1 - 2 * z + z * z) / (1 - 1.9444777 * z + 0.94597794 * z * z)
    return response.abs().square().float()


class WidebandPesq(nn.Module):
    """PESQ-WB of pairs of signals, on the scale of P.862.2 from 1 to 4.64."""

    def __init__(self) -> None:
        super().__init__()
        bands = torch.zeros(_WINDOW // 2, len(_BINS))
        first = 0
        for band, count in enumerate(_BINS):
            bands[first : first + count, band] = _CORRECTIONS[band] * _POWER_SCALE
            first += count
        bands[0] = 0
        widths = torch.tensor(_WIDTHS)
        exponents = (6 / (widths.cumsum(0) - widths / 2 + 2)).clamp(1, 2) ** 0.15 * _ZWICKER_POWER
        self.register_buffer("_bands", bands * _input_filter()[:, None])
        self.register_buffer("_widths", widths[1:])
        self.register_buffer("_thresholds", torch.tensor(_THRESHOLDS))
        self.register_buffer("_exponents", exponents)
        self.register_buffer("_window", torch.hann_window(_WINDOW))

    def forward(self, clean: Tensor, enhanced: Tensor) -> Tensor:
        """Quality, (batch,), of enhanced against clean samples, (batch, n) at 16 kHz, in sync.

        n is at least 32 ms. Where the clean signal is silent the quality says nothing.
        """
        reference, degraded = self._bark(clean), self._bark(enhanced)
        silent = self._audible(reference, 100) < 1e7
        spoken = ~silent[..., None] / reference.shape[1]
        means = [
            (power * (power > 100 * self._thresholds) * spoken).sum(1, keepdim=True)
            for power in (degraded, reference)
        ]
        reference = reference * ((means[0] + 1000) / (means[1] + 1000)).clamp(0.01, 100)
        correction = (self._audible(reference, 1) + 5e3) / (self._audible(degraded, 1) + 5e3)
        before = torch.cat([correction[:, :1], correction[:, :-1]], 1)
        correction = (_OWN_SHARE * correction + (1 - _OWN_SHARE) * before).clamp(3e-4, 5)
        degraded = degraded * correction[..., None]

        loudness, wanted = self._loudness(degraded), self._loudness(reference)
        difference = loudness - wanted
        masked = 0.25 * torch.minimum(loudness, wanted)
        disturbance = (difference.sign() * torch.relu(difference.abs() - masked))[..., 1:]
        asymmetry = ((degraded + 50) / (reference + 50))[..., 1:] ** 1.2
        asymmetry = torch.where(asymmetry < 3, 0, asymmetry.clamp(max=12))

        total = self._widths.sum()
        squares = (self._widths * disturbance).square().sum(-1)
        symmetric = (total * squares + 1e-8).sqrt()
        asymmetric = (self._widths * disturbance.abs() * asymmetry).sum(-1)
        weight = ((self._audible(reference, 1) + 1e5) / 1e7) ** 0.04
        raw = 4.5 - 0.1 * _over_time(symmetric / weight) - 0.0309 * _over_time(asymmetric / weight)
        return 0.999 + 4 / (1 + torch.exp(3.8224 - 1.3669 * raw))

    def _bark(self, samples: Tensor) -> Tensor:
        """Powers in Bark bands, (batch, frames, 49), of a signal brought to the listening level."""
        frames = samples.unfold(-1, _WINDOW, _HOP) * self._window
        power = torch.fft.rfft(frames)[..., : _WINDOW // 2].abs().square()
        voice = power[..., 11:105].sum(-1).mean(-1) * (2 / _WINDOW / self._window.square().sum())
        return (power * (_LEVEL / (voice + 1e-12))[:, None, None]) @ self._bands

    def _audible(self, power: Tensor, factor: float) -> Tensor:
        """Power of each frame, (batch, frames), that lies above the threshold of hearing times a factor."""
        audible = power * (power > factor * self._thresholds)
        return audible[..., 1:].sum(-1)

    def _loudness(self, power: Tensor) -> Tensor:
        """Zwicker's loudness of each band."""
        thresholds = self._thresholds
        above = torch.relu(power / thresholds - 1)
        loudness = (2 * thresholds) ** self._exponents * ((1 + 0.5 * above) ** self._exponents - 1)
        return loudness * _LOUDNESS_SCALE


def _over_time(disturbance: Tensor) -> Tensor:
    """Mean of (batch, frames): the worst moments of each 320 ms count most, then all such pieces alike."""
    length = min(20, disturbance.shape[-1])
    pieces = (disturbance + 1e-3).clamp(max=45).unfold(-1, length, 10)  # a root of nothing has no gradient
    return ((pieces**6).mean(-1) ** (1 / 6)).square().mean(-1).sqrt()
