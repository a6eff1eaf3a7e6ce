"""The README's examples do what it says, against a real server with the bundled model."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import soundfile
from running import running

from percepnet.cli import main
from percepnet.stream import bundled_enhancer
from percepnet.synthesis import Controls

ROOT = Path(__file__).parents[1]

NOT_RUN = {
    "make": "installs, or runs this test",
    ". .venv": "the tests have their environment",
    ".venv/bin/pip": "installs",
    "docker": "needs Docker; `make image` takes the steps without",
    "kubectl apply": "needs a cluster; tests/deploy holds the manifests against schemas and code",
    "percepnet bench": "measures for minutes",
    "percepnet prepare": "takes hours, as do the next; tests/training has small ones",
    "percepnet train": "",
    "percepnet export": "",
    "percepnet evaluate": "",
}
"""Commands, by how they begin, and why they are left out."""


def examples(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = [line.strip() for block in examples("sh") for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


RUN = [line for line in commands() if not line.startswith(tuple(NOT_RUN))]


@pytest.fixture(scope="module")
def places() -> Iterator[dict[str, str]]:
    """Where a started server listens, by the address that the README has for it."""
    with running(bundled_enhancer()) as server:
        host, port = server.servers[0].sockets[0].getsockname()
        yield {"localhost:8080": f"{host}:{port}", "localhost:50051": f"{host}:{server.grpc.port}"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with what the examples read, which is there in the repository; shorter here."""
    folder = tmp_path_factory.mktemp("readme")
    samples, rate = soundfile.read(ROOT / "tests" / "data" / "noisy.wav", stop=48_000)
    (folder / "tests" / "data").mkdir(parents=True)
    soundfile.write(folder / "tests" / "data" / "noisy.wav", samples, rate)
    return folder


def in_place(text: str, places: dict[str, str]) -> str:
    for told, real in places.items():
        text = text.replace(told, real)
    return text


def test_there_are_examples_of_all_kinds() -> None:
    assert len(examples("python")) >= 3
    for beginning in ("curl", "percepnet enhance", "percepnet stream"):
        assert any(line.startswith(beginning) for line in RUN)
    assert all(any(line.startswith(beginning) for line in commands()) for beginning in NOT_RUN)


@pytest.mark.parametrize("name", [field.name for field in fields(Controls)])
def test_the_default_of_each_control_is_told(name: str) -> None:
    """In the README's table and in the proto."""
    default = f"{getattr(Controls(), name):g}"
    readme, proto = (
        (ROOT / file).read_text() for file in ("README.md", "protos/percepnet_service/v1/enhancement.proto")
    )
    assert re.search(rf"^\| `{name}` \|.*\| {default} \|$", readme, re.MULTILINE)
    (comment,) = re.findall(rf"((?:^ *//.*\n)+) *optional float {name} =", proto, re.MULTILINE)
    assert f"Default {default}." in comment


@pytest.mark.filterwarnings("ignore:'audioop' is deprecated")  # Pipecat imports it
@pytest.mark.parametrize("example", examples("python"))
def test_python_examples_run(example, places, folder, monkeypatch):
    for framework in re.findall(r"^from (livekit|pipecat)\b", example, re.MULTILINE):
        pytest.importorskip(framework)
    monkeypatch.chdir(folder)
    exec(compile(in_place(example, places), "README.md", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("line", RUN)
def test_commands_run(line, places, folder, monkeypatch):
    monkeypatch.chdir(folder)
    words = shlex.split(in_place(line, places), comments=True)
    if words[0] == "percepnet":
        assert main([*words[1:], *(["--force"] if words[1] in ("enhance", "stream") else [])]) == 0
    elif shutil.which(words[0]) is None:
        pytest.skip(f"{words[0]} is not installed")
    else:
        subprocess.run(words, check=True, capture_output=True, timeout=60)
    if words[-1] == "clean.wav":
        assert soundfile.info("clean.wav").frames == soundfile.info("tests/data/noisy.wav").frames
