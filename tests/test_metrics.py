"""Scores mean what their names say, and are missing where they are not defined."""

import math
import sys

import numpy as np
import pytest

from percepnet.errors import PercepNetError
from percepnet.metrics import (
    HEADINGS,
    RATE,
    Scores,
    estoi,
    level_difference,
    mean,
    pause_level,
    pesq_wb,
    resampled,
    score,
    si_sdr,
)

pytest.importorskip("pesq", reason="needs the measure extra")


def voice(seconds: float = 1.5, rate: int = RATE, seed: int = 0) -> np.ndarray:
    """Syllables of a buzz whose pitch and timbre move."""
    t = np.arange(int(seconds * rate)) / rate
    phase = 2 * np.pi * np.cumsum(140 + 30 * np.sin(2 * np.pi * 0.7 * t)) / rate
    shape = np.random.default_rng(seed).uniform(0.2, 1, 20)
    buzz = sum(a * np.cos(k * phase) / k for k, a in enumerate(shape, 1))
    return (0.1 * buzz * np.maximum(0, np.sin(2 * np.pi * 3 * t))).astype(np.float32)


def noise(like: np.ndarray, snr_db: float, seed: int = 1) -> np.ndarray:
    white = np.random.default_rng(seed).standard_normal(len(like))
    return (white * np.sqrt(np.mean(like**2)) * 10 ** (-snr_db / 20)).astype(np.float32)


def test_a_perfect_copy_gets_the_best_scores():
    clean = voice()
    scores = score(clean, clean, RATE)
    assert scores.pesq > 4.6
    assert scores.estoi > 0.999
    assert scores.si_sdr > 90
    assert scores.level == 0


def test_more_noise_lowers_every_score():
    clean = voice(rate=48_000)
    scores = [score(clean, clean + noise(clean, snr), 48_000) for snr in (30, 10, 0)]
    for measure in ("pesq", "estoi", "si_sdr"):
        values = [getattr(one, measure) for one in scores]
        assert values == sorted(values, reverse=True)
        assert values[0] > values[-1] * 1.2


@pytest.mark.parametrize("scale", [0.3, 1.0, -2.0])
def test_si_sdr_is_the_ratio_of_signal_to_noise_at_any_scale_and_offset(scale):
    clean = voice()
    error = noise(clean, 10)
    error -= clean * (error @ clean) / (clean @ clean)
    error -= error.mean()
    expected = 10 * np.log10(np.sum((clean - clean.mean()) ** 2) / np.sum(error**2))
    assert si_sdr(clean, scale * (clean + error) + 0.1) == pytest.approx(expected, abs=0.05)


def test_level_is_in_decibels_of_amplitude():
    assert level_difference(voice(), voice() / 2) == pytest.approx(-6.02, abs=0.01)
    assert level_difference(np.full(100, 0.1, np.float32), np.full(100, 1, np.float32)) == pytest.approx(20)


def test_pauses_tell_what_is_left_of_the_noise():
    clean = np.concatenate([voice(), np.zeros(RATE, np.float32)])
    hiss = noise(clean, 10)
    assert pause_level(clean, clean + hiss) == pytest.approx(-10, abs=0.2)
    assert pause_level(clean, clean + hiss / 10) == pytest.approx(-30, abs=0.2)
    assert pause_level(clean, clean) == pytest.approx(-80)
    assert math.isnan(pause_level(hiss, hiss))


def test_scores_are_missing_where_there_is_no_speech():
    silence = np.zeros(RATE, np.float32)
    for estimate in (silence, noise(silence + 0.01, 0)):
        assert all(math.isnan(value) for value in score(silence, estimate, RATE))


def test_scores_are_missing_where_speech_is_too_short():
    clean = voice(0.15)
    assert math.isnan(pesq_wb(clean, clean))
    assert math.isnan(estoi(clean, clean))


def test_a_muted_voice_gets_scores():
    """Enhancement may mute everything; that must count as bad, not be left out."""
    scores = score(voice(), np.zeros_like(voice()), RATE)
    assert scores.pesq == pytest.approx(1.04, abs=0.01)
    assert abs(scores.estoi) < 0.1
    assert scores.si_sdr < -50
    assert scores.level < -50


def test_means_leave_out_what_is_missing():
    scores = [
        Scores(1.0, math.nan, -10.0, 0.0, 0.0),
        Scores(2.0, math.nan, 10.0, 1.0, 1.0),
        Scores(math.nan, *[2.0] * 4),
    ]
    assert mean(scores) == Scores(1.5, 2.0, pytest.approx(2 / 3), 1.0, 1.0)
    assert math.isnan(mean(scores[:2]).estoi)


def test_every_score_has_its_heading():
    cells = Scores(2.5, 0.7, 12.25, -0.5, -31.25).cells()
    assert cells == ["2.500", "0.700", "12.25", "-0.50", "-31.25"]
    assert len(HEADINGS) == len(cells)


@pytest.mark.parametrize(
    ("rate_in", "rate_out"), [(48_000, 16_000), (44_100, 16_000), (22_050, 48_000), (8_000, 16_000)]
)
def test_resampling_moves_nothing(rate_in, rate_out):
    n = rate_in // 5 + 7
    tone = np.cos(2 * np.pi * 1_000 * np.arange(n) / rate_in).astype(np.float32)
    output = resampled(tone, rate_in, rate_out)
    assert len(output) == math.ceil(n * rate_out / rate_in)
    ideal = np.cos(2 * np.pi * 1_000 * np.arange(len(output)) / rate_out)
    inner = slice(rate_out // 50, -rate_out // 50)
    assert np.max(np.abs(output[inner] - ideal[inner])) < 1e-3


@pytest.mark.parametrize("module", ["pesq", "pystoi"])
def test_a_missing_module_names_the_extra(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(PercepNetError, match=rf"'{module}'.*'\.\[measure\]'"):
        score(voice(), voice(), RATE)
