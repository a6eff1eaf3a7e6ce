"""The metrics of all workers as those of one service."""

from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Metric

Snapshot = list[list[Any]]
"""Families as JSON has them: name, documentation, type, and samples of name, labels and value."""

_SMALLEST = {"process_start_time_seconds"}
"""All other values of several workers add up."""


def take(registry: CollectorRegistry, before: Snapshot | None = None) -> Snapshot:
    """The present values of a registry. before: of a lost worker, whose counters go on here."""
    own = [
        [family.name, family.documentation, family.type, [list(sample[:3]) for sample in family.samples]]
        for family in registry.collect()
    ]
    return _added([own, _counters(before)]) if before else own


def merged(snapshots: Iterable[tuple[Snapshot, bool]]) -> Iterator[Metric]:
    """One family for those of the same name. Each snapshot comes with whether its worker lives: of one that
    does not, only counters count."""
    for name, documentation, kind, samples in _added(
        snapshot if lives else _counters(snapshot) for snapshot, lives in snapshots
    ):
        family = Metric(name, documentation, kind)
        for sample_name, labels, value in samples:
            family.add_sample(sample_name, labels, value)
        yield family


def _counters(snapshot: Snapshot) -> Snapshot:
    """What must never fall back."""
    return [family for family in snapshot if family[2] in ("counter", "histogram")]


def _added(snapshots: Iterable[Snapshot]) -> Snapshot:
    families: dict[str, tuple[list[Any], dict[Any, list[Any]]]] = {}
    for snapshot in snapshots:
        for name, documentation, kind, samples in snapshot:
            _, sums = families.setdefault(name, ([name, documentation, kind], {}))
            for sample_name, labels, value in samples:
                key = (sample_name, *sorted(labels.items()))
                found = sums.setdefault(key, [sample_name, labels, None])
                if found[2] is None:
                    found[2] = value
                else:
                    found[2] = min(found[2], value) if sample_name in _SMALLEST else found[2] + value
    return [[*head, list(sums.values())] for head, sums in families.values()]
