"""Reads the part of the Dockerfile language that this project uses, and refuses the rest."""

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
IGNORE_FILE = ROOT / "deploy" / "Dockerfile.dockerignore"


@dataclass(frozen=True)
class Copy:
    """`COPY`: from the context, or from an earlier stage."""

    stage: str | None
    sources: list[str]
    target: str


@dataclass(frozen=True)
class Run:
    """`RUN` in the shell, and the cache folders mounted for it."""

    command: str
    caches: list[str]


@dataclass
class Stage:
    """One `FROM` and what follows: the steps in their order, the rest as it is at the end."""

    base: str
    name: str
    steps: list[Copy | Run] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    folder: str = "/"
    user: str = "0"
    ports: list[int] = field(default_factory=list)
    stop_signal: str = "SIGTERM"
    health_check: list[str] = field(default_factory=list)
    entry_point: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)


def parse(text: str) -> list[Stage]:
    """The stages of a Dockerfile; raises ValueError for what is not understood."""
    stages: list[Stage] = []
    arguments: dict[str, str] = {}
    for line in _logical_lines(text):
        instruction, _, rest = line.partition(" ")
        rest = rest.strip()
        if instruction == "ARG":
            name, _, value = rest.partition("=")
            arguments[name] = value
        elif instruction == "FROM":
            base, _, name = Template(rest).substitute(arguments).partition(" AS ")
            stages.append(Stage(base, name or str(len(stages))))
        elif stages:
            _apply(stages[-1], instruction, rest, arguments)
        else:
            raise ValueError(f"{instruction} before the first FROM")
    return stages


def ignored(text: str) -> tuple[list[str], list[str]]:
    """What an ignore file of the form `*`, `!NAME`…, `**/NAME`… lets in, and what it still leaves out."""
    first, *lines = (line for line in text.splitlines() if line and not line.startswith("#"))
    kept = [line[1:] for line in lines if line.startswith("!")]
    left_out = [line.removeprefix("**/") for line in lines if line.startswith("**/")]
    if first != "*" or len(kept) + len(left_out) != len(lines):
        raise ValueError("an ignore file here is *, then !NAME and **/NAME")
    return kept, left_out


def _apply(stage: Stage, instruction: str, rest: str, arguments: dict[str, str]) -> None:
    match instruction:
        case "RUN":
            options, command = _options(rest)
            caches = [re.fullmatch(r"--mount=type=cache,target=(\S+)", option) for option in options]
            if not all(caches):
                raise ValueError(f"RUN {options}")
            stage.steps.append(
                Run(f"cd {stage.folder} && {command}", [cache[1] for cache in caches if cache])
            )
        case "COPY":
            options, paths = _options(rest)
            *sources, target = shlex.split(paths)
            if any(not option.startswith("--from=") for option in options):
                raise ValueError(f"COPY {options}")
            origin = options[0].removeprefix("--from=") if options else None
            stage.steps.append(Copy(origin, sources, str(Path(stage.folder) / target)))
        case "ENV" | "LABEL":
            pairs = (word.partition("=") for word in shlex.split(Template(rest).substitute(arguments)))
            known = stage.environment if instruction == "ENV" else stage.labels
            known.update({name: value for name, _, value in pairs})
        case "WORKDIR":
            stage.folder = rest
        case "USER":
            stage.user = rest
        case "EXPOSE":
            stage.ports += [int(port) for port in rest.split()]
        case "STOPSIGNAL":
            stage.stop_signal = rest
        case "HEALTHCHECK":
            stage.health_check = json.loads(rest.partition("CMD ")[2])
        case "ENTRYPOINT":
            stage.entry_point = json.loads(rest)
        case "CMD":
            stage.command = json.loads(rest)
        case _:
            raise ValueError(f"{instruction} is not understood")


def _options(rest: str) -> tuple[list[str], str]:
    options = []
    while rest.startswith("--"):
        option, _, rest = rest.partition(" ")
        options.append(option)
        rest = rest.lstrip()
    return options, rest


def _logical_lines(text: str) -> list[str]:
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return re.sub(r"\\\n", "", "\n".join(lines)).splitlines()
