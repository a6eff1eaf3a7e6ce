"""The ladder: perfect knowledge of the clean signal, used with ever more of the signal path."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from percepnet import metrics
from percepnet.cli import main
from percepnet.constants import SAMPLE_RATE
from percepnet.oracle import RUNGS, climb

pytest.importorskip("pesq", reason="needs the measure extra")

RUNG_NAMES = ["noisy", "magnitude", "gains", "comb", "postfilter"]


def voice(seconds: float, rate: int = SAMPLE_RATE) -> np.ndarray:
    """Syllables of a buzz of moving pitch, with harmonics up to 5 kHz."""
    t = np.arange(int(seconds * rate)) / rate
    phase = 2 * np.pi * np.cumsum(130 + 10 * np.sin(np.pi * t)) / rate
    buzz = sum(np.cos(k * phase + k * k) / k**0.7 for k in range(1, 33))
    return (0.05 * buzz * np.maximum(0, np.sin(2 * np.pi * 2.5 * t)) ** 0.5).astype(np.float32)


def in_noise(clean: np.ndarray, snr_db: float, seed: int = 0) -> np.ndarray:
    white = np.random.default_rng(seed).standard_normal(len(clean))
    return clean + (white * clean.std() * 10 ** (-snr_db / 20)).astype(np.float32)


def test_a_clean_recording_passes_every_rung_unchanged():
    """No delay, no lost tail, no gain: every rung knows that nothing is to be done."""
    clean = voice(0.5)[:-123]
    for rung, output in climb(clean, clean).items():
        assert output.shape == clean.shape
        error_db = 10 * np.log10(np.sum((output - clean) ** 2) / np.sum(clean**2) + 1e-20)
        assert error_db < -60, rung


def test_every_rung_climbs_above_the_one_before():
    clean = voice(2.0)
    signals = climb(clean, in_noise(clean, 5))
    assert list(signals) == list(RUNGS) == RUNG_NAMES
    scores = {rung: metrics.score(clean, output, SAMPLE_RATE) for rung, output in signals.items()}
    pesq = {rung: one.pesq for rung, one in scores.items()}
    assert pesq["noisy"] + 0.5 < pesq["gains"]
    assert pesq["gains"] + 0.25 < pesq["comb"] < pesq["magnitude"]
    assert scores["noisy"].si_sdr + 4 < scores["gains"].si_sdr < scores["comb"].si_sdr - 2


def test_the_command_writes_signals_table_and_picture(tmp_path, capsys):
    clean = voice(1.0, rate=16_000)
    noisy = in_noise(clean, 5)
    soundfile.write(tmp_path / "clean.wav", clean, 16_000, subtype="FLOAT")
    soundfile.write(tmp_path / "recording.wav", noisy, 16_000, subtype="FLOAT")
    out = tmp_path / "out"
    assert main(["oracle", str(tmp_path / "clean.wav"), str(tmp_path / "recording.wav"), "-o", str(out)]) == 0
    for rung in RUNG_NAMES:
        samples, rate = soundfile.read(out / rung / "recording.wav")
        assert rate == SAMPLE_RATE
        assert len(samples) == 3 * len(clean)
    table = (out / "table.md").read_text()
    assert capsys.readouterr().out == table
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [f"| {t}" for t in RUNGS.values()]
    expected = metrics.score(
        metrics.resampled(clean, 16_000, 48_000),
        np.float32(soundfile.read(out / "comb" / "recording.wav")[0]),
        48_000,
    )
    comb_row = [float(cell) for cell in table.splitlines()[5].strip("|").split("|")[1:]]
    np.testing.assert_allclose(comb_row, expected, atol=0.01)
    assert (out / "spectrograms.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_gives_means_over_its_clips(tmp_path, capsys):
    for index, snr in enumerate((0, 20)):
        clean = voice(1.0, rate=16_000)
        for folder, samples in (("clean", clean), ("noisy", in_noise(clean, snr))):
            (tmp_path / folder).mkdir(exist_ok=True)
            soundfile.write(tmp_path / folder / f"{index}.flac", samples, 16_000)
    arguments = ["oracle", str(tmp_path / "clean"), str(tmp_path / "noisy"), "-o"]
    assert main([*arguments, str(tmp_path / "out")]) == 0
    header, _, noisy_row, *_ = capsys.readouterr().out.splitlines()
    assert header.startswith("| 2 clips |")
    assert float(noisy_row.split("|")[4]) == pytest.approx(10, abs=0.5)
    assert sorted(path.name for path in (tmp_path / "out" / "comb").iterdir()) == ["0.wav", "1.wav"]

    assert main([*arguments, str(tmp_path)]) == 2, "DIR/noisy would be written over"
    assert "written over" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "noisy").iterdir()) == ["0.flac", "1.flac"]


def test_a_reference_of_another_length_is_refused(tmp_path, capsys):
    clean, noisy = Path(tmp_path / "clean.wav"), Path(tmp_path / "noisy.wav")
    soundfile.write(clean, np.zeros(900), 16_000)
    soundfile.write(noisy, np.zeros(800), 16_000)
    assert main(["oracle", str(clean), str(noisy), "-o", str(tmp_path / "out")]) == 2
    assert "same length" in capsys.readouterr().err
