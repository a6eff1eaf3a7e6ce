"""The filter for Pipecat gives what a stream gives, in the bot's process and over a server, whatever happens.

Where Pipecat is not installed, stand-ins for the few names that the filter takes of it do.
"""

import asyncio
import importlib
import itertools
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import soundfile
from running import TIMEOUT_SECONDS, Link, Service, running, serving

from percepnet.errors import ParameterError
from percepnet.stream import Stream, bundled_enhancer
from percepnet.synthesis import Controls
from service import pcm
from service.client import AsyncClient
from service.main import Server

NOISY = Path(__file__).parent / "data" / "noisy.wav"
DRY = Controls(mix=0)
INSTALLED = find_spec("pipecat") is not None
needs_pipecat = pytest.mark.skipif(not INSTALLED, reason="Pipecat is not installed")


class BaseAudioFilter(ABC):
    @abstractmethod
    async def start(self, sample_rate: int): ...
    @abstractmethod
    async def stop(self): ...
    @abstractmethod
    async def process_frame(self, frame: Any): ...
    @abstractmethod
    async def filter(self, audio: bytes) -> bytes: ...


class FilterControlFrame: ...


@dataclass
class FilterUpdateSettingsFrame(FilterControlFrame):
    settings: Mapping[str, Any]


@dataclass
class FilterEnableFrame(FilterControlFrame):
    enable: bool


class Log:
    """In place of the logger."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.infos: list[str] = []
        self.error, self.info = self.errors.append, self.infos.append


def stand_ins() -> dict[str, ModuleType]:
    """Modules that hold what the filter imports."""
    names = ["pipecat.frames.frames", "pipecat.audio.filters.base_audio_filter", "loguru"]
    parts = {".".join(name.split(".")[: n + 1]) for name in names for n in range(name.count(".") + 1)}
    modules = {name: ModuleType(name) for name in parts}
    for name, module in modules.items():
        if "." in name:
            parent, own = name.rsplit(".", 1)
            setattr(modules[parent], own, module)
    modules["pipecat.audio.filters.base_audio_filter"].BaseAudioFilter = BaseAudioFilter
    for frame in (FilterControlFrame, FilterUpdateSettingsFrame, FilterEnableFrame):
        setattr(modules["pipecat.frames.frames"], frame.__name__, frame)
    modules["loguru"].logger = Log()
    return modules


@pytest.fixture(scope="module")
def adapter() -> Iterator[ModuleType]:
    """`percepnet.pipecat`."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        if INSTALLED:
            warnings.simplefilter("ignore")  # of what Pipecat imports
        else:
            for name, module in stand_ins().items():
                patch.setitem(sys.modules, name, module)
            patch.delitem(sys.modules, "percepnet.pipecat", raising=False)
        yield importlib.import_module("percepnet.pipecat")
        if not INSTALLED:
            del sys.modules["percepnet.pipecat"]


@pytest.fixture
def log(adapter, monkeypatch) -> Log:
    """What the filter logs."""
    log = Log()
    monkeypatch.setattr(adapter, "logger", log)
    return log


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(bundled_enhancer()) as server:
        yield server


def target_of(server: Server) -> str:
    return f"127.0.0.1:{server.grpc.port}"


def speech(rate: int, seconds: float = 1.5) -> np.ndarray:
    """Samples of the noisy example, int16, whatever the rate."""
    return soundfile.read(NOISY, start=24_000, frames=round(seconds * rate), dtype="int16")[0]


def streamed(samples: np.ndarray, rate: int, controls: Controls = Controls()) -> np.ndarray:
    """What a stream gives without its lead-in, in 16 bits."""
    stream = Stream(rate, controls=controls)
    output = stream.push(pcm.decode(samples.tobytes(), pcm.S16LE))
    return pcm.encode(output[stream.latency_samples :], pcm.S16LE)


class Call:
    """A started filter and what went through it."""

    def __init__(self, filter: Any) -> None:
        self.filter = filter
        self.said, self.heard = b"", b""

    async def say(self, samples: np.ndarray, chunk: int) -> None:
        """Chunks of so many samples."""
        for start in range(0, len(samples), chunk):
            await self.say_bytes(samples[start : start + chunk].tobytes())

    async def say_bytes(self, audio: bytes) -> None:
        self.said += audio
        self.heard += await self.filter.filter(audio)

    async def hear(self, n_samples: int) -> np.ndarray:
        """Wait until so many samples came back in all."""
        async with asyncio.timeout(TIMEOUT_SECONDS):
            while len(self.heard) < 2 * n_samples:
                await asyncio.sleep(0.005)
                await self.say_bytes(b"")
        return np.frombuffer(self.heard, np.int16)


def latency(rate: int) -> int:
    return Stream(rate).latency_samples


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 48_000])
def test_in_process_it_gives_what_a_stream_gives(adapter, rate):
    async def main() -> bytes:
        call = Call(adapter.PercepNetFilter())
        await call.filter.start(rate)
        await call.say(speech(rate), rate // 50)
        await call.filter.stop()
        return call.heard

    output, expected = np.frombuffer(asyncio.run(main()), np.int16), streamed(speech(rate), rate)
    assert len(output) >= len(speech(rate)) - latency(rate) - rate // 100
    np.testing.assert_array_equal(output, expected[: len(output)])


def test_in_process_the_model_may_be_another(adapter, enhancer):
    samples = speech(48_000, 0.2)

    async def main() -> bytes:
        filter = adapter.PercepNetFilter(enhancer=enhancer)
        await filter.start(48_000)
        return await filter.filter(samples.tobytes())

    stream = Stream(enhancer=enhancer)
    expected = stream.push(pcm.decode(samples.tobytes(), pcm.S16LE))[stream.latency_samples :]
    assert asyncio.run(main()) == pcm.encode(expected, pcm.S16LE).tobytes()


@pytest.mark.parametrize("target", [None, "127.0.0.1:1"])
def test_a_rate_that_no_stream_takes_is_refused_at_the_start(adapter, target):
    with pytest.raises(ParameterError, match="4000"):
        asyncio.run(adapter.PercepNetFilter(target).start(4_000))


@pytest.mark.parametrize("rate", [16_000, 48_000])
@pytest.mark.parametrize("shared", [False, True])
def test_over_a_server_it_gives_what_a_stream_gives(adapter, server, rate, shared):
    """Two callers at once, each with a client, or both with the same one."""

    async def main() -> list[np.ndarray]:
        client = AsyncClient(target_of(server))
        targets = [client, client] if shared else [target_of(server)] * 2
        calls = [Call(adapter.PercepNetFilter(target)) for target in targets]
        for call in calls:
            await call.filter.start(rate)
        for call in calls:
            await call.say(speech(rate), rate // 50)
        outputs = [await call.hear(len(speech(rate)) - latency(rate)) for call in calls]
        for call in calls:
            await call.filter.stop()
        assert (await client.status()).model_name  # it is still open
        await client.close()
        return outputs

    for output in asyncio.run(main()):
        np.testing.assert_array_equal(output, streamed(speech(rate), rate)[: len(output)])


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("n_bytes", [1, 333, 959, 70_000])
def test_chunks_may_have_any_length(adapter, server, remote, n_bytes):
    """Even halves of samples, and none."""
    samples = speech(16_000, 0.3)

    async def main() -> np.ndarray:
        call = Call(adapter.PercepNetFilter(target_of(server) if remote else None))
        await call.filter.start(16_000)
        for start in range(0, 2 * len(samples), n_bytes):
            await call.say_bytes(samples.tobytes()[start : start + n_bytes])
            await call.say_bytes(b"")
        output = await call.hear(len(samples) - latency(16_000))
        await call.filter.stop()
        return output

    np.testing.assert_array_equal(asyncio.run(main()), streamed(samples, 16_000))


def test_settings_and_the_switch_work_from_the_next_frame_on(adapter, log):
    samples, rate = speech(48_000, 1.6), 48_000
    gentle = Controls(attenuation_limit_db=12, postfilter=0.5)
    frames = adapter.frames
    steps = [
        (frames.FilterUpdateSettingsFrame(settings={"attenuation_limit_db": 12, "postfilter": 0.5}), gentle),
        (frames.FilterEnableFrame(enable=False), Controls(12, 0, 0.5)),
        (frames.FilterUpdateSettingsFrame(settings={"mix": 0.9}), Controls(12, 0, 0.5)),
        (frames.FilterEnableFrame(enable=True), Controls(12, 0.9, 0.5)),
    ]

    async def main() -> bytes:
        call = Call(adapter.PercepNetFilter())
        await call.filter.start(rate)
        for (frame, _), part in zip(steps, np.split(samples, len(steps)), strict=True):
            await call.filter.process_frame(frame)
            await call.say(part, 960)
        return call.heard

    stream, expected = Stream(), []
    for (_, controls), part in zip(steps, np.split(samples, len(steps)), strict=True):
        stream.controls = controls
        expected.append(stream.push(pcm.decode(part.tobytes(), pcm.S16LE)))
    output = np.frombuffer(asyncio.run(main()), np.int16)
    late, quarter = stream.latency_samples, len(samples) // 4
    np.testing.assert_array_equal(output, pcm.encode(np.concatenate(expected)[late:], pcm.S16LE))
    off = slice(quarter, 3 * quarter - late)  # where it is switched off the input comes, sample for sample
    np.testing.assert_array_equal(output[off], samples[off])
    assert not log.errors


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize(
    "settings", [{"gain": 3}, {"mix": 2}, {"mix": "loud"}, {"mix": 0, "attenuation_limit_db": -1}]
)
def test_settings_that_are_not_accepted_are_logged_and_change_nothing(adapter, log, server, remote, settings):
    samples = speech(16_000, 0.5)

    async def main() -> np.ndarray:
        call = Call(adapter.PercepNetFilter(target_of(server) if remote else None))
        await call.filter.start(16_000)
        await call.filter.process_frame(adapter.frames.FilterUpdateSettingsFrame(settings=settings))
        await call.say(samples, 320)
        output = await call.hear(len(samples) - latency(16_000))
        await call.filter.stop()
        return output

    np.testing.assert_array_equal(asyncio.run(main()), streamed(samples, 16_000))
    (error,) = log.errors
    assert list(settings)[-1] in error


def test_over_a_server_the_switch_shifts_nothing(adapter, server):
    samples = speech(48_000)

    async def main() -> np.ndarray:
        call = Call(adapter.PercepNetFilter(target_of(server)))
        await call.filter.start(48_000)
        first, then, last = np.split(samples, [24_000, 48_000])
        await call.say(first, 960)
        await call.hear(24_000 - latency(48_000))
        await call.filter.process_frame(adapter.frames.FilterEnableFrame(enable=False))
        await call.say(then, 960)
        await call.hear(48_000 - latency(48_000))
        await call.filter.process_frame(adapter.frames.FilterEnableFrame(enable=True))
        await call.say(last, 960)
        output = await call.hear(len(samples) - latency(48_000))
        await call.filter.stop()
        return output

    output, expected = asyncio.run(main()), streamed(samples, 48_000)
    fade = 3_360  # 50 ms, and 20 of two frames
    off = slice(24_000 + fade, 48_000 - 2 * 960)
    np.testing.assert_array_equal(output[off], samples[off])
    for on in (slice(22_000), slice(48_000 + fade, len(output))):
        np.testing.assert_array_equal(output[on], expected[on])


@pytest.mark.parametrize("remote", [False, True])
def test_it_can_be_stopped_and_started_again(adapter, server, remote):
    """At another rate, and with what was chosen before; nothing of the first call is heard in the second."""

    async def main() -> np.ndarray:
        call = Call(adapter.PercepNetFilter(target_of(server) if remote else None))
        await call.filter.process_frame(adapter.frames.FilterUpdateSettingsFrame(settings={"mix": 0.5}))
        assert await call.filter.filter(bytes(640)) == b""
        await call.filter.start(48_000)
        await call.say(speech(48_000)[:10_001], 960)
        await call.filter.stop()
        await call.filter.stop()
        assert await call.filter.filter(bytes(640)) == b""
        call.heard = b""
        await call.filter.start(16_000)
        await call.say(speech(16_000), 320)
        output = await call.hear(len(speech(16_000)) - latency(16_000))
        await call.filter.stop()
        return output

    np.testing.assert_array_equal(asyncio.run(main()), streamed(speech(16_000), 16_000, Controls(mix=0.5)))


def test_a_server_that_hangs_costs_no_sample_and_is_found_again(adapter, log, server, monkeypatch):
    """Unenhanced so that every sample can be told: all come back, once and in order."""

    async def main() -> None:
        with Link(server.grpc.port) as link:
            call = Call(adapter.PercepNetFilter(link.target, controls=DRY))
            await call.filter.start(48_000)
            chunks = itertools.cycle(np.split(speech(48_000), 75))

            async def say_until(condition) -> None:
                while not condition():
                    await call.say(next(chunks), 960)
                    await asyncio.sleep(0.02)

            await say_until(lambda: len(call.heard) > 60_000)
            assert not log.errors
            monkeypatch.setattr(adapter, "HELD_SECONDS", 0.5)
            link.hold()
            await say_until(lambda: log.errors)
            assert call.heard == call.said  # at once, and so is what follows
            await call.say(next(chunks), 960)
            assert call.heard == call.said
            assert not log.infos
            switch_on = adapter.frames.FilterUpdateSettingsFrame(settings={"mix": 1})
            await call.filter.process_frame(switch_on)
            link.release()
            await say_until(lambda: log.infos)
            begun = len(call.said) // 2
            await say_until(lambda: len(call.heard) // 2 > begun + 24_000)
            await call.filter.stop()
        heard, said = np.frombuffer(call.heard, np.int16), np.frombuffer(call.said, np.int16)
        np.testing.assert_array_equal(heard[:begun], said[:begun])
        expected = streamed(said[begun:], 48_000)
        faded = 3_360  # from what the filter was when it asked for this stream
        np.testing.assert_array_equal(heard[begun + faded :], expected[faded : len(heard) - begun])

    asyncio.run(main())
    assert "1 s" in log.errors[0]  # half a second, and the grace


def test_much_audio_at_once_is_enhanced_as_well(adapter, log, server, monkeypatch):
    monkeypatch.setattr(adapter, "GRACE_SECONDS", TIMEOUT_SECONDS)  # the machine may be slow
    samples = np.tile(speech(16_000, 1), 3)

    async def main() -> np.ndarray:
        call = Call(adapter.PercepNetFilter(target_of(server)))
        await call.filter.start(16_000)
        await call.say(samples, len(samples))
        heard = await call.hear(len(samples) - 16_000)
        await call.filter.stop()
        return heard

    heard = asyncio.run(main())
    np.testing.assert_array_equal(heard, streamed(samples, 16_000)[: len(heard)])
    assert not log.errors


def test_a_stop_can_be_cancelled(adapter, server):
    async def main() -> bool:
        call = Call(adapter.PercepNetFilter(target_of(server)))
        await call.filter.start(16_000)
        stopping = asyncio.create_task(call.filter.stop())
        await asyncio.sleep(0)
        stopping.cancel()
        await asyncio.wait([stopping])
        return stopping.cancelled()

    assert asyncio.run(main())


def test_without_a_server_the_call_goes_on_and_the_log_says_so(adapter, log, monkeypatch):
    """As soon as there is something to enhance: controls alone ask for no server."""
    monkeypatch.setattr(adapter, "RETRY_SECONDS", 0.01)

    async def main() -> None:
        async with AsyncClient("127.0.0.1:1", patience_seconds=0.1) as client:
            call = Call(adapter.PercepNetFilter(client))
            await call.filter.start(16_000)
            await call.filter.process_frame(adapter.frames.FilterEnableFrame(enable=False))
            await asyncio.sleep(0.5)
            assert not log.errors
            await call.say(speech(16_000, 1), 320)
            await call.hear(16_000)
            async with asyncio.timeout(TIMEOUT_SECONDS):
                while len(log.errors) < 3:
                    await asyncio.sleep(0.01)
            await call.say(speech(16_000, 1), 320)
            assert call.heard == call.said
            await call.filter.stop()

    asyncio.run(main())
    assert all("UNAVAILABLE" in error for error in log.errors)
    assert not log.infos


def test_a_caller_who_is_muted_gives_its_place_back(adapter, log, monkeypatch):
    """And gets the rest of what was said; the next words begin a new stream."""
    monkeypatch.setattr(adapter, "IDLE_SECONDS", 0.2)
    samples = speech(16_000, 1)

    async def main(service: Service) -> np.ndarray:
        call = Call(adapter.PercepNetFilter(target_of(service.server)))
        await call.filter.start(16_000)
        for _ in range(2):
            await call.say(samples, 320)
            await call.hear(len(call.said) // 2)
            await asyncio.to_thread(service.wait_for, "percepnet_streams_active", 0)
        await call.filter.stop()
        return np.frombuffer(call.heard, np.int16)

    with serving(Service, bundled_enhancer()) as service:
        output = asyncio.run(main(service))
    expected = streamed(samples, 16_000)
    for half in np.split(output, 2):
        np.testing.assert_array_equal(half[: len(expected)], expected)
    assert not log.errors


@needs_pipecat
@pytest.mark.filterwarnings("default")  # of Pipecat and what it brings
@pytest.mark.parametrize("remote", [False, True])
def test_it_works_in_an_input_transport(adapter, server, remote):
    """Pipecat's own, in a pipeline: audio as it comes from a network, and the switch as a frame."""
    from pipecat.pipeline.pipeline import Pipeline
    from pipecat.pipeline.worker import PipelineParams, PipelineWorker
    from pipecat.processors.frame_processor import FrameProcessor
    from pipecat.transports.base_input import BaseInputTransport
    from pipecat.transports.base_transport import TransportParams
    from pipecat.workers.runner import WorkerRunner

    samples, late = speech(48_000, 1.6), latency(48_000)
    half = len(samples) // 2
    heard: list[bytes] = []

    class Source(BaseInputTransport):
        async def start(self, frame: Any) -> None:
            await super().start(frame)
            await self.set_transport_ready(frame)

    class Bot(FrameProcessor):
        async def process_frame(self, frame: Any, direction: Any) -> None:
            await super().process_frame(frame, direction)
            if isinstance(frame, adapter.frames.InputAudioRawFrame):
                heard.append(frame.audio)
            await self.push_frame(frame, direction)

    async def main() -> None:
        filter = adapter.PercepNetFilter(target_of(server) if remote else None)
        source = Source(TransportParams(audio_in_enabled=True, audio_in_filter=filter))
        worker = PipelineWorker(
            Pipeline([source, Bot()]),
            params=PipelineParams(audio_in_sample_rate=48_000),
            enable_rtvi=False,
            cancel_on_idle_timeout=False,
        )
        started = asyncio.Event()
        worker.add_event_handler("on_pipeline_started", lambda *_: started.set())

        async def speak(part: np.ndarray) -> None:
            for chunk in np.split(part, len(part) // 960):
                frame = adapter.frames.InputAudioRawFrame(chunk.tobytes(), 48_000, 1)
                await source.push_audio_frame(frame)
                await asyncio.sleep(0.01)

        async def hear(n_samples: int) -> None:
            while sum(map(len, heard)) < 2 * n_samples:
                await source.push_audio_frame(adapter.frames.InputAudioRawFrame(b"", 48_000, 1))
                await asyncio.sleep(0.01)

        async def call() -> None:
            await started.wait()
            await speak(samples[:half])
            await hear(half - late)
            await worker.queue_frame(adapter.frames.FilterEnableFrame(enable=False))
            await asyncio.sleep(0.1)
            await speak(samples[half:])
            await hear(len(samples) - late)
            await worker.queue_frame(adapter.frames.EndFrame())

        runner = WorkerRunner(handle_sigint=False)
        await runner.add_workers(worker)
        async with asyncio.timeout(TIMEOUT_SECONDS):
            await asyncio.gather(runner.run(), call())

    asyncio.run(main())
    output = np.frombuffer(b"".join(heard), np.int16)
    on, off = slice(half - late), slice(half + 9_600, len(samples) - late)
    np.testing.assert_array_equal(output[on], streamed(samples, 48_000)[on])
    np.testing.assert_array_equal(output[off], samples[off])


@needs_pipecat
def test_the_stand_ins_are_like_what_they_stand_for(adapter):
    from pipecat.audio.filters import base_audio_filter

    assert issubclass(adapter.PercepNetFilter, base_audio_filter.BaseAudioFilter)
    assert BaseAudioFilter.__abstractmethods__ == base_audio_filter.BaseAudioFilter.__abstractmethods__
    for frame in (FilterUpdateSettingsFrame, FilterEnableFrame):
        real = getattr(adapter.frames, frame.__name__)
        assert issubclass(real, adapter.frames.FilterControlFrame)
        assert {field.name for field in fields(frame)} <= {field.name for field in fields(real)}
