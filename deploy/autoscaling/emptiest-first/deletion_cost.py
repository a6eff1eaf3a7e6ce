"""Tells Kubernetes how many live streams each pod carries, so that scaling down begins with the emptiest.

Runs in the cluster, on the service's own image. A ReplicaSet that has too many pods removes those first whose
annotation `controller.kubernetes.io/pod-deletion-cost` is lowest.
"""

import json
import os
import re
import ssl
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

ANNOTATION = "controller.kubernetes.io/pod-deletion-cost"
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
PERIOD_SECONDS = 30

STEP = 4
"""Streams by which a pod must have changed: each change is a write, told to all who watch pods."""


class Cluster:
    """The pods of one service, by the Kubernetes API."""

    def __init__(self, url: str, namespace: str, selector: str, account: Path = ACCOUNT) -> None:
        self._pods = f"{url}/api/v1/namespaces/{namespace}/pods"
        self._selector = selector
        self._account = account
        authority = account / "ca.crt"
        self._tls = ssl.create_default_context(cafile=str(authority)) if url.startswith("https") else None

    def pods(self) -> list[dict[str, Any]]:
        """Those that run and are not leaving."""
        found = self._ask("GET", f"?labelSelector={self._selector}&fieldSelector=status.phase=Running")
        return [pod for pod in found["items"] if "deletionTimestamp" not in pod["metadata"]]

    def annotate(self, pod: dict[str, Any], cost: int) -> None:
        """Set what it costs to remove a pod."""
        change = {"metadata": {"annotations": {ANNOTATION: str(cost)}}}
        self._ask("PATCH", f"/{pod['metadata']['name']}", change)

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._pods + path, data, method=method)
        # The token is renewed while the process lives.
        request.add_header("Authorization", f"Bearer {(self._account / 'token').read_text()}")
        request.add_header("Content-Type", "application/merge-patch+json")
        with urllib.request.urlopen(request, timeout=10, context=self._tls) as response:
            return json.load(response)


def streams_of(pod: dict[str, Any], scheme: str, port: int) -> int:
    """What a pod tells of itself."""
    host = pod["status"]["podIP"]
    address = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}/metrics"
    # Certificates name the service, not the address of a pod; nothing secret is sent or believed.
    tls = ssl._create_unverified_context() if scheme == "https" else None
    with urllib.request.urlopen(address, timeout=5, context=tls) as response:
        found = re.search(r"^percepnet_streams_active (\S+)$", response.read().decode(), re.MULTILINE)
    if found is None:
        raise ValueError(f"{address} tells no percepnet_streams_active")
    return int(float(found[1]))


def update(cluster: Cluster, scheme: str, port: int) -> None:
    """Annotate the pods whose streams have changed; one that does not answer keeps what it has."""
    for pod in cluster.pods():
        try:
            streams = streams_of(pod, scheme, port)
            known = pod["metadata"].get("annotations", {}).get(ANNOTATION)
            if known is None or abs(streams - int(known)) >= STEP or (streams == 0 and known != "0"):
                cluster.annotate(pod, streams)
        except (OSError, ValueError) as error:
            print(f"{pod['metadata']['name']}: {error}", file=sys.stderr, flush=True)


def main() -> None:
    """Update for ever."""
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    url = f"https://{f'[{host}]' if ':' in host else host}:{port}"
    cluster = Cluster(url, (ACCOUNT / "namespace").read_text(), os.environ["SELECTOR"])
    while True:
        try:
            update(cluster, os.environ["SCHEME"], int(os.environ["PORT"]))
        except OSError as error:
            print(f"the API server: {error}", file=sys.stderr, flush=True)
        time.sleep(PERIOD_SECONDS)


if __name__ == "__main__":
    main()
