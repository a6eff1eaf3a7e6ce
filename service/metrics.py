"""What the service tells Prometheus, in base units; with many workers, each tells of all."""

from collections.abc import Callable, Iterator
from importlib.metadata import version

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder

from percepnet.model import Model
from service import merge
from service.board import Board
from service.cpu import CpuStages, StreamLoad

disable_created_metrics()  # a second series beside each, which nobody asks for

# A short file takes a tenth of a second, an hour of stereo some minutes.
_DURATION_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
# From a probe's answer to an hour of studio audio.
_SIZE_BYTES = tuple(4.0**power for power in range(5, 16))
# Close around the 10 ms after which the next frame is there.
_LATENCY_SECONDS = (
    0.001,
    0.002,
    0.003,
    0.004,
    0.005,
    0.006,
    0.008,
    0.01,
    0.0125,
    0.015,
    0.02,
    0.03,
    0.05,
    0.1,
    1,
)
RPCS = ("EnhanceStream", "EnhanceStreams", "EnhanceClip", "GetStatus", "EnhanceAudio")
_STREAMS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)


class Metrics:
    """All metrics of one worker, in a registry of their own, and the sum of those of all workers.

    board: what the workers know of each other.
    """

    def __init__(self, model: Model, board: Board | None = None) -> None:
        self.board = board or Board()
        self.registry = CollectorRegistry()
        self._before = self.board.mine.snapshot
        self.files_capacity = 0
        self.stopping: Callable[[], bool] = lambda: False
        self._build = {
            "version": version("percepnet"),
            "model": model.manifest.name,
            "model_version": model.manifest.version,
            "precision": model.precision,
        }
        ProcessCollector(registry=self.registry)
        self.request_duration = Histogram(
            "percepnet_http_request_duration_seconds",
            "From a request's head to the end of its answer.",
            ("route", "status"),
            buckets=_DURATION_SECONDS,
            registry=self.registry,
        )
        self.request_size = Histogram(
            "percepnet_http_request_size_bytes",
            "Bodies of requests, as far as they were read.",
            ("route",),
            buckets=_SIZE_BYTES,
            registry=self.registry,
        )
        self.response_size = Histogram(
            "percepnet_http_response_size_bytes",
            "Bodies of answers.",
            ("route",),
            buckets=_SIZE_BYTES,
            registry=self.registry,
        )
        self.errors = Counter(
            "percepnet_http_errors",
            "Requests that failed, by the code of their problem.",
            ("code",),
            registry=self.registry,
        )
        self.file_audio = Counter(
            "percepnet_file_audio_seconds",
            "Audio enhanced in whole files: duration times channels.",
            registry=self.registry,
        )
        self.file_cpu = Counter(
            "percepnet_file_cpu_seconds",
            "CPU time spent on files, from decoding to encoding.",
            registry=self.registry,
        )
        self.files_waiting = Gauge(
            "percepnet_files_waiting",
            "Files that wait for their turn on the CPU.",
            registry=self.registry,
        )
        self.streams = Counter(
            "percepnet_streams",
            "Live streams that ended or were refused, by outcome: ok, handed_over or a failure's code.",
            ("outcome",),
            registry=self.registry,
        )
        self.streams_resumed = Counter(
            "percepnet_streams_resumed",
            "Live streams that went on here from the state that another server gave them.",
            registry=self.registry,
        )
        self.rpcs = Counter(
            "percepnet_rpcs",
            "gRPC calls that ended, by outcome: ok or a failure's code.",
            ("method", "outcome"),
            registry=self.registry,
        )
        # Our own failures are there from the start, at 0: already the first must show as an increase.
        for method in RPCS:
            self.rpcs.labels(method, "internal")
        self.streams.labels("internal")
        self.errors.labels("internal")
        self.streams_rejected = Counter(
            "percepnet_streams_rejected",
            "Live streams refused because there was no room.",
            registry=self.registry,
        )
        self.stream_audio = Counter(
            "percepnet_stream_audio_seconds",
            "Audio that came in on live streams.",
            registry=self.registry,
        )
        self.stream_latency = Histogram(
            "percepnet_stream_latency_seconds",
            "From when the last sample that an answer needs came, be it to a process that stood still, to "
            "when the answer goes to the transport.",
            buckets=_LATENCY_SECONDS,
            registry=self.registry,
        )
        self.deadline_misses = Counter(
            "percepnet_deadline_misses",
            "Answers of live streams that took longer than 10 ms.",
            registry=self.registry,
        )
        self.dry_frames = Counter(
            "percepnet_dry_frames",
            "Frames of 10 ms of live streams sent without enhancement: they were more than 40 ms too late.",
            registry=self.registry,
        )
        self.queue_frames = Gauge(
            "percepnet_queue_frames",
            "Frames of 10 ms of live streams that wait to be enhanced.",
            registry=self.registry,
        )
        self.tick_streams = Histogram(
            "percepnet_tick_streams",
            "Live streams enhanced together in a round of the engine.",
            buckets=_STREAMS,
            registry=self.registry,
        )
        self.cpu = CpuStages()
        self.registry.register(self.cpu)
        self.load = StreamLoad(self.cpu, self.board.mine)
        self.registry.register(self.load)

    def publish(self) -> None:
        """Let the other workers see the present values."""
        self.board.mine.snapshot = merge.take(self.registry, self._before)

    def collect(self) -> Iterator[Metric]:
        """All metrics of the service."""
        self.publish()  # what is told now must never fall back, whoever is asked next
        mine = self.board.mine
        snapshots = ((slot.snapshot, slot is mine or bool(slot.ready)) for slot in self.board.slots)
        yield from merge.merged((snapshot, lives) for snapshot, lives in snapshots if snapshot)
        yield from self._of_the_service()

    def render(self, accept: str) -> tuple[bytes, str]:
        """The exposition and its content type, in the text format that `accept` asks for."""
        encode, content_type = choose_encoder(accept)
        return encode(self), content_type

    def _of_the_service(self) -> Iterator[Metric]:
        """What every worker knows of all of them."""
        total = self.board.total
        open_seconds, stopping = total("open_seconds"), self.stopping()
        cpu_ratio = total("cpu_seconds") / open_seconds if open_seconds else 0.0
        for name, documentation, value in (
            ("streams_active", "Live streams that are open.", total("streams")),
            (
                "streams_capacity",
                "Live streams that may be open at once; those that are, once no more are taken.",
                total("streams" if stopping else "capacity"),
            ),
            ("stopping", "1 while live streams may end and no more are taken.", float(stopping)),
            (
                "stream_cpu_ratio",
                "CPU time of a live stream as a ratio of a core, transport included; mean of the last 10 s, "
                "0 without streams.",
                cpu_ratio,
            ),
            ("files_accepted", "Files between upload and answer.", total("files")),
            (
                "files_capacity",
                "Files that may be between upload and answer at once.",
                self.files_capacity,
            ),
            ("workers", "Worker processes that serve.", total("ready")),
        ):
            yield GaugeMetricFamily(f"percepnet_{name}", documentation, value)
        yield CounterMetricFamily(
            "percepnet_worker_restarts",
            "Worker processes that ended unasked, or hung, and were replaced; their streams were lost.",
            total("restarts"),
        )
        yield CounterMetricFamily(
            "percepnet_streams_lost",
            "Live streams that ended with their worker; they have no outcome.",
            total("streams_lost"),
        )
        build = GaugeMetricFamily("percepnet_build_info", "What runs here.", labels=tuple(self._build))
        build.add_metric(tuple(self._build.values()), 1)
        yield build
