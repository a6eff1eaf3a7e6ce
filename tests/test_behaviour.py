"""What callers can rely on from the bundled model, heard on synthesized voices and noises.

Everything runs through the int8 path that serves streams and files (`enhance` gives a stream's samples, see
test_shipped_model), with the default controls unless a test says otherwise.
"""

import numpy as np
import pytest
import signals
from scipy import signal

from percepnet.analysis import AnalysisState, analyze
from percepnet.constants import HOP, SAMPLE_RATE
from percepnet.stream import enhance
from percepnet.synthesis import MAX_ATTENUATION_LIMIT_DB, Controls

SECOND = SAMPLE_RATE
PASSAGE = SECOND // 20
"""50 ms."""

VOICES_HZ = [100, 130, 180, 230]


def level_db(samples: np.ndarray) -> np.ndarray:
    """Power along the first axis, in dB."""
    return 10 * np.log10(np.mean(np.square(samples, dtype=np.float64), axis=0) + 1e-12)


def in_noise(voice: np.ndarray, snr_db: float, *, seed: int = 0) -> np.ndarray:
    """Speech, at -20 dBFS while it lasts, with pink noise that is weaker by `snr_db`."""
    noise = signals.pink_noise(voice.size, level=10 ** (-(20 + snr_db) / 20), seed=seed)
    return voice + noise.reshape(voice.T.shape).T  # one stretch for each column


def band_level_db(samples: np.ndarray, bottom_hz: float, top_hz: float, rate: int) -> np.ndarray:
    """Power between two frequencies along the first axis, in dB against something common."""
    spectrum = np.fft.rfft(samples.T * np.hanning(len(samples)))
    frequency_hz = np.fft.rfftfreq(len(samples), 1 / rate)
    inside = (frequency_hz >= bottom_hz) & (frequency_hz < top_hz)
    return 10 * np.log10(np.sum(np.abs(spectrum[..., inside]) ** 2, axis=-1) / len(samples) ** 2 + 1e-16)


@pytest.mark.parametrize("snr_db", [40, 15])
def test_onsets_and_endings_keep_their_energy(snr_db):
    """After a pause and before one, 50 ms of speech are as loud as without noise, within 3 dB."""
    pause = np.zeros((SECOND * 6 // 10, len(VOICES_HZ)))
    phrases = [np.stack([signals.speech(SECOND, f0, seed=f0 + i) for f0 in VOICES_HZ], 1) for i in range(3)]
    voices = np.concatenate([part for phrase in phrases for part in (pause, phrase)] + [pause])
    enhanced = enhance(in_noise(voices, snr_db), SAMPLE_RATE)
    onsets = len(pause) + np.arange(3) * (len(pause) + SECOND)
    for start in [*onsets, *onsets + SECOND - PASSAGE]:
        passage = slice(start, start + PASSAGE)
        change_db = level_db(enhanced[passage]) - level_db(voices[passage])
        assert np.abs(change_db).max() < 3, f"{start / SECOND:.2f} s: {change_db.round(1)} dB"


@pytest.mark.parametrize(("before_hz", "after_hz"), [(110, 220), (220, 110), (90, 180), (240, 120)])
def test_pitch_and_comb_follow_another_speaker_within_100_ms(before_hz, after_hz):
    """The period is the new one, and the comb filter passes the new voice, 10 dB above what it changes."""
    half = SECOND // 2
    voice = np.concatenate(
        [signals.harmonics(signals.vibrato(f0, half), half) for f0 in (before_hz, after_hz)]
    )
    analysis, _ = analyze(voice[np.newaxis].astype(np.float32), AnalysisState.initial(1))
    followed = slice((half + SECOND // 10) // HOP, None)  # a frame's index tells when it is known
    octaves = np.log2(analysis.period[0, followed] * after_hz / SAMPLE_RATE)
    assert np.abs(octaves).max() < 0.1
    noisy, changed = analysis.noisy[0, followed], (analysis.comb - analysis.noisy)[0, followed]
    assert (np.sum(np.abs(changed) ** 2, axis=-1) < 0.1 * np.sum(np.abs(noisy) ** 2, axis=-1)).all()


@pytest.mark.parametrize(("before_hz", "after_hz"), [(110, 220), (220, 110)])
def test_another_speaker_is_heard_at_once(before_hz, after_hz):
    """In noise at 15 dB, no 100 ms of speech after the change are weaker than the voice itself by 3 dB."""
    voice = np.concatenate([signals.speech(SECOND, f0, seed=f0) for f0 in (before_hz, after_hz)])
    enhanced = enhance(in_noise(voice, 15), SAMPLE_RATE)
    clean_db, enhanced_db = (level_db(x[SECOND:].reshape(10, -1).T) for x in (voice, enhanced))
    loud = clean_db > -35
    assert (enhanced_db - clean_db)[loud].min() > -3


def hum(mains_hz: float, n_samples: int) -> np.ndarray:
    """Twelve harmonics of the mains, as a bad power supply adds."""
    return signals.harmonics(mains_hz, n_samples, top_hz=12 * mains_hz)


@pytest.mark.parametrize("level_dbfs", [-20, -40])
def test_noise_alone_is_lowered_by_20_db_after_a_second_but_stays_audible(level_dbfs):
    """White and pink noise, rumble, the hum of both mains, and hum in noise: as far as the default limit."""
    n_samples = 4 * SECOND
    pink = signals.pink_noise(n_samples)
    rumble = signal.lfilter(*signal.butter(1, 100, fs=SAMPLE_RATE), signals.white_noise(n_samples, seed=1))
    kinds = [signals.white_noise(n_samples), pink, rumble, hum(50, n_samples), hum(60, n_samples)]
    kinds.append(kinds[3] / kinds[3].std() + pink / pink.std())
    noise = np.stack([10 ** (level_dbfs / 20) * kind / kind.std() for kind in kinds], axis=1)
    enhanced = enhance(noise, SAMPLE_RATE)
    for second in range(1, 4):
        passage = slice(second * SECOND, (second + 1) * SECOND)
        lowered_db = level_db(noise[passage]) - level_db(enhanced[passage])
        assert 20 < lowered_db.min() <= lowered_db.max() < Controls.attenuation_limit_db + 0.5


@pytest.mark.parametrize("level_dbfs", [-20, -40])
@pytest.mark.parametrize("rate", [8000, 12_000, 16_000, 24_000, 32_000, 44_100])
def test_noise_alone_is_lowered_by_20_db_at_every_rate(rate, level_dbfs):
    """White noise that ends at half the caller's rate, where recordings of speech do too, is no speech.

    Nor is it the hiss of a recording if it is faint.
    """
    noise = signals.white_noise(3 * rate)
    noise *= 10 ** (level_dbfs / 20) / noise.std()
    passage = slice(rate, None)
    assert level_db(noise[passage]) - level_db(enhance(noise, rate)[passage]) > 20


def test_noise_falls_further_where_the_limit_is_higher():
    """White and pink noise: by about each limit, and at 100 dB by all that the model can."""
    noise = np.stack([signals.white_noise(2 * SECOND), signals.pink_noise(2 * SECOND)], axis=1)
    passage = slice(SECOND, None)
    lowered_db = [
        level_db(noise[passage]) - level_db(enhance(noise, SAMPLE_RATE, controls=Controls(limit))[passage])
        for limit in (12, 40, MAX_ATTENUATION_LIMIT_DB)
    ]
    assert (np.abs(lowered_db[0] - 12) < 1).all()
    assert (np.abs(lowered_db[1] - 40) < 3).all()
    assert (lowered_db[2] > 46).all()


@pytest.mark.parametrize("level_dbfs", [-20, -35])
def test_steady_tones_and_chords_do_not_pump(level_dbfs):
    """What is left of them moves by less than 11 % of their amplitude from one 100 ms to the next.

    That is 1 dB for a tone that passes whole, about what listeners just notice (Zwicker and Fastl,
    Psychoacoustics, 7.1); a tone that is taken for noise stays that far down. A dial tone, which the model
    half takes for a voice, moves by up to 2 dB.
    """
    n_samples, step = 5 * SECOND, SECOND // 10
    tones = [signals.harmonics(hz, n_samples, top_hz=hz) for hz in (440, 1000, 3000)]
    chord = sum(signals.harmonics(hz, n_samples, top_hz=3000) for hz in (220, 277, 330))
    dial = signals.harmonics(350, n_samples, top_hz=350) + signals.harmonics(440, n_samples, top_hz=440)
    sounds = np.stack([*tones, chord, dial], axis=1)
    sounds *= 10 ** (level_dbfs / 20) / sounds.std(axis=0)
    enhanced = enhance(in_noise(sounds, 40 - 20 - level_dbfs), SAMPLE_RATE)
    passages = (x[SECOND:].reshape(-1, step, x.shape[1]) for x in (enhanced, sounds))
    left, whole = (np.sqrt(np.mean(np.square(x, dtype=np.float64), axis=1)) for x in passages)
    steps = np.abs(np.diff(left / whole, axis=0)).max(axis=0)
    assert (steps < [0.11, 0.11, 0.11, 0.11, 0.2]).all(), steps


def test_music_pumps_by_no_more_than_the_attenuation_limit():
    """The model takes notes now for noise, now for voice; callers who send music bound what that does."""
    n_samples, step = 5 * SECOND, SECOND // 10
    f0_hz = np.resize(np.repeat([262, 294, 330, 349, 392, 440], SECOND * 4 // 10), n_samples)
    decay = np.exp(-(np.arange(n_samples) % (SECOND * 4 // 10)) / (0.25 * SECOND))
    melody = decay * signals.harmonics(f0_hz, n_samples, top_hz=3000)
    enhanced = enhance(melody, SAMPLE_RATE, controls=Controls(attenuation_limit_db=6))
    gain_db = level_db(enhanced.reshape(-1, step).T) - level_db(melody.reshape(-1, step).T)
    assert -6.5 < gain_db.min() <= gain_db.max() < 1


def test_ten_minutes_of_noise_leave_no_drift():
    """The tenth minute is as quiet as the first, and speech after it as good as before it."""
    minute = 60 * SECOND
    voice = signals.speech(3 * SECOND, 130)
    phrase = slice(SECOND, 4 * SECOND)
    passage = np.concatenate([np.zeros(SECOND), voice, np.zeros(SECOND)])
    clean = np.concatenate([passage, np.zeros(10 * minute), passage])
    noisy = clean + np.resize(signals.pink_noise(minute, level=0.01), len(clean))
    enhanced = enhance(noisy, SAMPLE_RATE)
    silence = slice(len(passage) + SECOND, len(passage) + 10 * minute)
    assert level_db(noisy[silence]) - level_db(enhanced[silence]) > 20
    minutes = enhanced[len(passage) : len(passage) + 10 * minute].reshape(10, minute)
    first, last = level_db(minutes[0, SECOND:]), level_db(minutes[9])
    assert last < first + 3
    before_db, after_db = (
        level_db(voice) - level_db(part[phrase] - voice)
        for part in (enhanced, enhanced[len(passage) + 10 * minute :])
    )
    assert after_db > before_db - 1


@pytest.mark.parametrize(("snr_db", "change_db"), [(40, 3), (20, 5)])
def test_telephone_callers_keep_their_bands(snr_db, change_db):
    """At 8 kHz, and at 48 kHz with nothing above 4 kHz, voices keep their level below 3 kHz.

    At 20 dB the weakest band of the voices is 5 dB above the noise in it.
    """
    voices = np.stack([signals.speech(2 * SECOND, f0, seed=f0) for f0 in VOICES_HZ], axis=1)
    clean, narrow = (signal.resample_poly(x, 1, 6) for x in (voices, in_noise(voices, snr_db)))
    wide_clean, wide = (signal.resample_poly(x, 6, 1) for x in (clean, narrow))
    for rate, sent, reference in ((8000, narrow, clean), (SAMPLE_RATE, wide, wide_clean)):
        enhanced = enhance(sent, rate)
        for bottom_hz, top_hz in ((80, 300), (300, 1000), (1000, 2000), (2000, 3000)):
            levels, expected = (band_level_db(x, bottom_hz, top_hz, rate) for x in (enhanced, reference))
            assert np.abs(levels - expected).max() < change_db, f"{rate} Hz, {bottom_hz} to {top_hz} Hz"


def test_narrow_band_callers_get_nothing_above_4_khz():
    """Of speech at 48 kHz that holds nothing above 4 kHz, nothing appears there: 60 dB below the voice."""
    voice = signals.speech(3 * SECOND, 130)
    narrow = signal.resample_poly(signal.resample_poly(in_noise(voice, 20), 1, 6), 6, 1)
    enhanced = enhance(narrow, SAMPLE_RATE)
    above, sent = (band_level_db(x, 4500, 24_000, SAMPLE_RATE) for x in (enhanced, narrow))
    assert above < band_level_db(enhanced, 0, 4000, SAMPLE_RATE) - 60
    assert above < sent + 1
