"""The autoscaler's numbers follow from the calculation, and the simulated day behaves as Kubernetes would."""

import importlib.util
import sys

import pytest
from manifests import DEPLOY, OVERLAYS, behavior, only, overlay, settings_map

from service.settings import Settings

spec = importlib.util.spec_from_file_location("sizing", DEPLOY / "sizing.py")
assert spec is not None
assert spec.loader is not None
sizing = importlib.util.module_from_spec(spec)
sys.modules["sizing"] = sizing
spec.loader.exec_module(sizing)

HOUR = 3600


class Steady(sizing.Day):
    """Calls that come at the same rate all day."""

    def rate(self, second: int) -> float:
        return self.peak / self.mean_seconds


def test_the_manifests_aim_at_what_the_formula_gives() -> None:
    aim = sizing.target(sizing.capacity())
    hpa = only(overlay("autoscaling/hpa"), "HorizontalPodAutoscaler")["spec"]
    assert hpa["metrics"][0]["pods"]["target"]["averageValue"] == str(aim)


def test_the_capacity_is_the_one_that_pods_admit() -> None:
    for name in OVERLAYS:
        assert Settings.load(settings_map(overlay(name)), {}).max_streams == sizing.capacity()


def test_the_simulated_autoscaler_is_the_one_of_the_manifests() -> None:
    objects = overlay("autoscaling/hpa")
    hpa, scaling = only(objects, "HorizontalPodAutoscaler")["spec"], sizing.Scaling(21)
    assert (hpa["minReplicas"], hpa["maxReplicas"]) == (scaling.minimum, scaling.maximum)

    def policies(direction: str) -> list[tuple[str, int, int]]:
        listed = behavior(objects)[direction]["policies"]
        return [(policy["type"], policy["value"], policy["periodSeconds"]) for policy in listed]

    assert policies("scaleUp") == [
        ("Percent", scaling.up_ratio * 100, scaling.up_period),
        ("Pods", scaling.up_pods, scaling.up_period),
    ]
    assert policies("scaleDown") == [
        ("Percent", scaling.down_ratio * 100, scaling.down_period),
        ("Pods", scaling.down_pods, scaling.down_period),
    ]
    windows = [behavior(objects)[way]["stabilizationWindowSeconds"] for way in ("scaleUp", "scaleDown")]
    assert windows == [0, scaling.down_window]


def test_full_pods_look_like_too_many_streams() -> None:
    """Within the tolerance an autoscaler does nothing: a target too near the capacity never grows."""
    n_streams = sizing.capacity()
    tolerance = sizing.Scaling(1).tolerance
    assert sizing.target(n_streams) * (1 + tolerance) < n_streams
    crowd = Steady(10 * n_streams, 180.0)
    stuck = sizing.simulate(crowd, sizing.Scaling(n_streams - 1), n_streams, seconds=HOUR)
    assert max(stuck.pods) == sizing.Scaling(1).minimum
    assert stuck.rejected > stuck.calls / 2


def test_a_steady_load_gets_its_pods_and_refuses_nobody_after_the_start() -> None:
    scaling = sizing.Scaling(21)
    done = sizing.simulate(Steady(210, 180.0), scaling, 32, seconds=2 * HOUR)
    (usual, _), *_ = done.pods.most_common()
    assert usual == pytest.approx(11, abs=2)
    assert done.calls == pytest.approx(210 / 180 * 2 * HOUR, rel=0.05)
    assert done.rejected < done.calls * 0.05  # before the first pods came
    assert 0.4 < done.utilization(32) < 0.75


def test_fewer_calls_are_on_the_emptiest_pod() -> None:
    day = sizing.Day(200, 180.0)
    any_pod, emptiest = (
        sizing.simulate(day, sizing.Scaling(21), 32, choice=choice, seconds=14 * HOUR)
        for choice in (sizing.any_pod, sizing.emptiest)
    )
    assert 0 < emptiest.drained < any_pod.drained


def test_calls_end_within_the_grace_or_are_cut() -> None:
    day = sizing.Day(200, 180.0)
    hasty, patient = (
        sizing.simulate(day, sizing.Scaling(21), 32, grace=grace, seconds=14 * HOUR) for grace in (1.0, 1e9)
    )
    assert hasty.drained >= hasty.cut > 0.9 * hasty.drained
    assert patient.cut == 0


@pytest.mark.parametrize(
    ("option", "value", "least"), [("--peak", "0", 1), ("--capacity", "1", 2), ("--capacity", "-3", 2)]
)
def test_sizes_that_cannot_be_meant_are_told_in_one_line(monkeypatch, capsys, option, value, least) -> None:
    monkeypatch.setattr(sys, "argv", ["sizing.py", f"{option}={value}"])
    with pytest.raises(SystemExit) as ended:
        sizing.main()
    assert ended.value.code == 2
    expected = f"argument {option}: '{value}'; accepted is a whole number from {least} up\n"
    assert capsys.readouterr().err.endswith(expected)


def test_the_guide_shows_what_the_command_prints() -> None:
    """One row: all of them would take half a minute."""
    capacity = sizing.capacity()
    aim = sizing.target(capacity)
    done = sizing.simulate(sizing.Day(600, 180.0), sizing.Scaling(aim), capacity)
    guide = (DEPLOY / "README.md").read_text()
    assert f"| telephone, 3 min | {aim} | {done.rejected / done.calls:.3%} |" in guide
    assert f"| {max(done.pods)} | {done.utilization(capacity):.0%} | {done.cut / done.calls:.3%} |" in guide
