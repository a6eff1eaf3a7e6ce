"""The transform is exact: it gives back what it was given, whatever it is computed with."""

import numpy as np
import pytest
import reference
import signals

from percepnet import stft
from percepnet.constants import HOP, WINDOW


def test_the_window_is_power_complementary():
    power = stft.VORBIS_WINDOW.astype(np.float64) ** 2
    np.testing.assert_allclose(power[:HOP] + power[HOP:], 1, atol=2e-7)


def test_the_window_is_the_vorbis_window():
    assert reference.agreement_db(stft.VORBIS_WINDOW, reference.vorbis_window()) > 140


@pytest.mark.parametrize(("start", "hop"), [(0, HOP), (100, HOP), (7, 1)])
def test_windows_begin_where_they_should(start, hop):
    samples = np.arange(2 * 2000, dtype=np.float32).reshape(2, 2000)
    windows = stft.windows(samples, WINDOW, start=start, hop=hop)
    assert windows.shape == (2, (2000 - start - WINDOW) // hop + 1, WINDOW)
    for index in range(windows.shape[1]):
        begin = start + index * hop
        np.testing.assert_array_equal(windows[:, index], samples[:, begin : begin + WINDOW])


def test_windows_of_a_slice_are_those_of_the_slice():
    samples = np.arange(2 * 3000, dtype=np.float32).reshape(2, 3000)
    np.testing.assert_array_equal(
        stft.windows(samples[:, 50:2000], WINDOW), stft.windows(samples[:, 50:2000].copy(), WINDOW)
    )


def test_forward_equals_the_slow_transform():
    window = signals.white_noise(WINDOW)
    fast = stft.forward(window.astype(np.float32))
    assert fast.dtype == np.complex64
    assert reference.agreement_db(fast, reference.spectrum(window)) > 120


def test_inverse_equals_the_slow_transform():
    spectrum = reference.spectrum(signals.white_noise(WINDOW))
    samples, overlap = stft.inverse(spectrum.astype(np.complex64)[None, None], np.zeros((1, HOP), np.float32))
    assert samples.dtype == overlap.dtype == np.float32
    slow = reference.inverse(spectrum)
    assert reference.agreement_db(np.concatenate([samples[0], overlap[0]]), slow) > 120


def test_forward_and_inverse_reconstruct_one_hop_late():
    signal = signals.white_noise(3, 10 * HOP).astype(np.float32)
    heard = np.pad(signal, ((0, 0), (HOP, 0)))
    samples, _ = stft.inverse(stft.forward(stft.windows(heard, WINDOW)), np.zeros((3, HOP), np.float32))
    assert reference.agreement_db(samples[:, HOP:], signal[:, :-HOP]) > 125


def test_inverse_gives_the_same_samples_in_one_call_and_frame_by_frame():
    spectra = stft.forward(signals.white_noise(2, 6, WINDOW).astype(np.float32))
    overlap = np.zeros((2, HOP), np.float32)
    whole, last = stft.inverse(spectra, overlap)
    parts = []
    for frame in range(6):
        part, overlap = stft.inverse(spectra[:, frame : frame + 1], overlap)
        parts.append(part)
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
    np.testing.assert_array_equal(overlap, last)


@pytest.mark.parametrize("n_streams", [2, 3, 4, 5, 8, 17])
def test_a_transform_does_not_depend_on_the_rows_beside_it(n_streams):
    """scipy transforms several rows at once where it can; each must be what it is alone."""
    frames = signals.white_noise(n_streams, 1, WINDOW).astype(np.float32)
    spectra = stft.forward(frames)
    samples, _ = stft.inverse(spectra, np.zeros((n_streams, HOP), np.float32))
    for row in range(n_streams):
        alone = stft.forward(frames[row : row + 1])
        np.testing.assert_array_equal(spectra[row : row + 1], alone)
        np.testing.assert_array_equal(
            samples[row : row + 1], stft.inverse(alone, np.zeros((1, HOP), np.float32))[0]
        )
