"""What the image promises can be read in its Dockerfile; `exercise_image.py` shows that it also works."""

import pytest
from dockerfile import DOCKERFILE, IGNORE_FILE, ROOT, Copy, Stage, ignored, parse

from service.settings import Settings

STAGES = parse(DOCKERFILE.read_text())
IMAGE = STAGES[-1]


def test_only_the_stage_that_builds_has_a_compiler() -> None:
    assert [stage.base for stage in STAGES] == ["python:3.11", "python:3.11-slim"]


def test_the_image_is_what_the_first_stage_built_and_nothing_more() -> None:
    assert IMAGE.steps == [Copy("build", ["/opt/percepnet"], "/opt/percepnet")]


def test_the_user_is_a_number_that_is_not_root() -> None:
    assert [int(number) >= 10_000 for number in IMAGE.user.split(":")] == [True, True]


def test_ports_and_signal_are_those_of_the_service() -> None:
    settings = Settings()
    assert IMAGE.ports == [settings.http_listen.port, settings.grpc_listen.port]
    assert IMAGE.stop_signal == "SIGTERM"
    assert IMAGE.entry_point + IMAGE.command == ["percepnet", "serve"]


def test_health_is_asked_with_what_is_in_the_image() -> None:
    assert IMAGE.health_check[0] == "python"
    assert f"':{IMAGE.ports[0]}'" in IMAGE.health_check[-1]
    assert "/healthz" in IMAGE.health_check[-1]


def test_labels_tell_title_licence_and_origin() -> None:
    names = ("title", "description", "licenses", "version", "revision")
    assert set(IMAGE.labels) == {f"org.opencontainers.image.{name}" for name in names}


def test_the_context_is_what_the_package_needs() -> None:
    kept, left_out = ignored(IGNORE_FILE.read_text())
    assert sorted(kept) == ["LICENSE", "README.md", "percepnet", "pyproject.toml", "service"]
    assert all((ROOT / name).exists() for name in kept)
    assert left_out == ["__pycache__", "*.so"]


@pytest.mark.parametrize("text", ["RUN true", "FROM a\nADD b c", "FROM a\nRUN --network=host b", "FROM ${A}"])
def test_what_is_not_understood_is_refused(text: str) -> None:
    with pytest.raises((ValueError, KeyError)):
        parse(text)


def test_continued_lines_and_comments_are_read() -> None:
    head = "ARG V=1\n# why\nFROM a:${V} AS b\nWORKDIR /c\n"
    (stage,) = parse(head + "RUN --mount=type=cache,target=/d \\\n  e && \\\n# f\n  g\n")
    assert stage == Stage("a:1", "b", steps=stage.steps, folder="/c")
    assert stage.steps[0].command.split() == ["cd", "/c", "&&", "e", "&&", "g"]
    assert stage.steps[0].caches == ["/d"]
