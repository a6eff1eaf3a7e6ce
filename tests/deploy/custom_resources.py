"""Reads custom resources as a JSON list, writes for each why its definition refuses it, or null.

A process of its own: pytest would rewrite the models' megabytes of code first.
"""

import json
import sys

from cloudcoil.models.keda import v1alpha1 as keda
from cloudcoil.models.prometheus_operator import v1 as prometheus
from pydantic import ValidationError

MODELS = {
    "PodMonitor": prometheus.PodMonitor,
    "PrometheusRule": prometheus.PrometheusRule,
    "ScaledObject": keda.ScaledObject,
}


def refusal(entry: dict) -> str | None:
    """Why an object is not valid, or which of its fields its kind does not have."""
    try:
        parsed = MODELS[entry["kind"]].model_validate(entry)
    except ValidationError as error:
        return str(error)
    known = parsed.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return None if known == entry else f"of {json.dumps(entry)} only this is known: {json.dumps(known)}"


if __name__ == "__main__":
    print(json.dumps([refusal(entry) for entry in json.load(sys.stdin)]))
