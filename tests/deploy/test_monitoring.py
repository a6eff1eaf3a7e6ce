"""Alerts fire when they should, and alerts, dashboard and autoscalers read metrics that are really told."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from manifests import DEPLOY, Object, only, overlay, texts
from prometheus_client.parser import text_string_to_metric_families

from percepnet.model import Model
from service.metrics import Metrics

ALERTS = yaml.safe_load((DEPLOY / "monitoring" / "alerts.yaml").read_text())["spec"]
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
DASHBOARD = json.loads((DEPLOY / "monitoring" / "dashboard.json").read_text())
TESTS = Path(__file__).with_name("alerts_test.yaml")

promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool, of Debian's package prometheus, is not installed"
)


@pytest.fixture(scope="module")
def told(random_model: Model) -> dict[str, set[str]]:
    """The labels of each series that the service tells."""
    metrics = Metrics(random_model)
    metrics.request_duration.labels("/enhance", 200).observe(1.0)
    series: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(metrics.render("")[0].decode()):
        for sample in family.samples:
            series.setdefault(sample.name, set()).update(sample.labels)
    return series


def expressions() -> Iterator[str]:
    """All queries of the deployment."""
    yield from (rule["expr"] for rule in RULES)
    for panel in DASHBOARD["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    values = (DEPLOY / "autoscaling" / "hpa" / "prometheus-adapter.values.yaml").read_text()
    yield yaml.safe_load(values)["rules"]["custom"][0]["seriesQuery"]
    yield only(overlay("autoscaling/keda"), "ScaledObject")["spec"]["triggers"][0]["metadata"]["query"]


@promtool
def test_alerts_fire_when_they_should_and_only_then(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(ALERTS))
    shutil.copy(TESTS, tmp_path)
    for command in (["check", "rules", "rules.yaml"], ["test", "rules", TESTS.name]):
        done = subprocess.run(
            ["promtool", *command], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested_and_explained() -> None:
    tested = yaml.safe_load(TESTS.read_text())["tests"]
    firing = {
        case["alertname"] for test in tested for case in test["alert_rule_test"] if case.get("exp_alerts")
    }
    guide = (DEPLOY / "README.md").read_text()
    explained = set(re.findall(r"`(PercepNet\w+)`", guide))
    assert firing == explained == {rule["alert"] for rule in RULES}


def test_queries_read_metrics_that_the_service_tells(told: dict[str, set[str]]) -> None:
    read = {name for query in expressions() for name in re.findall(r"\b(?:percepnet|process)_\w+", query)}
    assert len(read) > 20
    assert read - told.keys() == set()


def test_queries_choose_by_labels_that_the_metrics_have(told: dict[str, set[str]]) -> None:
    given_by_prometheus = {"namespace", "pod", "container"}
    for query in expressions():
        for name, selector in re.findall(r"\b(percepnet_\w+)\{([^}]*)\}", query):
            assert set(re.findall(r"(\w+)[=!]", selector)) <= told[name] | given_by_prometheus, query


def test_the_dashboard_shows_load_cost_latency_and_quality() -> None:
    shown = " ".join(texts(DASHBOARD["panels"]))
    for name in (
        "streams_active",
        "streams_capacity",
        "streams_rejected_total",
        "streams_resumed_total",
        "stream_cpu_ratio",
        "cpu_seconds_total",
        "stream_latency_seconds_bucket",
        "deadline_misses_total",
        "dry_frames_total",
        "queue_frames",
        "worker_restarts_total",
    ):
        assert f"percepnet_{name}" in shown


@promtool
def test_the_dashboards_queries_are_promql(tmp_path: Path) -> None:
    """As rules, because promtool checks those."""
    queries = [re.sub(r"\$namespace", "percepnet", query) for query in expressions()]
    rules: list[Object] = [{"record": f"q:{i}", "expr": query} for i, query in enumerate(queries)]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    command = ["promtool", "check", "rules", "rules.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboards_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
