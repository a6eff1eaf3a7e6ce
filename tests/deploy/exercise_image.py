"""Takes the steps of deploy/Dockerfile without Docker, then uses the result as a container would be used.

It needs bubblewrap. This machine stands in for the base image: its system folders are seen read-only, this
interpreter at /usr/local, where the official images have theirs. A stage is a folder that holds nothing else
than what its steps put there. The last one is mounted read-only, and `inside_image.py` runs in it as the
image's user, with no capability, no network but its own loopback and nothing writable but /tmp.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from dockerfile import DOCKERFILE, IGNORE_FILE, ROOT, Copy, Run, Stage, ignored, parse

LIMIT_MB = 400
BASE_MB = 140
"""Allowed for the base image, whose size cannot be measured here."""

SYSTEM = ("bin", "etc", "lib", "lib32", "lib64", "libx32", "sbin", "usr")
AUDIO = ROOT / "tests" / "data" / "noisy.wav"


def main() -> int:
    """Build, measure, use; returns the exit status."""
    stages = parse(DOCKERFILE.read_text())
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if shutil.which("bwrap") is None:
        return refuse("bubblewrap (bwrap) is needed")
    if {stage.base.removesuffix("-slim") for stage in stages} != {f"python:{version}"}:
        return refuse(f"the image has another Python than {version}")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)  # the image's user must get in
        roots: dict[str, Path] = {}
        for stage in stages:
            roots[stage.name] = Path(folder) / stage.name
            build(stage, roots)
        image = roots[stages[-1].name]
        megabytes = size(image) / 1e6
        print(f"the image is {megabytes:.0f} MB, and its base", flush=True)
        if megabytes > LIMIT_MB - BASE_MB:
            return refuse(f"{LIMIT_MB - BASE_MB} MB were allowed")
        return use(stages[-1], image)


def refuse(reason: str) -> int:
    """Say why nothing is shown."""
    print(f"exercise_image: {reason}", file=sys.stderr)
    return 1


def build(stage: Stage, roots: dict[str, Path]) -> None:
    """Take the steps of a stage."""
    roots[stage.name].mkdir()
    for step in stage.steps:
        if isinstance(step, Copy):
            copy(step, roots[stage.name], roots)
        else:
            run(step, stage, roots[stage.name])


def copy(step: Copy, root: Path, roots: dict[str, Path]) -> None:
    """Take a COPY step; of the context only what the ignore file lets in is there."""
    kept, left_out = ignored(IGNORE_FILE.read_text())
    target = root / step.target.lstrip("/")
    for source in step.sources:
        if step.stage is None and source not in kept:
            raise SystemExit(f"exercise_image: COPY {source}, which {IGNORE_FILE.name} leaves out")
        origin = ROOT / source if step.stage is None else roots[step.stage] / source.lstrip("/")
        if origin.is_dir():
            skip = shutil.ignore_patterns(*left_out) if step.stage is None else None
            shutil.copytree(origin, target, symlinks=True, dirs_exist_ok=True, ignore=skip)
        else:
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy2(origin, target)


def run(step: Run, stage: Stage, root: Path) -> None:
    """Take a RUN step, with this machine's network and its configuration of pip."""
    own = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    quiet = {"HOME": "/home", "PATH": "/usr/local/bin:/usr/bin:/bin", "PIP_QUIET": "1"}
    mounts = ["--bind", str(root), "/", *system(root)]
    # Where pip may be told to look for packages, and who tells it.
    for path in (*Path("/opt").iterdir(), Path.home() / ".config" / "pip"):
        target = Path("/opt", path.name) if path.parent == Path("/opt") else Path("/home/.config/pip")
        mount_point = root / target.relative_to("/")
        if path.is_dir() and not (mount_point.exists() and any(mount_point.iterdir())):
            mounts += ["--ro-bind", str(path), str(target)]
    for target_of_cache in step.caches:
        cache = Path.home() / ".cache" / "pip"
        cache.mkdir(parents=True, exist_ok=True)
        mounts += ["--bind", str(cache), target_of_cache]
    isolation = ["--unshare-pid", "--die-with-parent", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]
    command = ["bwrap", *mounts, *isolation, *variables(quiet | own | stage.environment)]
    if subprocess.run([*command, "--", "sh", "-ec", step.command]).returncode:
        raise SystemExit(f"exercise_image: this step failed: RUN {step.command}")


def use(stage: Stage, image: Path) -> int:
    """Run the checks of `inside_image.py` with the rights that the image's user has in a cluster."""
    uid, _, gid = stage.user.partition(":")
    for mounted in ("check", "tmp", "proc", "dev"):
        (image / mounted).mkdir()
    for file in (Path(__file__).with_name("inside_image.py"), AUDIO):
        shutil.copy2(file, image / "check")
    command = [
        "bwrap", "--ro-bind", str(image), "/", *system(image),
        "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp",
        "--unshare-all", "--uid", uid, "--gid", gid, "--cap-drop", "ALL", "--die-with-parent",
        *variables({"HOME": "/"} | stage.environment), "--",
        "python", "/check/inside_image.py",
        repr(stage.ports), repr(stage.health_check), repr(stage.entry_point + stage.command),
        stage.stop_signal,
    ]  # fmt: skip
    return subprocess.run(command).returncode


def system(root: Path) -> list[str]:
    """Mounts that put this machine's system folders and this Python into a stage."""
    mounts: list[str] = []
    for path in (Path("/") / name for name in SYSTEM):
        mount_point = root / path.name
        if path.is_symlink():
            if not mount_point.is_symlink():
                mount_point.symlink_to(os.readlink(path))
        elif path.is_dir():
            mount_point.mkdir(exist_ok=True)
            mounts += ["--ro-bind", str(path), str(path)]
    return [*mounts, "--ro-bind", sys.base_prefix, "/usr/local"]


def variables(environment: dict[str, str]) -> list[str]:
    """Options that make these the only variables, but for what leads this Python to its library."""
    environment = {"LD_LIBRARY_PATH": "/usr/local/lib"} | environment
    return ["--clearenv", *(part for item in environment.items() for part in ("--setenv", *item))]


def size(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*"))


if __name__ == "__main__":
    raise SystemExit(main())
