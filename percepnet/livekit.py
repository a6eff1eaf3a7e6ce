"""A noise canceller for LiveKit's audio streams; needs `livekit`."""

import numpy as np
from livekit import rtc

from percepnet.enhancer import Enhancer
from percepnet.stream import Stream, bundled_enhancer
from percepnet.synthesis import Controls
from service import pcm


class PercepNetProcessor(rtc.FrameProcessor[rtc.AudioFrame]):
    """Removes noise and reverberation from an AudioStream, as its `noise_cancellation`.

    controls: may be set on the way, click-free; `mix=0` gives the input with the same delay. enhancer: for a
    model of your own; the bundled one is shared by all.

    Each frame becomes one of the same length, 30 ms late (at other rates than 48 kHz a few more), and 10 ms
    more if frames are no multiples of 10 ms; a stream begins with as much lead-in. The work is done where
    the frames come in, each channel on its own. A processor is for one track at a time. Another track, sample
    rate or number of channels, or a while without `enabled`, begins a new stream.
    """

    def __init__(self, *, controls: Controls = Controls(), enhancer: Enhancer | None = None) -> None:
        self._controls = controls
        self._enhancer = enhancer or bundled_enhancer()
        self._enabled = True
        self._publication = ""
        self._format = (0, 0)
        self._channels: list[Stream] = []
        self._ready = np.zeros((0, 0), np.float32)  # (n, channels)

    @property
    def controls(self) -> Controls:
        """What was chosen; new ones apply from the next frame on."""
        return self._controls

    @controls.setter
    def controls(self, controls: Controls) -> None:
        self._controls = controls
        for channel in self._channels:
            channel.controls = controls

    @property
    def enabled(self) -> bool:
        """Whether frames are enhanced; others pass as they are, at once and without the delay."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        if value != self._enabled:
            self._enabled = value
            self._close()

    def _process(self, frame: rtc.AudioFrame) -> rtc.AudioFrame:
        if not self._enabled:
            return frame
        rate, n_channels, length = frame.sample_rate, frame.num_channels, frame.samples_per_channel
        if self._format != (rate, n_channels):
            self._format = (rate, n_channels)
            self._channels = [
                Stream(rate, controls=self._controls, enhancer=self._enhancer) for _ in range(n_channels)
            ]
            self._ready = np.zeros((0, n_channels), np.float32)
        samples = pcm.decode(frame.data[: length * n_channels], pcm.S16LE).reshape(length, n_channels)
        new = [stream.push(samples[:, i]) for i, stream in enumerate(self._channels)]
        ready = np.concatenate([self._ready, np.stack(new, axis=1)])
        if len(ready) < length:  # as much as a stream ever holds back
            ready = np.concatenate([np.zeros((rate // 100 + 1, n_channels), np.float32), ready])
        self._ready = ready[length:]
        audio = pcm.encode(ready[:length], pcm.S16LE).tobytes()
        return rtc.AudioFrame(audio, rate, n_channels, length, userdata=frame.userdata)

    def _on_stream_info_updated(
        self, *, room_name: str, participant_identity: str, publication_sid: str
    ) -> None:
        if self._publication not in ("", publication_sid):
            self._close()
        self._publication = publication_sid

    def _on_stream_info_cleared(self) -> None:
        self._close()

    def _close(self) -> None:
        self._format = (0, 0)
