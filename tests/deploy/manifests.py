"""The manifests as a cluster would get them."""

import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
OVERLAYS = (
    "kubernetes",
    "autoscaling/hpa",
    "autoscaling/keda",
    "../tests/deploy/secured",
    "../tests/deploy/emptiest",
)
"""What is applied, as folders seen from deploy/."""

Object = dict[str, Any]


@cache
def rendered(folder: Path) -> list[Object]:
    """All objects of a kustomization; skips the test where there is no kubectl, which brings kustomize."""
    kubectl = shutil.which("kubectl", path=sysconfig.get_path("scripts")) or shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl, which brings kustomize, is not there; it is in the dev extra")
    command = [kubectl, "kustomize", str(folder)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert built.returncode == 0, built.stderr
    return list(yaml.safe_load_all(built.stdout))


def overlay(name: str) -> list[Object]:
    """All objects of an overlay."""
    return rendered(DEPLOY / name)


def only(objects: list[Object], kind: str, name: str | None = None) -> Object:
    """The one object of a kind, and of a name if there are more."""
    (found,) = (
        entry for entry in objects if entry["kind"] == kind and name in (None, entry["metadata"]["name"])
    )
    return found


def settings_map(objects: list[Object]) -> dict[str, str]:
    """The service's environment: the one ConfigMap with its settings."""
    (found,) = (
        entry["data"]
        for entry in objects
        if entry["kind"] == "ConfigMap" and all(key.startswith("PERCEPNET_") for key in entry["data"])
    )
    return found


def environment(objects: list[Object]) -> dict[str, str]:
    """All variables of the container."""
    own = {variable["name"]: variable["value"] for variable in container(objects).get("env", ())}
    return settings_map(objects) | own


def container(objects: list[Object]) -> Object:
    """The one container of the pods."""
    (found,) = only(objects, "Deployment", "percepnet")["spec"]["template"]["spec"]["containers"]
    return found


def behavior(objects: list[Object]) -> Object:
    """How fast an overlay scales, whatever scales it."""
    if any(entry["kind"] == "HorizontalPodAutoscaler" for entry in objects):
        return only(objects, "HorizontalPodAutoscaler")["spec"]["behavior"]
    return only(objects, "ScaledObject")["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]


def texts(value: Any) -> Iterator[str]:
    """All texts anywhere in an object."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from texts(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from texts(entry)


def quantity(text: str) -> float:
    """A Kubernetes quantity as a number."""
    units = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "m": 1e-3}
    unit = next((unit for unit in units if text.endswith(unit)), "")
    return float(text.removesuffix(unit)) * units.get(unit, 1)
