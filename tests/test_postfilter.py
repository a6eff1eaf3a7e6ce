"""The postfilter leaves speech alone, fills its holes, and quiets what is between."""

import numpy as np
import pytest
import reference

from percepnet import postfilter
from percepnet.constants import N_BANDS

SILENCE = np.zeros(1, np.float32)


def _gains(*frames: float) -> np.ndarray:
    """Frames of the same gain in every band, (1, frames, 34)."""
    return np.repeat(np.float32(frames)[None, :, None], N_BANDS, axis=-1)


def _filtered(gains: np.ndarray) -> np.ndarray:
    return postfilter.shape(gains, postfilter.track(gains, np.zeros(len(gains), np.float32))[0])


def test_it_is_the_formula():
    gains = np.random.default_rng(0).lognormal(-3, 2, (3, 40, N_BANDS)).clip(0, 1).astype(np.float32)
    gains *= np.linspace(1, 0, 40, dtype=np.float32)[:, None] ** 4
    filtered = _filtered(gains)
    assert filtered.dtype == np.float32
    for stream in range(3):
        double = gains[stream].astype(np.float64)
        activities = reference.speech_activity(double)
        slow = [reference.postfilter(*frame) for frame in zip(double, activities, strict=True)]
        assert reference.agreement_db(filtered[stream], np.array(slow)) > 120


@pytest.mark.parametrize("gain", [0.25, 0.5, 1.0])
def test_bands_that_carry_speech_stay_as_they_were(gain):
    np.testing.assert_array_equal(_filtered(_gains(gain)), _gains(gain))


def test_speech_has_no_holes():
    """Where a frame is speech, no band falls by more than 22 dB."""
    gains = _gains(1e-4)
    gains[..., 10] = 0.9
    np.testing.assert_allclose(_filtered(gains)[..., :10], 0.08)


def test_long_pauses_become_22_db_quieter():
    filtered = _filtered(_gains(1, *[0.01] * 200))
    np.testing.assert_allclose(filtered[0, -1], 0.0008, rtol=1e-5)


def test_a_syllable_holds_until_the_next_may_come():
    """Nothing becomes quieter within 400 ms of clear speech."""
    gains = _gains(1, *[0.02] * 40)
    assert (_filtered(gains) >= gains).all()


def test_rumble_and_hiss_are_no_speech():
    gains = _gains(0.01)
    gains[..., [0, -1]] = 0.2
    np.testing.assert_allclose(_filtered(gains)[..., 1:-1], 0.0008, rtol=1e-5)


def test_frames_in_pieces_equal_the_whole_and_no_stream_changes_another():
    gains = np.random.default_rng(1).random((2, 6, N_BANDS), dtype=np.float32) ** 8
    together, last = postfilter.track(gains, np.zeros(2, np.float32))
    for stream in range(2):
        activity = SILENCE
        for frame in range(6):
            one, activity = postfilter.track(gains[stream : stream + 1, frame : frame + 1], activity)
            assert one.item() == together[stream, frame]
        assert activity.item() == last[stream]
