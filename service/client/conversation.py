"""What a live stream has asked and what came back: the part of the client that knows no network.

It outlives the connection. A server that is about to stop gives the stream's state away, and another one goes
on from it without a difference. If the server is lost, so is the state: what was asked is kept until its
answer has come, and so is the last second of what was answered; `opening` makes of it the messages that bring
another server to where the lost one was. Either way the next answer goes on at the very sample where the
answers stopped: none is missing or doubled.
"""

import time
from collections import deque
from dataclasses import dataclass
from enum import Enum

import numpy as np

from percepnet.errors import ParameterError, PercepNetError
from percepnet.synthesis import Controls
from service import pcm
from service.limits import MAX_MESSAGE_SECONDS, MAX_RATE_HZ, MIN_RATE_HZ, longest_clip
from service.pb.percepnet_service.v1 import enhancement_pb2 as pb

MEMORY_SECONDS = 0.5
"""Answered audio that is kept to warm up another server. Its output then differs from that of an unbroken
stream by −27 dB (mean over cuts in the example recording); by −21 dB without, and by −30 dB after a second,
which takes twice as long to enhance again."""

FADE_SECONDS = 0.005
"""Over this time the step between the old server's last sample and the new one's signal is faded out."""

WINDOW_SECONDS = 1.0
"""Audio that may be unanswered before sending waits: what a server takes by default."""

SERVICE = "/" + pb.DESCRIPTOR.services_by_name["EnhancementService"].full_name

Request = pb.EnhanceStreamRequest
Response = pb.EnhanceStreamResponse


class Mark(Enum):
    """What can be asked of a stream beside audio and new parameters."""

    FLUSH = "flush"
    """The tail of all that was sent; the next samples begin a new passage."""
    END = "end"
    """The tail, and the end of the stream."""


Item = np.ndarray | Controls | Mark
"""What can be sent: samples, float32 (n,) with full scale ±1; parameters, for what is not enhanced yet; a
mark."""


@dataclass(frozen=True)
class Answer:
    """What came back for one item."""

    samples: np.ndarray
    """Enhanced, float32 (n,); none for parameters."""
    position: int
    """Number of the input sample in its passage that the first one belongs to, or parameters apply from."""
    message: Response
    """All that the server said: reports, queues, whether it is about to stop."""


@dataclass(frozen=True)
class Opening:
    """How a connection begins."""

    messages: list[Request]
    n_repeated: int
    """Messages of audio that were answered before."""
    base: int
    """Position of the first sample on this connection in its passage."""


class EndedError(PercepNetError):
    """The stream, or its client, was closed, so nothing can be sent or received any more."""


class TurnError(PercepNetError):
    """It is not this call's turn: the stream's next answers belong to another one."""


class Conversation:
    """One stream's side of the talk, whatever server it is held with.

    The arguments are the fields of the proto's StreamConfig; the delay is compensated on this side. Raises
    ParameterError for numbers that are not accepted.
    """

    def __init__(
        self,
        sample_rate: int,
        controls: Controls = Controls(),
        *,
        message_samples: int = 0,
        compensate_delay: bool = False,
        report: bool = False,
        never_dry: bool = False,
    ) -> None:
        self.sample_rate = _rate(sample_rate)
        self.started = pb.StreamStarted()
        """The server's description of the stream."""
        self.ended = False
        """The end was answered: nothing more comes."""
        self.unanswered_samples = 0
        self.n_answers = 0
        self._config = pb.StreamConfig(
            sample_rate_hz=self.sample_rate,
            encoding=pb.ENCODING_F32LE,
            parameters=_parameters(controls),
            message_samples=_whole(
                "message_samples", message_samples, 0, self.sample_rate * MAX_MESSAGE_SECONDS
            ),
            report=report,
            never_dry=never_dry,
        )
        self._compensate = compensate_delay
        self._asked: deque[Request] = deque()  # not answered yet
        self._past: deque[bytes] = deque()  # answered, the newest part of the passage
        self._n_past = 0  # samples in it
        self._n_answered = 0  # of the passage
        self._lead_in: int | None = None  # samples of the passage still to leave out
        self._opening = Opening([], 0, 0)
        self._n_repeats_due = 0
        self._last_sample = np.float32(0)
        self._fade = np.zeros(0, np.float32)  # to add to the next samples

    def ask(self, item: Item) -> Request:
        """The message for one of the `pieces` of an item, which is due an answer from now on."""
        if isinstance(item, Controls):
            request = Request(parameters=_parameters(item))
        elif item is Mark.FLUSH:
            request = Request(flush=pb.Flush())
        elif item is Mark.END:
            request = Request(end=pb.End())
        else:
            request = Request(audio=_encode(item))
        self._asked.append(request)
        self.unanswered_samples += _n_samples(request)
        return request

    def pieces(self, item: Item) -> list[Item]:
        """An item in as few messages as it fits in; raises ParameterError.

        With `message_samples`, audio that is no multiple of it is refused: its answer would wait for samples
        that nobody sends meanwhile.
        """
        if isinstance(item, Controls | Mark):
            return [item]
        samples, size = _checked(item, self._config.message_samples or 1), self._longest()
        return [samples[i : i + size] for i in range(0, len(samples), size)] or [samples]

    def opening(self) -> Opening:
        """The messages with which a server is told all it has to know; changes nothing."""
        past = b"".join(self._past)
        size = self._longest() * pcm.F32LE.itemsize
        repeated = [Request(audio=past[i : i + size]) for i in range(0, len(past), size)]
        messages = [Request(config=self._config), *repeated, *self._asked]
        return Opening(messages, len(repeated), self._n_answered - self._n_past)

    def opened(self, opening: Opening, response: Response) -> None:
        """A server has answered the first message of an opening: the talk goes on there.

        Raises ParameterError if it would answer with another delay.
        """
        delay = response.started.delay_samples
        if self.started.ByteSize() and delay != self.started.delay_samples:
            raise ParameterError(
                f"a delay of {delay} samples; the stream began with {self.started.delay_samples}"
            )
        self.started = response.started
        self._opening = opening
        self._n_repeats_due = opening.n_repeated
        if self._lead_in is None:
            self._lead_in = delay if self._compensate else 0

    @property
    def n_asked(self) -> int:
        """Items asked so far."""
        return self.n_answers + len(self._asked)

    @property
    def has_room(self) -> bool:
        """Whether more may be asked: no more than a window of audio is unanswered."""
        return self.unanswered_samples <= WINDOW_SECONDS * self.sample_rate

    @property
    def movable(self) -> bool:
        """Whether the server would hand the stream over."""
        return bool(self.started.challenge)

    @property
    def ending(self) -> bool:
        """Whether the end was asked for, and its answer is still to come."""
        return bool(self._asked) and self._asked[-1].HasField("end")

    def hand_over(self, elsewhere: Response) -> Request:
        """Asks for the stream's state, for the server that answered an opening's first message."""
        return Request(hand_over=pb.HandOver(challenge=elsewhere.started.challenge))

    def moved(self, elsewhere: Response, handed_over: Response) -> Request:
        """The message that lets that server go on; all that was asked is answered by now."""
        assert not self._asked
        self.started = elsewhere.started
        return Request(resume=pb.Resume(state=handed_over.handed_over.state))

    def take(self, response: Response) -> Answer | None:
        """The next message of the server; None if it only repeats what is known."""
        kind = response.WhichOneof("payload")
        if kind == "parameters":
            self.n_answers += 1
            self._config.parameters.CopyFrom(self._asked.popleft().parameters)
            response.parameters.position += self._opening.base
            return Answer(np.zeros(0, np.float32), response.parameters.position, response)
        samples = pcm.decode(response.audio.audio, pcm.F32LE)
        if self._n_repeats_due:
            self._n_repeats_due -= 1
            if not self._n_repeats_due and self._opening.base:
                self._join(samples)
            return None
        self.n_answers += 1
        samples = self._continue(samples)
        response.audio.position += self._opening.base
        left_out = min(self._lead_in or 0, len(samples))
        if left_out:
            self._lead_in = (self._lead_in or 0) - left_out
            response.audio.position += left_out
            samples = samples[left_out:]
        self._remember(self._asked.popleft())
        return Answer(samples, response.audio.position, response)

    def _longest(self) -> int:
        """Samples of the longest message."""
        most = self.sample_rate * MAX_MESSAGE_SECONDS
        return most - most % (self._config.message_samples or 1)

    def _remember(self, request: Request) -> None:
        """Note that a request is answered."""
        if request.HasField("audio"):
            n_samples = _n_samples(request)
            self.unanswered_samples -= n_samples
            self._n_answered += n_samples
            self._n_past += n_samples
            self._past.append(request.audio)
            spare = self._n_past - self.started.delay_samples - round(MEMORY_SECONDS * self.sample_rate)
            while self._past and (oldest := len(self._past[0]) // pcm.F32LE.itemsize) <= spare:
                self._past.popleft()
                self._n_past -= oldest
                spare -= oldest
            return
        self.ended = request.HasField("end")
        self._past.clear()
        self._n_past = self._n_answered = 0
        self._opening = Opening([], 0, 0)
        self._lead_in = self.started.delay_samples if self._compensate else 0

    def _join(self, repeated: np.ndarray) -> None:
        """Begin the fade from the last sample that came of the old server."""
        step = self._last_sample - repeated[-1]
        self._fade = step * np.linspace(1, 0, round(FADE_SECONDS * self.sample_rate), dtype=np.float32)

    def _continue(self, samples: np.ndarray) -> np.ndarray:
        """The samples with what is left of a fade."""
        if n_faded := min(len(self._fade), len(samples)):
            samples = samples.copy()
            samples[:n_faded] += self._fade[:n_faded]
            self._fade = self._fade[n_faded:]
        if len(samples):
            self._last_sample = samples[-1]
        return samples


class Pace:
    """When the items of a stream were spoken, by a clock that starts with the first."""

    def __init__(self, sample_rate: int) -> None:
        self._sample_rate = sample_rate
        self._n_samples = 0
        self._start = time.monotonic()

    def seconds_until_spoken(self, item: Item) -> float:
        """How long to wait until the last sample of the next item would have been spoken."""
        if isinstance(item, np.ndarray):
            self._n_samples += len(item)
        return max(0.0, self._start + self._n_samples / self._sample_rate - time.monotonic())


def clip_request(samples: np.ndarray, sample_rate: int, controls: Controls) -> pb.EnhanceClipRequest:
    """Asks for a clip, float32 (n,); raises ParameterError."""
    rate, samples = _rate(sample_rate), _checked(samples)
    if len(samples) > (longest := longest_clip(rate, pcm.F32LE.itemsize)):
        raise ParameterError(f"{len(samples)} samples; a clip takes {longest}, a stream any number")
    return pb.EnhanceClipRequest(
        sample_rate_hz=rate,
        encoding=pb.ENCODING_F32LE,
        parameters=_parameters(controls),
        audio=_encode(samples),
    )


def _rate(sample_rate: int) -> int:
    return _whole("sample_rate", sample_rate, MIN_RATE_HZ, MAX_RATE_HZ)


def _whole(name: str, value: int, least: int, most: int) -> int:
    """A number that is accepted; raises ParameterError."""
    if not isinstance(value, int | np.integer) or not least <= value <= most:
        raise ParameterError(f"{name}: {value!r}; accepted are whole numbers from {least} to {most}")
    return int(value)


def _encode(samples: np.ndarray) -> bytes:
    """Checked samples as they are sent."""
    return samples.astype(pcm.F32LE).tobytes()


def _checked(samples: np.ndarray, step: int = 1) -> np.ndarray:
    """Samples that can be sent, as many as a multiple of `step`; raises ParameterError."""
    samples = np.asarray(samples)
    if samples.ndim != 1:
        raise ParameterError(f"samples of shape {samples.shape}; the service takes one channel, shape (n,)")
    if samples.dtype.kind != "f":
        raise ParameterError(f"{samples.dtype} samples; the service takes floats with full scale ±1")
    if len(samples) % step:
        raise ParameterError(f"{len(samples)} samples; this stream takes multiples of {step}")
    return samples


def _parameters(controls: Controls) -> pb.Parameters:
    return pb.Parameters(
        attenuation_limit_db=controls.attenuation_limit_db, mix=controls.mix, postfilter=controls.postfilter
    )


def _n_samples(request: Request) -> int:
    return len(request.audio) // pcm.F32LE.itemsize
