"""A real Prometheus reads two real services; the autoscalers ask for the right pods as calls come and go."""

import math
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
import yaml
from conftest import export_random_model
from manifests import DEPLOY, only, overlay
from pods import PlainStream, Pod, free_address
from running import eventually

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="Debian's package prometheus is not installed"
)

RATE = 16_000
NAMESPACE = "percepnet"
HPA = only(overlay("autoscaling/hpa"), "HorizontalPodAutoscaler")["spec"]
SCALED = only(overlay("autoscaling/keda"), "ScaledObject")["spec"]
ADAPTER = yaml.safe_load((DEPLOY / "autoscaling" / "hpa" / "prometheus-adapter.values.yaml").read_text())


class Prometheus:
    """A running Prometheus with the project's alert rules, which reads pods as the pod monitor has it."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=10)

    def ask(self, query: str) -> list[dict]:
        """The samples that answer an instant query."""
        answer = self.http.get("/api/v1/query", params={"query": query}).json()
        assert answer["status"] == "success", answer
        return answer["data"]["result"]

    def is_ready(self) -> bool:
        try:
            return self.http.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def rules(self) -> list[dict]:
        """The alert rules, as they were evaluated."""
        groups = self.http.get("/api/v1/rules").json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def streams_of_pods(self) -> list[float]:
        """What prometheus-adapter tells the HPA: the custom metric of each pod."""
        (rule,) = ADAPTER["rules"]["custom"]
        query = rule["metricsQuery"]
        for placeholder, value in {
            "<<.Series>>": rule["seriesQuery"].partition("{")[0],
            "<<.LabelMatchers>>": f'namespace="{NAMESPACE}",pod=~"a|b"',
            "<<.GroupBy>>": "pod",
        }.items():
            query = query.replace(placeholder, value)
        return [float(sample["value"][1]) for sample in self.ask(query)]

    def wanted_by_hpa(self) -> int:
        """The formula of the HorizontalPodAutoscaler: ⌈replicas · mean / target⌉, unless within 10 %."""
        streams = self.streams_of_pods()
        target = float(HPA["metrics"][0]["pods"]["target"]["averageValue"])
        ratio = sum(streams) / len(streams) / target
        wanted = len(streams) if abs(ratio - 1) <= 0.1 else math.ceil(len(streams) * ratio)
        return max(HPA["minReplicas"], min(HPA["maxReplicas"], wanted))

    def wanted_by_keda(self) -> int:
        """The same for KEDA, which hands the sum over: ⌈sum / threshold⌉."""
        trigger = SCALED["triggers"][0]["metadata"]
        (sample,) = self.ask(trigger["query"])
        wanted = math.ceil(float(sample["value"][1]) / float(trigger["threshold"]))
        return max(SCALED["minReplicaCount"], min(SCALED["maxReplicaCount"], wanted))


@pytest.fixture
def pods(tmp_path: Path) -> Iterator[dict[str, Pod]]:
    model = export_random_model(tmp_path, fc=32, conv=64, gru=64, strength_gru=32)
    with ThreadPoolExecutor() as pool:
        a, b = pool.map(Pod, 2 * [model])
    with a, b:
        yield {"a": a, "b": b}


@pytest.fixture
def prometheus(pods: dict[str, Pod], tmp_path: Path) -> Iterator[Prometheus]:
    address = free_address()
    monitor = only(overlay("autoscaling/hpa"), "PodMonitor")["spec"]["podMetricsEndpoints"][0]
    targets = [
        {"targets": [pod.http], "labels": {"namespace": NAMESPACE, "pod": name}} for name, pod in pods.items()
    ]
    scrape = {"job_name": "pods", "metrics_path": monitor["path"], "static_configs": targets}
    often = {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"}
    alerts = only(overlay("autoscaling/hpa"), "PrometheusRule")["spec"]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(alerts))
    configuration = {"global": often, "rule_files": ["rules.yaml"], "scrape_configs": [scrape]}
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(configuration))
    command = [
        "prometheus",
        f"--config.file={tmp_path / 'prometheus.yaml'}",
        f"--storage.tsdb.path={tmp_path / 'data'}",
        f"--web.listen-address={address}",
        "--log.level=error",
    ]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        server = Prometheus(f"http://{address}")
        try:
            eventually(server.is_ready, "Prometheus")
            yield server
        finally:
            server.http.close()
            process.terminate()


def test_streams_that_come_and_go_get_the_pods_that_they_need(
    pods: dict[str, Pod], prometheus: Prometheus
) -> None:
    """Two pods of 24: the target of 15 asks for three, four, three again, whoever does the sum."""
    with ExitStack() as hang_up:
        channels = {
            name: hang_up.enter_context(grpc.insecure_channel(pod.grpc)) for name, pod in pods.items()
        }
        live: dict[str, list[PlainStream]] = {name: [] for name in pods}

        def ramp(**counts: int) -> None:
            for name, count in counts.items():
                while len(live[name]) < count:
                    live[name].append(PlainStream(channels[name], RATE))
                    live[name][-1].push(np.zeros(RATE // 100, np.float32))
                while len(live[name]) > count:
                    live[name].pop().end()
            seen = lambda: sorted(prometheus.streams_of_pods()) == sorted(counts.values())  # noqa: E731
            eventually(seen, f"Prometheus sees {counts}")

        ramp(a=0, b=0)
        assert (prometheus.wanted_by_hpa(), prometheus.wanted_by_keda()) == (3, 3)
        ramp(a=12, b=9)
        assert (prometheus.wanted_by_hpa(), prometheus.wanted_by_keda()) == (3, 3)
        ramp(a=24, b=22)
        assert (prometheus.wanted_by_hpa(), prometheus.wanted_by_keda()) == (4, 4)
        ramp(a=24, b=24)
        assert (prometheus.wanted_by_hpa(), prometheus.wanted_by_keda()) == (4, 4)
        with pytest.raises(grpc.RpcError) as refused:
            PlainStream(channels["a"], RATE)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        eventually(lambda: value(prometheus, "percepnet_streams_rejected_total") == 1, "the refusal")
        ramp(a=4, b=0)
        assert (prometheus.wanted_by_hpa(), prometheus.wanted_by_keda()) == (3, 3)
        ramp(a=0, b=0)
    assert value(prometheus, 'percepnet_streams_total{outcome="ok"}') == 48
    evaluated = prometheus.rules()
    assert {rule["health"] for rule in evaluated} == {"ok"}
    assert not [rule["name"] for rule in evaluated if rule["state"] == "firing"]


def value(prometheus: Prometheus, query: str) -> float:
    """The sum over the pods."""
    return sum(float(sample["value"][1]) for sample in prometheus.ask(query))
