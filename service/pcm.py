"""Between the bytes of the wire and float32 samples with full scale ±1."""

import numpy as np

from percepnet.samples import usable

S16LE = np.dtype("<i2")
F32LE = np.dtype("<f4")

_FULL_SCALE = np.float32(32_768)


def decode(data: bytes, encoding: np.dtype) -> np.ndarray:
    """Samples float32 (n,) that no stage chokes on; data: whole samples."""
    samples = np.frombuffer(data, encoding)
    return samples / _FULL_SCALE if encoding == S16LE else usable(samples)


def encode(samples: np.ndarray, encoding: np.dtype) -> np.ndarray:
    """Samples of any shape in the type of the wire; integers saturate at full scale."""
    if encoding == S16LE:
        scaled = samples * _FULL_SCALE
        np.rint(scaled, out=scaled)
        return scaled.clip(-32_768, 32_767, out=scaled).astype(S16LE)
    return samples.astype(F32LE, copy=False)
