"""PESQ in the loss: the same scores as the measure's, and a gradient that raises them."""

import numpy as np
import pytest
from scipy.signal import resample_poly

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("pesq")

from signals import harmonics, pink_noise, speech, vibrato  # noqa: E402

from percepnet import stft  # noqa: E402
from percepnet.constants import SAMPLE_RATE, WINDOW  # noqa: E402
from percepnet.metrics import pesq_wb  # noqa: E402
from percepnet.training.dataset import LOSS_BINS  # noqa: E402
from percepnet.training.losses import LossConfig, SpectralLoss  # noqa: E402
from percepnet.training.pesq import WidebandPesq  # noqa: E402
from percepnet.training.wideband import Wideband  # noqa: E402


def spectra(signal: np.ndarray) -> torch.Tensor:
    """A signal's spectra as a shard holds them, (1, frames, 181, 2)."""
    spectrum = stft.forward(stft.windows(signal[np.newaxis], WINDOW))
    return torch.view_as_real(torch.from_numpy(spectrum[..., LOSS_BINS])).float()


def test_it_scores_as_the_measure_does() -> None:
    clean = resample_poly(speech(4 * SAMPLE_RATE, 130, seed=1), 1, 3).astype(np.float32)
    noisy = np.stack(
        [clean + pink_noise(len(clean), level=level, seed=2) for level in (1e-6, 1e-4, 1e-3, 3e-3, 0.01, 0.1)]
    )
    noisy = noisy.astype(np.float32)
    expected = [pesq_wb(clean, one) for one in noisy]
    reference = torch.from_numpy(clean).expand(len(noisy), -1)
    found = WidebandPesq()(reference, torch.from_numpy(noisy)).numpy()
    assert max(expected) > 4
    assert min(expected) < 1.5
    np.testing.assert_allclose(found, expected, atol=0.2)
    assert (np.diff(found) < 0).all()


def test_it_hears_the_signal_of_the_spectra() -> None:
    """Below 4 kHz, where the loss has every bin, the samples are the signal at 16 kHz."""
    signal = harmonics(vibrato(150, SAMPLE_RATE), SAMPLE_RATE, top_hz=3500)
    heard = Wideband()(spectra(signal))[0].numpy()
    expected = signal[SAMPLE_RATE // 100 :][1::3][: len(heard)]
    assert np.corrcoef(heard[160:-160], expected[160 : len(heard) - 160])[0, 1] > 0.99


def test_better_gains_can_be_learned_from_it() -> None:
    clean = speech(2 * SAMPLE_RATE, 130, seed=3)
    loss = SpectralLoss(LossConfig(pesq=1.0))
    wanted = spectra(clean)
    noisy = spectra(clean + pink_noise(len(clean), level=0.02, seed=4))
    gains = torch.ones(1, noisy.shape[1], 34, requires_grad=True)

    def missing(gains: torch.Tensor) -> torch.Tensor:
        return loss.missing_quality(loss.enhance(noisy, noisy, gains, torch.zeros_like(gains)), wanted)

    before = missing(gains)
    before.backward()
    assert gains.grad.isfinite().all()
    with torch.no_grad():
        assert missing((gains - 3 * gains.grad / gains.grad.norm()).clamp(0, 1)) < before - 0.01


def test_where_nobody_speaks_nothing_is_missing() -> None:
    loss = SpectralLoss(LossConfig(pesq=1.0))
    silence = spectra(np.zeros(2 * SAMPLE_RATE, np.float32))
    noise = spectra(pink_noise(2 * SAMPLE_RATE, level=0.02))
    assert loss.missing_quality(noise, silence) == 0
