"""What callers send as samples, made fit for the signal path."""

import numpy as np

MAX_LEVEL = 32_768.0
"""Louder samples (integers taken for floats) are clipped: energies must not overflow."""

SILENT_LEVEL = 1e-10
"""Softer samples, below -200 dB, are silent: their energies would be denormal numbers, which take a CPU so
much longer that one stream of them would hold up all others."""


def usable(samples: np.ndarray) -> np.ndarray:
    """Float32 samples that no stage chokes on, a copy: what is not finite, or too soft, is silent."""
    if samples.dtype != np.float32 or not samples.flags.c_contiguous:
        with np.errstate(over="ignore"):
            samples = samples.astype(np.float32, order="C")
    level = np.abs(samples)
    if level.max(initial=0) <= MAX_LEVEL:
        return samples * (level >= SILENT_LEVEL)
    samples = np.where((level >= SILENT_LEVEL) & (level < np.inf), samples, np.float32(0))
    return np.clip(samples, -MAX_LEVEL, MAX_LEVEL, out=samples)
