"""What each part of the service takes from the CPU: all of the process' time, divided by stages."""

import time
from collections.abc import Iterator

import numpy as np
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from percepnet.model import Model, State


class CpuStages(Collector):
    """CPU seconds of the process by stage; what no other stage took is transport."""

    def __init__(self) -> None:
        self.dsp = self.network = self.files = 0.0
        self._transport = 0.0

    def collect(self) -> Iterator[CounterMetricFamily]:
        """The stages as Prometheus reads them; together they are the process' own user and system time."""
        measured = {"dsp": self.dsp, "network": self.network, "files": self.files}
        # A stage in progress counts as transport until it ends; a counter must not fall back then.
        rest = time.process_time() - sum(measured.values())
        self._transport = max(self._transport, rest)
        family = CounterMetricFamily(
            "percepnet_cpu_seconds",
            "CPU time: live streams' signal path and network, files, and all the rest as transport.",
            labels=("stage",),
        )
        for stage, seconds in (*measured.items(), ("transport", self._transport)):
            family.add_metric((stage,), seconds)
        yield family


class MeteredModel(Model):
    """A model that counts the CPU seconds of its steps."""

    def __init__(self, model: Model) -> None:
        super().__init__(model.manifest, model._session, model.precision)
        self.cpu_seconds = 0.0

    def step(self, features: np.ndarray, state: State) -> tuple[np.ndarray, np.ndarray, State]:
        """Like the model's."""
        started = time.thread_time()
        result = super().step(features, state)
        self.cpu_seconds += time.thread_time() - started
        return result
