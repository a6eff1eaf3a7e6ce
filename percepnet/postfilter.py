"""Postfilter: pauses become quieter, and while someone speaks no band is cut to silence.

What a network leaves of noise disturbs where it fluctuates: as bursts in pauses, and as holes in the speech
where a band is cut. The postfilter of [P] (equations 10 to 12) sharpens all gains alike, which costs quality
at every SNR; this one leaves the bands alone that carry speech.
"""

import numpy as np

from percepnet.bands import band_centres_hz

_DECAY = np.float32(0.97)  # per frame: a clear syllable counts for 0.4 s, until the next may come
_SPEECH = np.float32(0.25)  # largest gain from which a frame counts as speech in full
_FLOOR = np.float32(0.08)  # 22 dB: how much quieter a pause becomes, and the least gain while someone speaks

_CENTRES_HZ = band_centres_hz()
_VOICE = np.flatnonzero((_CENTRES_HZ >= 200) & (_CENTRES_HZ <= 8000))
_VOICE_BANDS = slice(_VOICE[0], _VOICE[-1] + 1)


def track(gains: np.ndarray, activity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How much every frame is part of speech: the largest gain of late.

    gains: (streams, frames, 34) float32 in [0, 1]; activity: (streams,) float32, that of the frame before.
    Returns the activity of every frame (streams, frames) float32 in [0, 1], and that of the last one.
    """
    held = gains[..., _VOICE_BANDS].max(axis=-1)
    for frame in range(held.shape[1]):
        activity = np.maximum(held[:, frame], _DECAY * activity)
        held[:, frame] = activity
    return held, activity


def shape(gains: np.ndarray, activity: np.ndarray) -> np.ndarray:
    """Lower the gains of pauses, and raise the smallest ones of speech.

    gains: (…, 34) float32 in [0, 1], amplitude gains; activity: (…) float32 in [0, 1]. Returns the new ones.
    """
    share = np.minimum(activity / _SPEECH, 1)[..., np.newaxis] ** 3
    return np.maximum(gains * np.maximum(share, _FLOOR), _FLOOR * share)
