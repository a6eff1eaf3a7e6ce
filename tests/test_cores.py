"""Which cores the process uses: cpusets and the quotas of both versions of cgroups."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from service import cores


def system(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    """A root folder with the files that Linux shows of a process' cgroup."""
    for name, text in {"proc/self/cgroup": cgroup, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        pytest.param("0::/\n", {"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5, id="version 2"),
        pytest.param("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, math.inf, id="version 2, no limit"),
        pytest.param(
            "0::/pods/one\n",
            {
                "sys/fs/cgroup/pods/one/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/pods/cpu.max": "300000 100000",
            },
            3.0,
            id="the group around it is narrower",
        ),
        pytest.param(
            "4:memory:/x\n2:cpu,cpuacct:/on/the/host\n",
            {
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            0.5,
            id="version 1 in a container",
        ),
        pytest.param(
            "2:cpu:/\n",
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"},
            math.inf,
            id="version 1, no limit",
        ),
        pytest.param("0::/\n", {}, math.inf, id="nothing to read"),
        pytest.param("0::/\n", {"sys/fs/cgroup/cpu.max": "garbage"}, math.inf, id="nothing to understand"),
    ],
)
def test_the_quota_is_the_narrowest_of_the_cgroups(
    tmp_path: Path, cgroup: str, files: dict[str, str], expected: float
) -> None:
    assert cores.quota(system(tmp_path, cgroup, files)) == expected


def test_there_are_no_more_workers_than_cores_or_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "usable", lambda: [2, 3, 5, 7])
    for quota, expected in ((math.inf, 4), (8.0, 4), (2.5, 3), (0.25, 1)):
        monkeypatch.setattr(cores, "quota", lambda quota=quota: quota)
        assert cores.count() == expected


@pytest.mark.parametrize(
    ("cpus", "quota", "n_processes", "expected"),
    [(1, math.inf, 1, 1.0), (1, math.inf, 2, 0.5), (4, math.inf, 2, 2.0), (4, 1.5, 2, 0.75), (1, 8, 4, 0.25)],
)
def test_processes_share_the_cores_or_the_quota(
    monkeypatch: pytest.MonkeyPatch, cpus: int, quota: float, n_processes: int, expected: float
) -> None:
    monkeypatch.setattr(cores, "usable", lambda: list(range(cpus)))
    monkeypatch.setattr(cores, "quota", lambda: quota)
    assert cores.share(n_processes) == expected


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system pins no processes")
def test_a_worker_for_each_core_is_pinned_and_others_are_not() -> None:
    code = "from service import cores; cpus = cores.usable(); print(cpus, cores.pin(1, {}), cores.usable())"
    for n_workers, pinned in (("len(cpus)", True), ("len(cpus) - 1", False)):
        done = subprocess.run(
            [sys.executable, "-c", code.format(n_workers)], capture_output=True, text=True, check=True
        )
        before, told, after = done.stdout.strip().partition(" True " if pinned else " False ")
        cpus = [int(cpu) for cpu in before.strip("[]").split(",")]
        expected = [cpus[1 % len(cpus)]] if pinned else cpus
        assert told
        assert after == str(expected)


def test_where_nothing_can_be_pinned_a_worker_runs_unpinned(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(cores, "usable", lambda: [0])
    monkeypatch.setattr(os, "sched_setaffinity", refuse, raising=False)
    assert not cores.pin(0, 1)
    assert not cores.pin(0, 1)
    assert "Operation not permitted" in caplog.text
