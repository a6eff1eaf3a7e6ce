"""The manifests are what Kubernetes accepts, strictly, and they fit the code: every name in them is real."""

import json
import re
import subprocess
import sys
import tomllib
from copy import deepcopy
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from dockerfile import DOCKERFILE, ROOT, parse
from manifests import (
    DEPLOY,
    OVERLAYS,
    Object,
    behavior,
    container,
    environment,
    only,
    overlay,
    quantity,
    settings_map,
)
from running import running

from percepnet.enhancer import Enhancer
from percepnet.model import Model
from service.settings import Settings, unknown_variables

validator = pytest.importorskip("kubernetes_validate", reason="needs the dev extra")

VERSIONS = ("1.31", "1.35")
"""The oldest Kubernetes that has all that is used (preStop sleep), and a recent one."""

MEBIBYTE = 2**20


def is_custom(entry: Object) -> bool:
    """Whether an operator, not Kubernetes itself, defines a kind."""
    return entry["apiVersion"].partition("/")[0].endswith((".coreos.com", "keda.sh"))


def refusals(entries: list[Object]) -> list[str | None]:
    """Why custom resources are not valid."""
    pytest.importorskip("cloudcoil.models.keda", reason="needs the dev extra")
    command = [sys.executable, str(Path(__file__).with_name("custom_resources.py"))]
    done = subprocess.run(command, input=json.dumps(entries), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def with_field(entry: Object, path: tuple[Any, ...]) -> Object:
    """An object with a field that does not exist, at a place in it."""
    broken = deepcopy(entry)
    inner = broken
    for step in path:
        inner = inner[step]
    inner["notAField"] = "1"
    return broken


@pytest.fixture(scope="module", params=OVERLAYS)
def objects(request: pytest.FixtureRequest) -> list[Object]:
    return overlay(request.param)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_valid_and_has_no_unknown_field(objects: list[Object], version: str) -> None:
    for entry in objects:
        if not is_custom(entry):
            validator.validate(entry, version, strict=True)


def test_every_custom_resource_is_valid_and_has_no_unknown_field() -> None:
    entries = [entry for name in OVERLAYS for entry in overlay(name) if is_custom(entry)]
    assert {entry["kind"] for entry in entries} == {"PodMonitor", "PrometheusRule", "ScaledObject"}
    places = {
        "PodMonitor": ("spec", "podMetricsEndpoints", 0),
        "PrometheusRule": ("spec", "groups", 0, "rules", 0),
        "ScaledObject": ("spec", "triggers", 0),
    }
    broken = [with_field(entry, places[entry["kind"]]) for entry in entries]
    found = refusals(entries + broken)
    assert found[: len(entries)] == [None] * len(entries)
    assert all("notAField" in (reason or "") for reason in found[len(entries) :])


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("Deployment", ("spec", "template", "spec", "containers", 0)),
        ("NetworkPolicy", ("spec",)),
        ("HorizontalPodAutoscaler", ("spec", "behavior", "scaleDown")),
    ],
)
def test_the_check_notices_a_mistyped_field(kind: str, path: tuple[Any, ...]) -> None:
    broken = with_field(only(overlay("autoscaling/hpa"), kind), path)
    with pytest.raises(validator.ValidationError):
        validator.validate(broken, VERSIONS[0], strict=True)


def test_all_that_has_a_namespace_is_in_one(objects: list[Object]) -> None:
    name = only(objects, "Namespace")["metadata"]["name"]
    assert {entry["metadata"].get("namespace") for entry in objects if entry["kind"] != "Namespace"} == {name}


def test_the_environment_is_made_of_settings_with_values_that_are_accepted(objects: list[Object]) -> None:
    variables = environment(objects)
    assert unknown_variables(variables) == []
    Settings.load(variables, {})


def test_files_that_settings_name_are_mounted_from_secrets(objects: list[Object]) -> None:
    settings = Settings.load(environment(objects), {})
    named = (
        settings.tls_cert,
        settings.tls_key,
        settings.tls_client_ca,
        settings.api_keys_file,
        settings.handover_keys_file,
    )
    pod = only(objects, "Deployment", "percepnet")["spec"]["template"]["spec"]
    secret = {volume["name"] for volume in pod["volumes"] if "secret" in volume}
    folders = {
        Path(mount["mountPath"]) for mount in container(objects)["volumeMounts"] if mount["name"] in secret
    }
    assert {path.parent for path in named if path} == folders


def test_probes_and_prometheus_speak_tls_where_the_service_does() -> None:
    objects = overlay("../tests/deploy/secured")
    assert Settings.load(environment(objects), {}).tls_client_ca is not None
    probes = [probe for key, probe in container(objects).items() if key.endswith("Probe")]
    assert {probe["httpGet"]["scheme"] for probe in probes} == {"HTTPS"}
    assert only(objects, "PodMonitor")["spec"]["podMetricsEndpoints"][0]["scheme"] == "https"


def test_the_container_reads_the_settings_and_nothing_injects_others(objects: list[Object]) -> None:
    (source,) = container(objects)["envFrom"]
    assert only(objects, "ConfigMap", source["configMapRef"]["name"])["data"] == settings_map(objects)
    assert only(objects, "Deployment", "percepnet")["spec"]["template"]["spec"]["enableServiceLinks"] is False


def test_ports_are_those_that_the_service_listens_on(objects: list[Object]) -> None:
    settings = Settings.load(settings_map(objects), {})
    ports = {port["name"]: port["containerPort"] for port in container(objects)["ports"]}
    assert ports == {"http": settings.http_listen.port, "grpc": settings.grpc_listen.port}
    named = [
        port["targetPort"]
        for entry in objects
        if entry["kind"] == "Service"
        for port in entry["spec"]["ports"]
    ]
    assert sorted(named) == sorted(ports)
    for rule in only(objects, "NetworkPolicy")["spec"]["ingress"]:
        assert {port["port"] for port in rule["ports"]} <= set(ports)


def test_every_selector_finds_the_pods(objects: list[Object]) -> None:
    deployment = only(objects, "Deployment", "percepnet")["spec"]
    spreads = deployment["template"]["spec"]["topologySpreadConstraints"]
    labels = deployment["template"]["metadata"]["labels"]
    selectors = [
        deployment["selector"]["matchLabels"],
        only(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        only(objects, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        *(entry["spec"]["selector"] for entry in objects if entry["kind"] == "Service"),
        *(entry["spec"]["selector"]["matchLabels"] for entry in objects if entry["kind"] == "PodMonitor"),
        *(spread["labelSelector"]["matchLabels"] for spread in spreads),
    ]
    assert all(selector.items() <= labels.items() for selector in selectors)


def test_streams_are_balanced_by_their_clients(objects: list[Object]) -> None:
    assert only(objects, "Service", "percepnet-streams")["spec"]["clusterIP"] == "None"


def test_the_pods_have_whole_cores_of_their_own(objects: list[Object]) -> None:
    """The QoS class Guaranteed with a whole CPU is what the static CPU manager pins."""
    resources = container(objects)["resources"]
    assert resources["requests"] == resources["limits"]
    assert {"cpu", "memory"} <= resources["limits"].keys()
    assert quantity(resources["limits"]["cpu"]) == 1


def test_the_grace_covers_the_drain_and_what_comes_before_it(objects: list[Object]) -> None:
    pod = only(objects, "Deployment", "percepnet")["spec"]["template"]["spec"]
    drain = Settings.load(settings_map(objects), {}).shutdown_grace_seconds
    pre_stop = container(objects)["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] >= pre_stop + drain + 10


def test_files_fit_into_the_only_folder_that_is_writable(objects: list[Object]) -> None:
    settings = Settings.load(settings_map(objects), {})
    pod = only(objects, "Deployment", "percepnet")["spec"]["template"]["spec"]
    writable = [mount for mount in container(objects)["volumeMounts"] if not mount.get("readOnly")]
    assert [mount["mountPath"] for mount in writable] == ["/tmp"]
    (room,) = (quantity(volume["emptyDir"]["sizeLimit"]) for volume in pod["volumes"] if "emptyDir" in volume)
    needed = settings.max_requests * (settings.max_upload_mib + settings.max_result_mib) * MEBIBYTE
    assert needed <= room < quantity(container(objects)["resources"]["limits"]["ephemeral-storage"])


def test_the_container_has_no_rights(objects: list[Object]) -> None:
    pod = only(objects, "Deployment", "percepnet")["spec"]["template"]["spec"]
    user, _, group = parse(DOCKERFILE.read_text())[-1].user.partition(":")
    assert (pod["securityContext"]["runAsUser"], pod["securityContext"]["runAsGroup"]) == (
        int(user),
        int(group),
    )
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    assert container(objects)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert only(objects, "NetworkPolicy")["spec"]["egress"] == []


def test_the_image_is_of_this_version(objects: list[Object]) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert container(objects)["image"].endswith(f"/percepnet:{version}")


def test_probes_and_metrics_are_answered_by_the_service(random_model: Model) -> None:
    objects = overlay("autoscaling/hpa")
    probes = [probe for key, probe in container(objects).items() if key.endswith("Probe")]
    assert len(probes) == 3
    paths = {probe["httpGet"]["path"] for probe in probes}
    paths |= {only(objects, "PodMonitor")["spec"]["podMetricsEndpoints"][0]["path"]}
    with running(Enhancer(random_model)) as server:
        address = server.servers[0].sockets[0].getsockname()
        for path in paths:
            assert httpx.get("http://{}:{}{}".format(*address, path)).status_code == 200


@pytest.mark.parametrize("name", OVERLAYS[1:])
def test_an_autoscaled_deployment_has_no_number_of_its_own(name: str) -> None:
    assert "replicas" not in only(overlay(name), "Deployment", "percepnet")["spec"]


def test_both_autoscalers_ask_for_the_same() -> None:
    hpa, keda = overlay("autoscaling/hpa"), overlay("autoscaling/keda")
    assert behavior(hpa) == behavior(keda)
    one, other = only(hpa, "HorizontalPodAutoscaler")["spec"], only(keda, "ScaledObject")["spec"]
    assert (one["minReplicas"], one["maxReplicas"]) == (other["minReplicaCount"], other["maxReplicaCount"])
    streams, cpu = one["metrics"]
    by_prometheus, by_cpu = other["triggers"]
    assert streams["pods"]["target"]["averageValue"] == by_prometheus["metadata"]["threshold"]
    assert str(cpu["containerResource"]["target"]["averageUtilization"]) == by_cpu["metadata"]["value"]
    assert {cpu["containerResource"]["container"], by_cpu["metadata"]["containerName"]} == {
        container(hpa)["name"]
    }


def test_the_autoscaler_asks_for_the_metric_that_the_adapter_offers() -> None:
    hpa = only(overlay("autoscaling/hpa"), "HorizontalPodAutoscaler")["spec"]
    values = yaml.safe_load((DEPLOY / "autoscaling" / "hpa" / "prometheus-adapter.values.yaml").read_text())
    (rule,) = values["rules"]["custom"]
    assert hpa["metrics"][0]["pods"]["metric"]["name"] == rule["name"]["as"]
    assert set(rule["resources"]["overrides"]) == {"namespace", "pod"}


def test_the_guide_names_what_the_autoscalers_read_from() -> None:
    """One that cannot read all of its metrics never scales down."""
    sources = {
        "Pods": "prometheus-adapter",
        "ContainerResource": "metrics-server",
        "prometheus": "Prometheus Operator",
        "cpu": "metrics-server",
    }
    metrics = only(overlay("autoscaling/hpa"), "HorizontalPodAutoscaler")["spec"]["metrics"]
    triggers = only(overlay("autoscaling/keda"), "ScaledObject")["spec"]["triggers"]
    (needed,) = re.findall(r"^Needed: .*?^$", (DEPLOY / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    for metric in metrics + triggers:
        assert sources[metric["type"]] in needed
