"""`percepnet evaluate` enhances as a stream does and compares before with after, condition by condition."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import export_random_model

from percepnet.cli import main
from percepnet.enhancer import Enhancer
from percepnet.metrics import Scores
from percepnet.model import Model
from percepnet.stream import enhance
from percepnet.synthesis import Controls
from percepnet.training.evaluate import conditions, table

pytest.importorskip("pesq", reason="needs the measure extra")

RATE = 48_000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_random_model(tmp_path_factory.mktemp("model"), fc=32, conv=64, gru=64, strength_gru=32)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean clip and the same in noise, 48 kHz."""
    folder = tmp_path_factory.mktemp("clips")
    t = np.arange(RATE) / RATE
    buzz = sum(np.cos(2 * np.pi * 150 * k * t) / k for k in range(1, 30))
    clean = 0.1 * buzz * np.maximum(0, np.sin(2 * np.pi * 3 * t))
    noise = 0.05 * np.random.default_rng(0).standard_normal(len(t))
    for name, noisy in (("0_snr5", clean + noise), ("1_clean", clean)):
        for kind, samples in (("clean", clean), ("noisy", noisy)):
            (folder / kind).mkdir(exist_ok=True)
            soundfile.write(folder / kind / f"{name}.flac", samples, RATE)
    return folder


def arguments(clips: Path, model: Path) -> list[str]:
    return [
        "evaluate",
        "--clean",
        f"{clips / 'clean'}",
        "--noisy",
        f"{clips / 'noisy'}",
        "--model",
        f"{model}",
    ]


def test_enhanced_files_are_what_the_stream_gives(clips, model, tmp_path, capsys):
    assert main([*arguments(clips, model), "--enhanced-out", str(tmp_path), "--postfilter", "0"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0_snr5.wav", "1_clean.wav"]
    noisy, _ = soundfile.read(clips / "noisy" / "0_snr5.flac", dtype="float32")
    enhancer = Enhancer(Model.load(model))
    expected = enhance(noisy, RATE, controls=Controls(postfilter=0), enhancer=enhancer)
    written, rate = soundfile.read(tmp_path / "0_snr5.wav")
    assert rate == RATE
    np.testing.assert_allclose(written, expected, atol=1 / 32768)


def test_the_table_compares_before_with_after(clips, model, capsys):
    assert main(arguments(clips, model)) == 0
    first, _, header, _, *rows = capsys.readouterr().out.splitlines()
    assert first == "random 0, int8"
    assert header.startswith("| condition | clips | PESQ-WB | ESTOI |")
    cells = {row.split(" | ")[0].removeprefix("| "): row.strip("| ").split(" | ")[1:] for row in rows}
    assert list(cells) == [
        f"{condition}: {signal}"
        for condition in ("noise", "clean", "noise, 5 dB")
        for signal in ("noisy", "enhanced")
    ]
    assert float(cells["clean: noisy"][1]) > 4.6
    assert float(cells["clean: noisy"][4]) == 0
    assert float(cells["noise: noisy"][1]) < 3
    assert cells["noise: enhanced"] != cells["noise: noisy"]


@pytest.mark.parametrize("option", ["--attenuation-limit-db", "--mix"])
def test_an_attenuation_limit_or_a_mix_of_nothing_changes_nothing(clips, model, capsys, option):
    assert main([*arguments(clips, model), option, "0"]) == 0
    before, after = capsys.readouterr().out.splitlines()[4:6]
    assert [float(cell) for cell in before.strip("| ").split(" | ")[2:]] == pytest.approx(
        [float(cell) for cell in after.strip("| ").split(" | ")[2:]], abs=0.05
    )


def test_the_recordings_are_never_written_over(clips, model, capsys):
    assert main([*arguments(clips, model), "--enhanced-out", str(clips / "noisy")]) == 2
    assert "written over" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("000_snr-5", ["noise", "noise, -5 dB"]),
        ("001_snr15_rev", ["noise+reverb"]),
        ("002_clean", ["clean"]),
        ("meeting", ["noise"]),
    ],
)
def test_names_tell_the_condition(name, expected):
    assert conditions(name) == expected


def test_conditions_are_ordered_and_averaged():
    names = ["a_snr10", "b_snr-5", "c_clean", "d_rev", "e_snr10"]
    scores = [(Scores(n, 0, 0, 0, 0), Scores(n + 0.5, 0, 0, math.nan, 0)) for n in range(1, 6)]
    rows = [line.strip("| ").split(" | ") for line in table(names, scores).splitlines()[2:]]
    assert [row[0] for row in rows[::2]] == [
        f"{condition}: noisy"
        for condition in ("noise", "noise+reverb", "clean", "noise, -5 dB", "noise, 10 dB")
    ]
    assert rows[0][1:3] == ["3", f"{(1 + 2 + 5) / 3:.3f}"]
    assert rows[9][1:3] == ["2", "3.500"]


def test_evaluation_needs_no_training_framework():
    """It must run where only the service and the measures are installed."""
    code = "import sys, percepnet.training.evaluate; print({'torch', 'onnx', 'pesq'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
