"""The command line: files in, files out, one line for each, and no traceback for a user's mistake."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import export_random_model

from percepnet import cli
from percepnet.cli import main
from percepnet.errors import reason


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a small random model."""
    directory = tmp_path_factory.mktemp("model")
    return str(export_random_model(directory, fc=32, conv=64, gru=64, strength_gru=32))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(path: Path, rate: int = 16_000, channels: int = 1, subtype: str | None = None) -> bytes:
    """Write a short noisy file; returns its bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = 0.1 * np.random.default_rng(0).standard_normal((rate // 10 + 3, channels))
    container = {".opus": "OGG", ".mp3": "MP3"}.get(path.suffix)
    soundfile.write(path, samples, rate, subtype, format=container)
    return path.read_bytes()


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("name", "rate", "channels", "subtype"),
    [
        ("a.wav", 44_100, 2, "PCM_24"),
        ("a.WAV", 8_000, 1, "PCM_U8"),
        ("a.flac", 16_000, 3, "PCM_16"),
        ("a.ogg", 22_050, 1, "VORBIS"),
        ("a.opus", 48_000, 2, "OPUS"),
    ],
)
def test_a_file_keeps_rate_channels_length_and_depth(folder, model, capsys, name, rate, channels, subtype):
    put(folder / name, rate, channels, subtype)
    assert main(["enhance", name, f"out{Path(name).suffix}", "--model", model]) == 0
    before, after = soundfile.info(name), soundfile.info(f"out{Path(name).suffix}")
    for key in ("samplerate", "channels", "frames", "subtype"):
        assert getattr(before, key) == getattr(after, key)
    output = capsys.readouterr()
    assert output.out.count("\n") == 1
    assert f"{name} → out" in output.out
    assert f"{rate} Hz" in output.out
    assert "× real time" in output.out


def test_folders_keep_their_names_and_an_output_folder_inside_is_not_read_again(folder, model):
    put(folder / "in" / "a.wav")
    put(folder / "in" / "deep" / "b.flac")
    put(folder / "in" / "c.mp3")
    (folder / "in" / "notes.txt").write_text("no audio")
    for _ in range(2):
        assert main(["enhance", "in", "in/out", "--force", "--model", model]) == 0
        assert files(folder / "in" / "out") == {"a.wav", "deep/b.flac", "c.wav"}


def test_patterns_and_several_files_go_into_a_folder(folder, model):
    for name in ("a1.wav", "a2.wav", "b.flac"):
        put(folder / name)
    assert main(["enhance", "a*.wav", "b.flac", "out", "--model", model]) == 0
    assert files(folder / "out") == {"a1.wav", "a2.wav", "b.flac"}


def test_a_pattern_goes_into_a_folder_though_it_matches_one_file(folder, model):
    put(folder / "a1.wav")
    assert main(["enhance", "a*.wav", "out", "--model", model]) == 0
    assert files(folder / "out") == {"a1.wav"}


def test_an_output_folder_may_hold_the_input_folder(folder, model):
    put(folder / "out" / "in" / "a.wav")
    assert main(["enhance", "out/in", "out", "--model", model]) == 0
    assert files(folder / "out") == {"a.wav", "in/a.wav"}


@pytest.mark.parametrize("out", ["out/", "there"])
def test_one_file_goes_into_a_folder_that_is_there_or_is_named_so(folder, model, out):
    put(folder / "a.wav")
    (folder / "there").mkdir()
    assert main(["enhance", "a.wav", out, "--model", model]) == 0
    assert (folder / out / "a.wav").exists()


def test_the_format_can_be_chosen(folder, model):
    put(folder / "in" / "a.wav")
    assert main(["enhance", "in", "out", "--format", "flac", "--model", model]) == 0
    assert soundfile.info("out/a.flac").format == "FLAC"


def test_an_existing_file_is_replaced_only_by_force(folder, model, capsys):
    put(folder / "a.wav")
    before = put(folder / "out.wav", 8_000)
    assert main(["enhance", "a.wav", "out.wav", "--model", model]) == 1
    assert (folder / "out.wav").read_bytes() == before
    assert "--force" in capsys.readouterr().err
    assert main(["enhance", "a.wav", "out.wav", "--force", "--model", model]) == 0
    assert soundfile.info("out.wav").samplerate == 16_000


@pytest.mark.parametrize("out", ["a.wav", "link.wav", "."])
def test_a_recording_is_never_replaced_by_its_own_output(folder, model, capsys, out):
    before = put(folder / "a.wav")
    (folder / "link.wav").symlink_to("a.wav")
    assert main(["enhance", "a.wav", out, "--force", "--model", model]) == 1
    assert (folder / "a.wav").read_bytes() == before
    assert files(folder) == {"a.wav", "link.wav"}
    assert "the recording itself" in capsys.readouterr().err


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
@pytest.mark.parametrize("name", ["blåbär".encode(), b"bl\xe5"])
def test_a_name_that_cannot_be_printed_is_written_and_told_with_escapes(folder, model, locale, name):
    put(folder / "a.wav")
    os.rename("a.wav", name + b".wav")
    python = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [
        sys.executable,
        "-m",
        "percepnet.cli",
        "enhance",
        name + b".wav",
        name + b"-out/",
        "--model",
        model,
    ]
    result = subprocess.run(
        command, env={**os.environ, "LC_ALL": locale, **python}, capture_output=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout.count(b"\n") == 1
    assert os.listdir(name + b"-out") == [name + b".wav"]


def test_a_bad_file_is_named_and_the_others_are_done(folder, model, capsys):
    put(folder / "in" / "a.wav")
    (folder / "in" / "bad.wav").write_bytes(b"no audio")
    put(folder / "in" / "c.wav")
    assert main(["enhance", "in", "out", "--model", model]) == 1
    assert files(folder / "out") == {"a.wav", "c.wav"}
    output = capsys.readouterr()
    assert output.out.count("→") == 2
    assert "in/bad.wav: the file is not audio" in output.err
    assert "Traceback" not in output.err


def test_controls_reach_the_enhancer(folder):
    """All dry gives the input back; the others differ from each other, with a model that knows noise."""
    soundfile.write("a.wav", 0.1 * np.random.default_rng(0).standard_normal(44_100), 44_100)
    results = []
    for options in (["--mix", "0"], [], ["--postfilter", "0"], ["--attenuation-limit-db", "6"]):
        assert main(["enhance", "a.wav", "out.wav", "--force", *options]) == 0
        results.append(soundfile.read("out.wav")[0])
    original = soundfile.read("a.wav")[0]
    middle = slice(100, -100)
    # White noise loses what the way to 48 kHz and back cannot keep: the top tenth of its band.
    assert np.corrcoef(results[0][middle], original[middle])[0, 1] > 0.95
    for one in range(len(results)):
        for other in range(one):
            assert np.abs(results[one] - results[other]).max() > 1e-4


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["a.wav", "out.wav", "--mix", "2"], 2, "mix: 2; accepted are 0 to 1"),
        (["a.wav", "out.wav", "--mix", "nan"], 2, "mix: nan"),
        (
            ["a.wav", "out.wav", "--attenuation-limit-db=-3"],
            2,
            "attenuation_limit_db: -3; accepted are 0 to 100",
        ),
        (["a.wav", "out.wav", "--postfilter", "2"], 2, "postfilter: 2; accepted are 0 to 1"),
        (["a.wav", "b.wav", "out.wav"], 2, "need a folder as OUT"),
        (["a.wav", ""], 2, "IN or OUT is empty"),
        (["a.wav", "", "out"], 2, "IN or OUT is empty"),
        (["none*.wav", "out"], 2, "nothing matches none*.wav"),
        (["empty", "out"], 2, "empty holds no audio files"),
        (["deep", "./deep/"], 2, "deep is both IN and OUT; choose another folder"),
        (["a.wav", "deep/a.wav", "out"], 2, "a.wav and deep/a.wav would both be written to out/a.wav"),
        (["a.wav", "out.mp3"], 1, "suffix is '.mp3'"),
        (["a.wav", "out"], 1, "suffix is ''"),
        (["none.wav", "out.wav"], 1, "percepnet: none.wav: No such file or directory"),
        (["a.wav", "out.wav", "--model", "none.onnx"], 1, "there is no model none.onnx"),
    ],
)
def test_mistakes_are_told_in_one_line(folder, model, capsys, arguments, status, message):
    for name in ("a.wav", "b.wav", "deep/a.wav"):
        put(folder / name)
    (folder / "empty").mkdir()
    before = files(folder)
    choice = [] if "--model" in arguments else ["--model", model]
    assert main(["enhance", *arguments, *choice]) == status
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.count("\n") == 1
    assert output.out == ""
    assert files(folder) == before


def test_an_error_of_the_system_names_its_file_if_there_is_one():
    assert reason(OSError(22, "Invalid argument")) == "Invalid argument"
    assert reason(FileNotFoundError(2, "No such file", "a.wav")) == "a.wav: No such file"


@pytest.mark.parametrize(
    "arguments", [[], ["nothing"], ["enhance"], ["enhance", "a", "b", "--mix", "x"], ["--", "info"]]
)
def test_a_command_line_that_makes_no_sense_shows_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: percepnet" in capsys.readouterr().err


def test_the_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)


def test_an_interruption_leaves_no_output(folder, model, capsys, monkeypatch):
    put(folder / "a.wav")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("percepnet.stream.AudioWriter.write", interrupt)
    assert main(["enhance", "a.wav", "out.wav", "--model", model]) == 130
    assert files(folder) == {"a.wav"}
    assert "interrupted" in capsys.readouterr().err


def test_sigterm_leaves_no_output(folder, model, monkeypatch):
    put(folder / "a.wav")
    handler = signal.getsignal(signal.SIGTERM)

    def terminate(*_: object) -> None:
        assert files(folder) > {"a.wav"}  # the output has begun
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("percepnet.stream.AudioWriter.write", terminate)
    with pytest.raises(SystemExit) as ended:
        main(["enhance", "a.wav", "out.wav", "--model", model])
    assert ended.value.code == 143
    assert files(folder) == {"a.wav"}
    assert signal.getsignal(signal.SIGTERM) is handler


def test_info_shows_model_delay_and_path(model, capsys):
    assert main(["info", "--model", model]) == 0
    text = capsys.readouterr().out
    for words in (
        "random 0",
        "Apache-2.0",
        "30.0 ms at 48 kHz",
        "33.2 ms at 16 kHz",
        "int8",
        "signal path",
        "onnxruntime",
    ):
        assert words in text


def test_a_command_of_another_module_gets_its_arguments(tmp_path, monkeypatch):
    (tmp_path / "other_command.py").write_text(
        "def add_arguments(parser): parser.add_argument('--number', type=int)\n"
        "def run(arguments): return arguments.number\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.COMMANDS, "bench", cli.Command("other", "other_command"))
    assert main(["bench", "--number", "7"]) == 7


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import missing_package", "`percepnet train` needs the module 'missing_package': pip install"),
        (None, "this installation has no `percepnet train`"),
    ],
)
def test_a_missing_extra_is_named(tmp_path, monkeypatch, capsys, code, message):
    if code is not None:
        (tmp_path / "needy_command.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.COMMANDS, "train", cli.Command("train", "needy_command", "train"))
    assert main(["train"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert ("pip install -e '.[train]' in this project's folder" in error) == (code is not None)


def test_enhancing_imports_neither_the_training_nor_the_service(folder, model):
    put(folder / "a.wav")
    script = (
        "import sys; from percepnet.cli import main; status = main(sys.argv[1:]);"
        "heavy = {'torch', 'onnx', 'fastapi', 'uvicorn', 'grpc', 'matplotlib'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    command = [sys.executable, "-c", script, "enhance", "a.wav", "out.wav", "--model", model]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
