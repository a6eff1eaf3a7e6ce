"""Which cores this process may use, and how much of them: cpusets and the cgroup's CPU quota."""

import math
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from service.logs import logger


def usable() -> list[int]:
    """The CPUs that this process may run on; a cpuset narrows them."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def quota(root: Path = Path("/")) -> float:
    """CPU seconds per second that the process' cgroups allow; infinite without a limit. root: for tests."""
    limits = [math.inf]
    for folder in _cgroup_folders(root):
        try:
            if (folder / "cpu.max").exists():  # version 2: "150000 100000", or "max 100000"
                time, period = (folder / "cpu.max").read_text().split()
            else:  # version 1: microseconds, −1 without a limit
                time = (folder / "cpu.cfs_quota_us").read_text()
                period = (folder / "cpu.cfs_period_us").read_text()
            limits.append(int(time) / int(period) if time != "max" and int(time) > 0 else math.inf)
        except (OSError, ValueError):  # not this version, no limit at this level, or not ours to read
            continue
    return min(limits)


def count() -> int:
    """Cores' worth of CPU time that the process may use, rounded up."""
    return max(1, min(len(usable()), math.ceil(min(quota(), 2**16))))


def share(n_processes: int) -> float:
    """Cores' worth of CPU time for each of so many processes, before they are pinned."""
    return min(quota(), len(usable())) / n_processes


def pin(worker: int, n_workers: int) -> bool:
    """Keep this process on a core of its own, if there is a worker for every usable core; tells whether.

    Otherwise the system spreads the workers: were they pinned, several services on one machine would all
    crowd its first cores.
    """
    cpus = usable()
    if n_workers < len(cpus) or not hasattr(os, "sched_setaffinity"):
        return False
    return _tried("pinned to cores", lambda: os.sched_setaffinity(0, {cpus[worker % len(cpus)]}))


def share_calmly() -> None:
    """Let threads that start from here on finish what they are at before one that wakes takes the core.

    gRPC's own threads wake for each packet. Each would interrupt the engine three times over, 6,000 times a
    second with 24 streams; as batch work (sched(7)) they wait until it rests.
    """
    _schedule("SCHED_BATCH")


def go_first() -> None:
    """Let this thread take the core as soon as it wakes, before threads that share calmly."""
    _schedule("SCHED_OTHER")


def stand_back() -> None:
    """Let this thread have the core only while no other one wants it."""
    _schedule("SCHED_IDLE")


def _schedule(policy: str) -> None:
    if hasattr(os, "sched_setscheduler"):
        setting = getattr(os, policy), os.sched_param(0)
        _tried("given other classes of scheduling", lambda: os.sched_setscheduler(0, *setting))


def _tried(what: str, change: Callable[[], None]) -> bool:
    """Whether the system took a change; some sandboxes (gVisor) do not, and the service runs without it."""
    try:
        change()
    except OSError as error:
        _miss(what, error.strerror)
        return False
    return True


@lru_cache
def _miss(what: str, reason: str) -> None:
    """Told once."""
    logger.warning("threads cannot be %s here, answers may come later: %s", what, reason)


def _cgroup_folders(root: Path) -> list[Path]:
    """Where the limits of this process may stand: its cgroup of both versions, and those around it."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        inner = mount / path.lstrip("/")
        # In a container the path may be that of the host, which is not visible: the mount is then its own.
        folders += [folder for folder in (inner, *inner.parents) if folder.is_relative_to(mount)]
    return folders
