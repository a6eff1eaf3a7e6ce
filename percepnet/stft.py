"""Short-time Fourier transform with a power-complementary window: 20 ms windows, 10 ms hops."""

import numpy as np
import scipy.fft

from percepnet.constants import HOP, WINDOW


def _vorbis_window() -> np.ndarray:
    phase = np.pi * (np.arange(WINDOW) + 0.5) / WINDOW
    return np.sin(np.pi / 2 * np.sin(phase) ** 2).astype(np.float32)


VORBIS_WINDOW = _vorbis_window()
"""Analysis and synthesis window: its square and that half a window later sum to one (Vorbis I, 4.3.1)."""

_RISE, _FALL = np.split(VORBIS_WINDOW**2, 2)


def windows(samples: np.ndarray, length: int, *, start: int = 0, hop: int = HOP) -> np.ndarray:
    """View a signal as overlapping windows, the first of which begins at sample `start`.

    samples: (streams, start + length + (n - 1)·hop). Returns a view (streams, n, length).
    """
    samples = np.ascontiguousarray(samples)
    n_streams, n_samples = samples.shape
    shape = (n_streams, (n_samples - start - length) // hop + 1, length)
    stream, sample = samples.strides
    # numpy's sliding_window_view takes as long as a transform.
    return np.ndarray(shape, samples.dtype, samples, start * sample, (stream, hop * sample, sample))


def forward(frames: np.ndarray) -> np.ndarray:
    """Window and transform frames: (…, 960) float32 to (…, 481) complex64."""
    return scipy.fft.rfft(frames * VORBIS_WINDOW)


def passed(samples: np.ndarray, overlap: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What `inverse` makes of the unchanged spectra of a signal, without a transform.

    samples: (streams, (frames + 1)·480) float32, all that the frames' windows hold; overlap: as for
    `inverse`. Returns the samples (streams, frames·480) float32, and the new overlap: the signal itself but
    for the first hop, in which the overlap of other spectra fades out.
    """
    signal = samples[:, :-HOP].copy()
    signal[:, :HOP] *= _RISE
    signal[:, :HOP] += overlap
    return signal, samples[:, -HOP:] * _FALL


def inverse(spectrum: np.ndarray, overlap: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Transform back, window, and overlap-add.

    spectrum: (streams, frames, 481) complex64; overlap: (streams, 480) float32, the second half of the
    window before. Returns the samples (streams, frames·480) float32, one hop late, and the new overlap.
    """
    frames = scipy.fft.irfft(spectrum, WINDOW)
    frames *= VORBIS_WINDOW
    n_streams, n_frames, _ = frames.shape
    samples = np.empty((n_streams, n_frames, HOP), np.float32)
    np.add(frames[:, 0, :HOP], overlap, out=samples[:, 0])
    if n_frames > 1:
        np.add(frames[:, 1:, :HOP], frames[:, :-1, HOP:], out=samples[:, 1:])
    return samples.reshape(n_streams, -1), frames[:, -1, HOP:]
