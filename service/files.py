"""Whole files on the engine, whatever brought them."""

import math
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from percepnet.audio import AudioReader
from percepnet.enhancer import Enhancer
from percepnet.stream import Summary, enhance_file
from percepnet.synthesis import Controls
from service.access import Access
from service.callers import Caller
from service.errors import TooLargeError
from service.jobs import Checkpoint, FileJobs
from service.metrics import Metrics
from service.settings import Settings
from service.upload import MIB


class Files:
    """All files of one process.

    settings: limits of the deployment. access: limits of each caller. enhancer: stands back behind live
    streams.
    """

    def __init__(self, settings: Settings, access: Access, enhancer: Enhancer, metrics: Metrics) -> None:
        self.settings = settings
        self.enhancer = enhancer
        self._access = access
        self._metrics = metrics
        at_once = math.ceil(settings.file_workers / len(metrics.board.slots))
        self._jobs = FileJobs(at_once, settings.max_requests, metrics.board, cpu=metrics.cpu)
        metrics.files_capacity = settings.max_requests
        metrics.files_waiting.set_function(lambda: self._jobs.waiting)

    @contextmanager
    def place(self, caller: Caller) -> Iterator[None]:
        """Hold one of the places, from upload to answer; raises LimitError, BusyError."""
        with self._access.files.hold(caller.key), self._jobs.place():
            yield

    def enhance(
        self, source: BinaryIO, target: BinaryIO, format: str, controls: Controls
    ) -> Coroutine[Any, Any, tuple[Summary, float]]:
        """Enhance one file in its turn; returns the summary and the CPU seconds it took.

        Raises AudioError, ParameterError, TooLargeError; cancelling ends the work.
        """

        def work(checkpoint: Checkpoint) -> tuple[Summary, float]:
            return self._work(source, target, format, controls, checkpoint)

        return self._jobs.run(work)

    async def close(self) -> None:
        """Wait until all places are given back."""
        await self._jobs.close()

    def _work(
        self, source: BinaryIO, target: BinaryIO, format: str, controls: Controls, checkpoint: Checkpoint
    ) -> tuple[Summary, float]:
        cpu_started = time.thread_time()
        settings = self.settings
        with AudioReader(source) as header:
            sample_rate = header.sample_rate
            if header.channels > settings.max_channels:
                raise TooLargeError(
                    f"the recording has {header.channels} channels; accepted are {settings.max_channels}"
                )

        def progress(n_done: int, n_expected: int) -> None:
            """Between blocks; a header may promise any length, so what was decoded counts as well."""
            if max(n_done, n_expected) > settings.max_duration_seconds * sample_rate:
                raise TooLargeError(f"the recording is longer than {settings.max_duration_seconds:g} s")
            if target.tell() > settings.max_result_mib * MIB:
                raise TooLargeError(f"the enhanced file is larger than {settings.max_result_mib} MiB")
            checkpoint()

        summary = enhance_file(
            source, target, format=format, controls=controls, enhancer=self.enhancer, progress=progress
        )
        cpu_seconds = time.thread_time() - cpu_started
        self._metrics.file_audio.inc(summary.seconds * summary.channels)
        self._metrics.file_cpu.inc(cpu_seconds)
        return summary, cpu_seconds
