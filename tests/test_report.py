"""Files are paired by name, read together or refused, and worked on in order."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import soundfile

from percepnet.errors import AudioError, ParameterError
from percepnet.report import Pair, count, each, machine, make_folder, markdown, pairs, read_together


def write(path: Path, n: int = 100, rate: int = 16_000, channels: int = 1) -> Path:
    path.parent.mkdir(exist_ok=True)
    soundfile.write(path, np.full((n, channels), 0.25), rate)
    return path


def test_two_files_are_a_pair(tmp_path):
    clean, noisy = write(tmp_path / "speech.wav"), write(tmp_path / "recording.flac")
    assert pairs(clean, noisy) == [Pair("recording", clean, noisy)]


def test_folders_are_paired_by_name_without_the_suffix(tmp_path):
    for name in ("b.wav", "a.flac", "unused.wav"):
        write(tmp_path / "clean" / name)
    for name in ("a.wav", "b.wav"):
        write(tmp_path / "noisy" / name)
    (tmp_path / "noisy" / "index.csv").touch()
    found = pairs(tmp_path / "clean", tmp_path / "noisy")
    assert [(p.name, p.clean.name, p.noisy.name) for p in found] == [
        ("a", "a.flac", "a.wav"),
        ("b", "b.wav", "b.wav"),
    ]


def test_partners_that_are_missing_are_named(tmp_path):
    clean = write(tmp_path / "clean" / "a.wav")
    noisy = write(tmp_path / "noisy" / "other.wav")
    with pytest.raises(ParameterError, match=r"1 of 1 files .* other"):
        pairs(clean.parent, noisy.parent)
    with pytest.raises(ParameterError, match="two files or two folders"):
        pairs(clean.parent, noisy)
    with pytest.raises(ParameterError, match=r"absent\.wav is no file"):
        pairs(clean, tmp_path / "absent.wav")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ParameterError, match="holds no audio files"):
        pairs(clean.parent, tmp_path / "empty")


def test_files_that_belong_together_have_one_shape(tmp_path):
    a = write(tmp_path / "a.wav")
    signals, rate = read_together(a, write(tmp_path / "b.flac"))
    assert [signal.shape for signal in signals] == [(100,), (100,)]
    assert signals[0].dtype == np.float32
    assert rate == 16_000
    for other in (write(tmp_path / "longer.wav", n=101), write(tmp_path / "faster.wav", rate=48_000)):
        with pytest.raises(ParameterError, match=f"a.wav: 100 samples at 16000 Hz; .*{other.name}"):
            read_together(a, other)
    with pytest.raises(ParameterError, match=r"stereo\.wav has 2 channels"):
        read_together(write(tmp_path / "stereo.wav", channels=2))


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "damaged.wav"
    path.write_bytes(b"RIFF")
    with pytest.raises(AudioError, match=r"damaged\.wav: "):
        read_together(path)


def test_recordings_are_never_written_over(tmp_path):
    make_folder(tmp_path / "new" / "folder", apart_from=[tmp_path])
    assert (tmp_path / "new" / "folder").is_dir()
    with pytest.raises(ParameterError, match="written over"):
        make_folder(tmp_path / "new" / "..", apart_from=[tmp_path])


@pytest.mark.parametrize("jobs", [1, 2])
def test_work_keeps_its_order(jobs):
    assert list(each(abs, [-3, 2, -1], jobs)) == [3, 2, 1]


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", ""])
def test_counts_are_whole_numbers_from_1_up(text):
    assert count("12") == 12
    with pytest.raises(argparse.ArgumentTypeError, match="whole numbers from 1 up"):
        count(text)


def test_tables_are_markdown():
    assert markdown(["who", "dB"], [["a", "1"]]) == "| who | dB |\n| --- | ---: |\n| a | 1 |"


def test_the_machine_is_named_with_its_versions():
    for word in ("cores", "Python 3", f"numpy {np.__version__}", "onnxruntime"):
        assert word in machine()
