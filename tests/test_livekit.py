"""The noise canceller for LiveKit gives what a stream gives, frame for frame, in LiveKit's own stream."""

import asyncio
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile

from percepnet.stream import Stream
from percepnet.synthesis import Controls
from service import pcm

rtc = pytest.importorskip("livekit.rtc")
from percepnet.livekit import PercepNetProcessor  # noqa: E402

NOISY = Path(__file__).parent / "data" / "noisy.wav"


def speech(rate: int, channels: int = 1) -> np.ndarray:
    """A second of samples of the noisy example, (n, channels) int16, whatever the rate."""
    samples = soundfile.read(NOISY, frames=channels * rate, dtype="int16")[0]
    return samples.reshape(channels, rate).T


def frame_of(samples: np.ndarray, rate: int, **options) -> rtc.AudioFrame:
    return rtc.AudioFrame(samples.tobytes(), rate, samples.shape[1], len(samples), **options)


def samples_of(frame: rtc.AudioFrame) -> np.ndarray:
    return np.frombuffer(frame.data, np.int16).reshape(-1, frame.num_channels)


def processed(
    processor: PercepNetProcessor, samples: np.ndarray, rate: int, lengths: list[int]
) -> np.ndarray:
    """What comes back for samples in frames of these lengths, over and over; each frame keeps its length."""
    output, start, i = [], 0, 0
    while start < len(samples):
        chunk = samples[start : start + lengths[i % len(lengths)]]
        frame = processor._process(frame_of(chunk, rate))
        assert (frame.sample_rate, frame.num_channels) == (rate, samples.shape[1])
        assert frame.samples_per_channel == len(chunk)
        output.append(samples_of(frame))
        start, i = start + len(chunk), i + 1
    return np.concatenate(output)


def streamed(samples: np.ndarray, rate: int, controls: Controls = Controls()) -> np.ndarray:
    """The same from a stream for each channel, in 16 bits."""
    channels = [
        Stream(rate, controls=controls).push(pcm.decode(channel.tobytes(), pcm.S16LE))
        for channel in samples.T
    ]
    return pcm.encode(np.stack(channels, axis=1), pcm.S16LE)


@pytest.mark.parametrize(
    ("rate", "channels", "frame_ms"),
    [(8_000, 1, 20), (16_000, 1, 10), (24_000, 1, 50), (44_100, 2, 10), (48_000, 1, 10), (48_000, 2, 50)],
)
def test_frames_hold_what_a_stream_gives(rate, channels, frame_ms):
    samples = speech(rate, channels)
    output = processed(PercepNetProcessor(), samples, rate, [rate * frame_ms // 1000])
    expected = streamed(samples, rate)
    n_samples = min(len(output), len(expected))
    assert n_samples >= len(samples) - rate // 100
    np.testing.assert_array_equal(output[:n_samples], expected[:n_samples])


@pytest.mark.parametrize("rate", [44_100, 48_000])
@pytest.mark.parametrize("lengths", [[1, 2], [441], [479], [160, 3, 0, 999], [480, 480, 7]])
def test_frames_of_any_length_are_answered_in_full(rate, lengths):
    """With up to 10 ms more of silence in one place; nothing is lost."""
    samples, dry = speech(rate)[: rate // 8], Controls(mix=0)
    output, expected = (
        processed(PercepNetProcessor(controls=dry), samples, rate, lengths),
        streamed(samples, rate, dry),
    )
    n_samples = min(len(output), len(expected))
    differs = (output[:n_samples] != expected[:n_samples]).any(axis=1)
    if differs.any():
        first, silence = np.argmax(differs), rate // 100 + 1
        rest = output[first + silence :]
        assert len(rest) > len(samples) // 4
        np.testing.assert_array_equal(rest, expected[first : first + len(rest)])


def test_controls_change_on_the_way_and_keep_the_delay():
    samples, half = speech(48_000), 24_000
    processor, stream, outputs = PercepNetProcessor(), Stream(), []
    for part, controls in ((samples[:half], Controls()), (samples[half:], Controls(mix=0))):
        processor.controls = stream.controls = controls
        outputs.append(processed(processor, part, 48_000, [480]))
        expected = pcm.encode(stream.push(pcm.decode(part.tobytes(), pcm.S16LE)), pcm.S16LE)
        np.testing.assert_array_equal(outputs[-1][:, 0], expected)
    assert processor.controls == Controls(mix=0)
    late = stream.latency_samples
    np.testing.assert_array_equal(outputs[1][late:], samples[half:-late])


def test_the_model_may_be_another(enhancer):
    samples = speech(48_000)[:9_600]
    output = processed(PercepNetProcessor(enhancer=enhancer), samples, 48_000, [480])
    expected = Stream(enhancer=enhancer).push(pcm.decode(samples.tobytes(), pcm.S16LE))
    np.testing.assert_array_equal(output[:, 0], pcm.encode(expected, pcm.S16LE))


def test_it_can_be_switched_off_and_on():
    samples = speech(48_000)
    processor = PercepNetProcessor()
    processed(processor, samples[:9_600], 48_000, [480])
    processor.enabled = False
    assert not processor.enabled
    np.testing.assert_array_equal(processed(processor, samples, 48_000, [480]), samples)
    processor.enabled = True
    parts = []
    for half in np.split(samples, 2):
        parts.append(processed(processor, half, 48_000, [480]))
        processor.enabled = True  # as it was: nothing changes
    np.testing.assert_array_equal(np.concatenate(parts), streamed(samples, 48_000))


@pytest.mark.parametrize("end", ["format", "track", "_close", "_on_stream_info_cleared"])
def test_nothing_of_a_stream_is_heard_in_the_next(end):
    samples = speech(48_000)
    processor = PercepNetProcessor()
    tell = partial(processor._on_stream_info_updated, room_name="room", participant_identity="who")
    tell(publication_sid="one")
    processed(processor, samples[:4_800], 48_000, [480])
    if end == "format":
        processed(processor, speech(16_000, 2)[:1_600], 16_000, [160])
    elif end == "track":
        tell(publication_sid="another")
    else:
        getattr(processor, end)()
    np.testing.assert_array_equal(processed(processor, samples, 48_000, [480]), streamed(samples, 48_000))


def test_user_data_stays_and_what_is_behind_the_samples_does_not_matter():
    samples = speech(48_000)[:480]
    data = {"id": 7}
    frame = rtc.AudioFrame(samples.tobytes() + b"\x01\x02", 48_000, 1, 480, userdata=data)
    output = PercepNetProcessor()._process(frame)
    assert output.userdata is data
    assert output.samples_per_channel == 480
    assert len(output.data) == 480


class Recorder(PercepNetProcessor):
    """Keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[np.ndarray] = []

    def _process(self, frame: rtc.AudioFrame) -> rtc.AudioFrame:
        self.given.append(samples_of(frame))
        return super()._process(frame)


@pytest.mark.parametrize(("rate", "frame_ms"), [(24_000, 50), (48_000, 10)])
def test_it_works_in_an_audio_stream(rate, frame_ms):
    """LiveKit's own, of a local track that is played and heard; its agents want 24 kHz and 50 ms."""
    samples, processor = speech(rate), Recorder()

    async def heard() -> np.ndarray:
        source = rtc.AudioSource(rate, 1)
        track = rtc.LocalAudioTrack.create_audio_track("noisy", source)
        stream = rtc.AudioStream.from_track(
            track=track, sample_rate=rate, frame_size_ms=frame_ms, noise_cancellation=processor
        )

        async def speak() -> None:
            for chunk in np.split(samples, 100):
                await source.capture_frame(frame_of(chunk, rate))

        speaking = asyncio.create_task(speak())
        frames = []
        async for event in stream:
            frames.append(samples_of(event.frame))
            if len(frames) * frame_ms >= 500:
                break
        await speaking
        await stream.aclose()
        return np.concatenate(frames)

    output = asyncio.run(asyncio.wait_for(heard(), 60))
    assert output.any()
    given = np.concatenate(processor.given)
    np.testing.assert_array_equal(output, streamed(given, rate)[: len(output)])
