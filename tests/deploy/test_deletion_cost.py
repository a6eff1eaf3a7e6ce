"""Deletion costs follow the streams of real services, through a stand-in for the API server."""

import importlib.util
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
from conftest import export_random_model
from manifests import DEPLOY, only, overlay
from pods import PlainStream, Pod, free_address

PROGRAM = DEPLOY / "autoscaling" / "emptiest-first" / "deletion_cost.py"
SPEC = importlib.util.spec_from_file_location("deletion_cost", PROGRAM)
assert SPEC is not None
assert SPEC.loader is not None
deletion_cost = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(deletion_cost)

NAME = "percepnet-deletion-cost"
OVERLAY = "../tests/deploy/emptiest"


class Api(ThreadingHTTPServer):
    """As much of the Kubernetes API as is asked: lists pods, merges patches, believes one token."""

    def __init__(self, pods: list[dict[str, Any]]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.pods = {pod["metadata"]["name"]: pod for pod in pods}
        self.patches: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return "http://{}:{}".format(*self.server_address)


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: Api

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        assert path == "/api/v1/namespaces/percepnet/pods"
        assert "labelSelector=app.kubernetes.io/name=percepnet" in query
        self._answer({"items": list(self.server.pods.values())})

    def do_PATCH(self) -> None:
        pod = self.server.pods[self.path.rpartition("/")[2]]
        assert self.headers["Content-Type"] == "application/merge-patch+json"
        change = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        ((name, value),) = change["metadata"]["annotations"].items()
        pod["metadata"].setdefault("annotations", {})[name] = value
        self.server.patches.append((pod["metadata"]["name"], value))
        self._answer(pod)

    def _answer(self, body: Any) -> None:
        assert self.headers["Authorization"] == "Bearer the token"
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def pods(tmp_path: Path) -> Iterator[tuple[int, Pod, Pod]]:
    """Two pods at one port of two addresses."""
    model = export_random_model(tmp_path, fc=32, conv=64, gru=64, strength_gru=32)
    port = free_address().rpartition(":")[2]
    with ThreadPoolExecutor() as pool:
        a, b = pool.map(lambda i: Pod(model, PERCEPNET_HTTP_LISTEN=f"127.0.0.{2 + i}:{port}"), range(2))
    with a, b:
        yield int(port), a, b


def entry(name: str, address: str, **metadata: Any) -> dict[str, Any]:
    return {"metadata": {"name": name, **metadata}, "status": {"podIP": address}}


def test_costs_are_the_streams_and_are_written_when_they_have_changed(
    pods: tuple[int, Pod, Pod], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port, a, _ = pods
    leaving = entry("leaving", "127.0.0.2", deletionTimestamp="2026-01-01T00:00:00Z")
    listed = [entry("a", "127.0.0.2"), entry("b", "127.0.0.3"), entry("dead", "127.0.0.4"), leaving]
    (tmp_path / "token").write_text("the token")
    with Api(listed) as api, grpc.insecure_channel(a.grpc) as channel:
        threading.Thread(target=api.serve_forever).start()
        cluster = deletion_cost.Cluster(
            api.url, "percepnet", "app.kubernetes.io/name=percepnet", account=tmp_path
        )

        def patches() -> list[tuple[str, str]]:
            api.patches.clear()
            deletion_cost.update(cluster, "http", port)
            return sorted(api.patches)

        assert patches() == [("a", "0"), ("b", "0")]
        streams = [PlainStream(channel, 16_000) for _ in range(5)]
        assert patches() == [("a", "5")]
        streams.append(PlainStream(channel, 16_000))
        assert patches() == []
        for stream in streams:
            stream.end()
        assert patches() == [("a", "0")]
        api.shutdown()
    assert "dead: " in capsys.readouterr().err


def test_the_controller_runs_the_services_image_with_few_rights() -> None:
    objects = overlay(OVERLAY)
    (binding,) = (found for found in objects if found["kind"] == "RoleBinding")
    assert binding["subjects"][0]["namespace"] == only(objects, "Namespace")["metadata"]["name"]
    assert only(objects, "Role")["rules"] == [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "patch"]}
    ]
    service, controller = (only(objects, "Deployment", name)["spec"] for name in ("percepnet", NAME))
    (one,), (other,) = (spec["template"]["spec"]["containers"] for spec in (service, controller))
    assert one["image"] == other["image"]
    variables = {variable["name"]: variable["value"] for variable in other["env"]}
    ports = {port["name"]: str(port["containerPort"]) for port in one["ports"]}
    assert variables["PORT"] == ports["http"]
    assert variables["SCHEME"] == one["readinessProbe"]["httpGet"]["scheme"].lower()
    key, _, value = variables["SELECTOR"].partition("=")
    assert service["template"]["metadata"]["labels"][key] == value
    assert controller["template"]["metadata"]["labels"][key] != value
    mounted = controller["template"]["spec"]["volumes"][0]["configMap"]["name"]
    assert only(objects, "ConfigMap", mounted)["data"] == {PROGRAM.name: PROGRAM.read_text()}
