from typing import Any

import numpy as np

def configure(tables: dict[str, np.ndarray], /) -> None: ...
def analyze(
    rows: np.ndarray,
    hops: np.ndarray,
    samples: np.ndarray,
    spectra: np.ndarray,
    energies: np.ndarray,
    scores: np.ndarray,
    correlations: np.ndarray,
    mean: np.ndarray,
    scale: np.ndarray,
    energy: np.ndarray,
    features: np.ndarray,
    period: np.ndarray,
    strength: np.ndarray,
    /,
) -> Any: ...
def synthesize(
    rows: np.ndarray,
    spectra: Any,
    energy: np.ndarray,
    gains: np.ndarray,
    strengths: np.ndarray,
    wet: np.ndarray,
    sharpening: np.ndarray,
    overlap: np.ndarray,
    enhanced: np.ndarray,
    /,
) -> None: ...
