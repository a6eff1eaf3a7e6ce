"""What each part of the service takes from the CPU: all of the process' time, divided by stages."""

import threading
import time
from collections import deque
from collections.abc import Iterator

import numpy as np
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from percepnet.model import Model, State
from service.board import Slot


class CpuStages(Collector):
    """CPU seconds of the process by stage; what no other stage took is transport."""

    def __init__(self) -> None:
        self.dsp = self.network = 0.0
        self._of_file_threads: dict[int, float] = {}
        self._transport = 0.0

    def count_file(self) -> None:
        """Note what the calling thread has taken so far; all of it goes into files."""
        self._of_file_threads[threading.get_ident()] = time.thread_time()

    @property
    def files(self) -> float:
        """All the time of the threads that work on files: decoding, enhancing, encoding."""
        return sum(list(self._of_file_threads.values()))  # copied at once, whatever the threads do

    @property
    def transport(self) -> float:
        """All the time that no stage took: messages, requests, and the process' own upkeep."""
        # A stage in progress counts as transport until it ends; a counter must not fall back then.
        rest = time.process_time() - self.dsp - self.network - self.files
        self._transport = max(self._transport, rest)
        return self._transport

    @property
    def live(self) -> float:
        """All the time that did not go into files."""
        return self.dsp + self.network + self.transport

    def collect(self) -> Iterator[CounterMetricFamily]:
        """The stages as Prometheus reads them; together they are the process' own user and system time."""
        family = CounterMetricFamily(
            "percepnet_cpu_seconds",
            "CPU time: live streams' signal path and network, files, and all the rest as transport.",
            labels=("stage",),
        )
        for stage in ("dsp", "network", "files", "transport"):
            family.add_metric((stage,), getattr(self, stage))
        yield family


class StreamLoad(Collector):
    """How long live streams are open, and what they took from the CPU lately; slot: where it is told."""

    WINDOW_SECONDS = 10
    """What "lately" means: it follows the load, and a single pause does not show."""

    def __init__(self, cpu: CpuStages, slot: Slot) -> None:
        self._cpu = cpu
        self._slot = slot
        self._active = 0
        self._seconds = 0.0
        self._since = time.monotonic()
        self._samples: deque[tuple[float, float]] = deque(maxlen=self.WINDOW_SECONDS + 1)
        self.sample()

    def changed(self, active: int, capacity: int) -> None:
        """So many streams are open from now on, and so many may be."""
        self._seconds, self._since = self.seconds, time.monotonic()
        self._slot.streams = self._active = active
        self._slot.capacity = capacity

    @property
    def seconds(self) -> float:
        """The time that streams were open, summed over all of them."""
        return self._seconds + self._active * (time.monotonic() - self._since)

    def sample(self) -> None:
        """Take note of the present; to be called once a second."""
        self._samples.append((self._cpu.live, self.seconds))
        (old_cpu, old_seconds), (cpu, seconds) = self._samples[0], self._samples[-1]
        self._slot.cpu_seconds, self._slot.open_seconds = cpu - old_cpu, seconds - old_seconds

    def collect(self) -> Iterator[CounterMetricFamily]:
        """The time that streams were open, as Prometheus reads it."""
        yield CounterMetricFamily(
            "percepnet_stream_open_seconds",
            "Time that live streams were open, summed over them.",
            self.seconds,
        )


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
