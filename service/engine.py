"""The engine of live streams: sessions bring samples, each round enhances the frames of all that are ready.

Nothing here waits or knows the network: `service.ticker` says when a round runs, `service.grpc_server`
carries bytes. The memory of all sessions lies in one state with a row per session.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from math import gcd

import numpy as np

from percepnet import rows, snapshot
from percepnet.constants import HOP, SAMPLE_RATE
from percepnet.enhancer import Enhancer, Findings
from percepnet.errors import ParameterError, SnapshotError
from percepnet.stream import FrameAdapter
from percepnet.synthesis import Controls, FrameControls
from service import pcm
from service.arrivals import Arrivals
from service.cpu import CpuStages, MeteredModel
from service.errors import BusyError, CrowdedError
from service.metrics import Metrics

RAMP_FRAMES = 5
"""Frames, 50 ms, over which a parameter goes from one end of its range to the other."""

ROUND_FRAMES = 16
"""Frames of a round, all sessions together, but up to two of each that is ready (what a message of 20 ms
holds): one that sends faster than it speaks must not keep the others waiting."""

DEADLINE_SECONDS = HOP / SAMPLE_RATE
"""A frame should be answered before the next one is there."""

LATE_SECONDS = 0.04
"""By so much at most an enhanced frame may miss its deadline: a call hides some 40 ms of jitter. Later ones
are sent dry, so that the stream is in time again."""

PACE_SECONDS = 0.99 * DEADLINE_SECONDS
"""How fast the frames of somebody who speaks can follow each other, with room for clocks that differ."""

LEAD_SECONDS = 0.5
"""Whoever sends so far ahead of that pace does not speak, and has time: no frame is sent dry."""


@dataclass(frozen=True)
class Options:
    """What a session was opened with."""

    sample_rate: int
    encoding: np.dtype = pcm.S16LE
    controls: Controls = Controls()
    message_samples: int = 0
    """In every message, or 0 for any number."""
    compensate_delay: bool = False
    report: bool = False
    never_dry: bool = False
    """Whether every frame is enhanced, however late."""
    shares_messages: bool = False
    """Whether it comes and goes in the same messages as other sessions."""

    @property
    def messages_per_frame(self) -> float:
        """How often its messages come, as far as that was promised; otherwise one with each frame."""
        return self.sample_rate * DEADLINE_SECONDS / self.message_samples if self.message_samples else 1.0


@dataclass
class Room:
    """What live streams may take of a process, in seconds of each frame's 10 ms, or in any other unit."""

    left: float
    stream: float = 1.0
    """What each stream takes."""
    message: float = 0.0
    """What each of its messages takes besides."""
    sharing: float = 1.0
    """What a stream takes that shares its messages, in all."""

    def __post_init__(self) -> None:
        self._whole = self.left

    def cost(self, options: Options) -> float:
        """What a stream takes; at most all there is, so that one alone is served however it sends."""
        apart = self.stream + self.message * options.messages_per_frame
        return min(self.sharing if options.shares_messages else apart, self._whole)

    @property
    def plain_streams(self) -> int:
        """How many streams fit in what is left if they send 10 ms at a time."""
        return max(0, int(self.left / (self.stream + self.message) + 1e-6))

    @property
    def most_streams(self) -> int:
        """How many fit at most, however few messages they send."""
        return int(self.left / min(self.stream, self.sharing) + 1e-6)


@dataclass(frozen=True)
class Report:
    """Means over the frames enhanced since the last report."""

    speech_probability: float
    pitch_hz: float
    """Of the voiced frames; 0 if there are none."""
    mean_gain: float


@dataclass(slots=True)
class Answer:
    """What answers one message: its samples, or the new controls."""

    since: float
    """When the last sample it needed came, by the engine's clock."""
    position: int
    audio: bytes = b""
    n_samples: int = 0
    flushed: bool = False
    controls: Controls | None = None
    report: Report | None = None
    dry: bool = False
    """Whether some of the samples were sent without enhancement."""


@dataclass(slots=True)
class _Asked:
    """A message that waits for its answer."""

    n_samples: int
    since: float
    flushed: bool = False
    controls: Controls | None = None
    position: int = 0
    """Of the first sample that new controls apply to."""


class Session:
    """One live mono stream.

    Answers come in the order of the messages, into `answers`; `on_answer` is called after some were added.
    `error` is set, and `on_answer` called, when the engine gives the session up.
    """

    def __init__(self, engine: "Engine", row: int, options: Options, on_answer: Callable[[], None]) -> None:
        self.row = row
        self.options = options
        self.answers: deque[Answer] = deque()
        self.queued_samples = 0
        """Samples asked for whose answers were not taken yet."""
        self.error: Exception | None = None
        self.n_samples = 0  # over all passages, for the books
        self.n_passages = 0  # that were flushed
        self.n_dry = 0  # frames that were sent dry
        self.cost = 0.0  # of the engine's room
        self._promised = options.message_samples  # in every message, until one is shorter
        self.on_answer = on_answer
        self._engine = engine
        self._begin()
        self.delay_samples = self._adapter.latency_samples + self._prefill

    def _begin(self) -> None:
        """Start a passage."""
        options = self.options
        self._adapter = FrameAdapter(options.sample_rate, 1)
        self._prefill = prefill(options.sample_rate, options.message_samples)
        delay = self._adapter.latency_samples + self._prefill
        self._frames = np.zeros(0, np.float32)
        self._since = 0.0  # when the newest whole frame was complete
        self._due: deque[float] = deque()  # when each waiting frame should be answered
        self._paced = -math.inf  # when the newest frame came, or would have come at the pace of speech
        self._is_ahead = False  # of that pace, further than somebody who speaks
        self._dry = (0, 0)  # the newest of the output samples that were sent dry
        self._n_heard = self._n_asked = self._n_answered = self._n_made = 0
        self._lead_in = delay if options.compensate_delay else 0  # samples that nobody asks for
        self._shift = self._lead_in - delay  # from output samples to input samples
        self._made: deque[np.ndarray] = deque()
        self._n_there = 0  # samples made and not yet answered with
        self._asked: deque[_Asked] = deque()
        self._report = np.zeros(5)  # sums over frames, their number, and that of voiced ones
        self._drop = self._lead_in
        self._keep(np.zeros(self._prefill, options.encoding))

    @property
    def n_frames(self) -> int:
        """Whole frames that wait to be enhanced."""
        return len(self._due)

    @property
    def n_unanswered(self) -> int:
        """Messages whose answers were not taken yet."""
        return len(self._asked) + len(self.answers)

    def take_answer(self) -> Answer:
        """The oldest of the answers."""
        answer = self.answers.popleft()
        self.queued_samples -= answer.n_samples
        return answer

    def push(self, samples: np.ndarray, now: float) -> None:
        """Take the samples of one message, float32 (n,); not while a flush is under way.

        now: when they are taken; they may have come before.
        """
        if not self._is_ahead:  # whose next message nobody can expect
            now = self._engine.arrivals.came(self._paced + DEADLINE_SECONDS, now)
        if len(samples) < self._promised:
            self._promised = 0
            self._engine.charge_unpromised(self)
        self.n_samples += len(samples)
        self._n_heard += len(samples)
        due = max(0, self._n_heard - self._lead_in)
        self._ask(_Asked(due - self._n_asked, now))
        self._hear(samples, now)

    def update(self, controls: Controls, now: float) -> None:
        """Change the parameters from the next enhanced frame on; at once if the passage has not begun."""
        self._engine.aim(self.row, controls, at_once=not self._n_heard)
        position = max(0, self._n_made - self._adapter.latency_samples)
        self._ask(_Asked(0, now, controls=controls, position=position))
        self._settle(now)

    def flush(self, now: float) -> None:
        """Ask for the tail; the passage ends with its answer, and a new one begins."""
        rest = self._n_heard + self.delay_samples - self._lead_in - self._n_asked
        self._ask(_Asked(rest, now, flushed=True))
        hop = math.ceil(self.options.sample_rate * HOP / SAMPLE_RATE)
        # A hop of silence rounds the last frame up, one more covers the rounding between the rates.
        self._hear(np.zeros(self._adapter.latency_samples + 2 * hop, np.float32), now)

    def n_late(self, now: float) -> int:
        """Frames to be sent dry: once the oldest one is too late, all that are past their deadlines.

        The lateness of a frame counts from when it came, or would have come had it been sent as it was
        spoken: the queue of somebody who sends faster is no fault of the engine.
        """
        if self.options.never_dry or self._is_ahead or not self._due or now <= self._due[0] + LATE_SECONDS:
            return 0
        return sum(due < now for due in self._due)

    def take_frames(self, n_frames: int) -> np.ndarray:
        """The oldest waiting frames, float32 (n_frames·480,)."""
        for _ in range(n_frames):
            self._due.popleft()
        frames, self._frames = self._frames[: n_frames * HOP], self._frames[n_frames * HOP :]
        return frames

    def deliver(
        self,
        samples: np.ndarray,
        encoded: np.ndarray | None,
        found: np.ndarray | None = None,
        *,
        dry: bool = False,
    ) -> None:
        """Take finished frames, float32 (frames·480,), and what was found in them, (3, frames).

        encoded: the same in the type of the wire; None unless the session is at 48 kHz.
        """
        if encoded is None:
            ready = self._adapter.from_frames(samples[np.newaxis])[0]
            encoded = pcm.encode(ready, self.options.encoding)
        self._n_made += len(encoded)
        start = self._n_answered + self._n_there
        self._keep(encoded)
        if dry:
            self.n_dry += len(samples) // HOP
            first = self._dry[0] if self._dry[1] > self._n_answered else start
            self._dry = first, self._n_answered + self._n_there
        if found is not None:
            self._report += (*found.sum(axis=1), found.shape[1], np.count_nonzero(found[1]))
        self._settle(self._since)

    def save(self) -> snapshot.Arrays:
        """All that is remembered of the passage beside the engine's row, once no frames wait.

        Raises ParameterError while a message waits for samples that come after it.
        """
        if self._asked:
            raise ParameterError(
                f"hand_over: {self._asked[0].n_samples} samples wait for more audio; "
                f"the config promised messages of {self.options.message_samples}"
            )
        counts = [self._n_heard, self._n_asked, self._n_answered, self._n_made, self._drop]
        return {
            "config": self._config,
            "counts": np.array(counts),
            "report": self._report,
            "made": np.concatenate([np.zeros(0, self.options.encoding), *self._made]),
            **self._adapter.save("adapter"),
        }

    def restore(self, arrays: snapshot.Arrays) -> None:
        """Go on from what was saved; raises SnapshotError."""
        config = snapshot.take(arrays, "config", np.int64, len(self._config))
        if (config != self._config).any():
            raise SnapshotError("resume.state: of a stream with another config")
        counts = snapshot.take(arrays, "counts", np.int64, 5).tolist()
        self._n_heard, self._n_asked, self._n_answered, self._n_made, self._drop = counts
        self._report = snapshot.take(arrays, "report", np.float64, 5)
        self._made = deque([snapshot.take(arrays, "made", self.options.encoding, None)])
        self._n_there = len(self._made[0])
        self._adapter.restore(arrays, "adapter")

    @property
    def n_heard(self) -> int:
        """Input samples of the passage so far."""
        return self._n_heard

    @property
    def _config(self) -> np.ndarray:
        """What must not change with the server; the parameters may."""
        chosen = self.options
        return np.array(
            [
                chosen.sample_rate,
                chosen.encoding.itemsize,
                chosen.message_samples,
                chosen.compensate_delay,
                chosen.report,
            ]
        )

    def fail(self, error: Exception) -> None:
        """Give the session up."""
        self.error = self.error or error
        self._frames = self._frames[:0]
        self._due.clear()
        self.on_answer()

    def _ask(self, asked: _Asked) -> None:
        self._n_asked += asked.n_samples
        self.queued_samples += asked.n_samples
        self._asked.append(asked)

    def _hear(self, samples: np.ndarray, now: float) -> None:
        frames = self._adapter.to_frames(samples[np.newaxis])[0]
        if len(frames):
            self._frames = np.concatenate([self._frames, frames]) if len(self._frames) else frames
            self._since = now
            self._pace(len(frames) // HOP, now)
            self._engine.expect(self)
        self._settle(now)

    def _pace(self, n_frames: int, now: float) -> None:
        """Note when new frames are due."""
        if not self._due and self._paced + PACE_SECONDS <= now:
            self._is_ahead = False
        for _ in range(n_frames):
            self._paced = max(self._paced + PACE_SECONDS, now)
            self._due.append(self._paced + DEADLINE_SECONDS)
        self._is_ahead = self._is_ahead or self._paced - now > LEAD_SECONDS

    def _keep(self, samples: np.ndarray) -> None:
        dropped = min(self._drop, len(samples))
        self._drop -= dropped
        if dropped < len(samples):
            self._made.append(samples[dropped:])
            self._n_there += len(samples) - dropped

    def _settle(self, now: float) -> None:
        """Answer the messages whose samples are there."""
        answered = False
        while self._asked and self._asked[0].n_samples <= self._n_there:
            asked = self._asked.popleft()
            self.answers.append(self._answer(asked, max(now, asked.since)))
            answered = True
            if asked.flushed:
                self.n_passages += 1
                self._begin()
                self._engine.forget(self)
                break
        if answered:
            self._engine.tell(self)

    def _answer(self, asked: _Asked, since: float) -> Answer:
        if asked.controls is not None:
            return Answer(since, asked.position, controls=asked.controls)
        position = self._n_answered + self._shift
        dry = self._n_answered < self._dry[1] and self._dry[0] < self._n_answered + asked.n_samples
        self._n_answered += asked.n_samples
        self._n_there -= asked.n_samples
        audio = self._take(asked.n_samples)
        answer = Answer(since, position, audio, asked.n_samples, asked.flushed, dry=dry)
        if self._report[3]:
            speech, pitch, gain, n_frames, n_voiced = self._report.tolist()
            answer.report = Report(speech / n_frames, pitch / max(1, n_voiced), gain / n_frames)
            self._report[:] = 0
        return answer

    def _take(self, n_samples: int) -> bytes:
        """The next output samples as bytes."""
        if n_samples and len(self._made[0]) == n_samples:
            return self._made.popleft().tobytes()
        samples = np.concatenate([np.zeros(0, self.options.encoding), *self._made])
        self._made.clear()
        if n_samples < len(samples):
            self._made.append(samples[n_samples:])
        return samples[:n_samples].tobytes()


class Engine:
    """All live streams of one process, on one enhancer.

    capacity: streams at once, or the room for them. on_work: called when frames came while none waited. All
    methods are called from one thread.
    """

    def __init__(self, enhancer: Enhancer, capacity: int | Room, metrics: Metrics) -> None:
        self._model = MeteredModel(enhancer.model)
        self._enhancer = Enhancer(self._model)
        self._metrics = metrics
        self._room = Room(capacity) if isinstance(capacity, int) else capacity
        n_rows = self._room.most_streams
        self.cpu: CpuStages = metrics.cpu
        self.arrivals = Arrivals()
        self.on_work: Callable[[], None] = lambda: None
        self.quiet = threading.Event()
        """Set while no frames wait; files have the CPU then."""
        self.quiet.set()
        self._free = list(range(n_rows))[::-1]
        self.n_apart = 0
        """Open sessions with messages of their own."""
        self._ready: dict[Session, None] = {}  # a set that keeps the order of arrival
        self._answered: list[Session] | None = None  # in a round
        self._state = enhancer.initial_state(n_rows)
        self._nothing_heard = enhancer.initial_state(1)
        # Rows: share of the enhanced spectrum, share of the postfiltered gains.
        self._now = np.ones((2, n_rows), np.float32)
        self._aim = np.ones((2, n_rows), np.float32)
        self._ramps = False  # whether some may differ
        metrics.load.changed(0, self.capacity)

    @property
    def active(self) -> int:
        """Sessions that are open."""
        return self._aim.shape[1] - len(self._free)

    @property
    def capacity(self) -> int:
        """Sessions that may be open: those that are, and as many as fit beside them."""
        return self.active + self._room.plain_streams

    @property
    def queued_frames(self) -> int:
        """Frames that wait."""
        return sum(session.n_frames for session in self._ready)

    @property
    def has_work(self) -> bool:
        """Whether frames wait."""
        return bool(self._ready)

    def open(self, options: Options, on_answer: Callable[[], None]) -> Session:
        """Begin a session; raises BusyError if there is no room, ParameterError for a rate out of range."""
        cost = self._room.cost(options)
        if cost > self._room.left * (1 + 1e-6) or not self._free:
            self._metrics.streams_rejected.inc()
            if self._metrics.board.room_elsewhere:
                raise CrowdedError(
                    f"all {self.active} live streams of this worker are taken; others have room"
                )
            n_streams = self._metrics.board.total("streams")
            raise BusyError(f"all {n_streams:.0f} live streams of this server are taken")
        session = Session(self, self._free[-1], options, on_answer)
        row = self._free.pop()
        self._charge(session, cost)
        self.n_apart += not options.shares_messages
        self.aim(row, options.controls, at_once=True)
        self.forget(session)
        return session

    def close(self, session: Session) -> None:
        """End a session; frames that wait are dropped."""
        self._ready.pop(session, None)
        self._free.append(session.row)
        self._charge(session, 0.0)
        self.n_apart -= not session.options.shares_messages
        self._rest()

    def charge_unpromised(self, session: Session) -> None:
        """A session breaks its promise of long messages, and takes what it would without one, room or not."""
        self._charge(session, max(session.cost, self._room.cost(replace(session.options, message_samples=0))))

    def _charge(self, session: Session, cost: float) -> None:
        self._room.left += session.cost - cost
        session.cost = cost
        self._metrics.load.changed(self.active, self.capacity)

    def aim(self, row: int, controls: Controls, *, at_once: bool) -> None:
        """Let a row's parameters go to new values from its next frame on."""
        self._aim[:, row] = controls.wet, controls.postfilter
        if at_once:
            self._now[:, row] = self._aim[:, row]
        else:
            self._ramps = True

    def forget(self, session: Session) -> None:
        """Put a session's memory back to the beginning of a passage; frames that wait are dropped."""
        self._ready.pop(session, None)
        self._rest()
        rows.put(self._state, rows.select([session.row]), self._nothing_heard)
        self._now[:, session.row] = self._aim[:, session.row]

    def save(self, session: Session) -> bytes:
        """A snapshot of a session of which no frames wait, with its parameters; raises ParameterError."""
        row = rows.select([session.row])
        controls = np.stack([self._now[:, session.row], self._aim[:, session.row]])
        arrays = session.save() | {"controls": controls}
        arrays |= snapshot.flatten(rows.take(self._state, row), "path")
        return snapshot.pack(arrays, self._model.manifest.sha256)

    def restore(self, session: Session, data: bytes) -> None:
        """Let a session that has heard nothing go on from a snapshot; raises SnapshotError."""
        arrays = snapshot.unpack(data, self._model.manifest.sha256)
        session.restore(arrays)
        self._now[:, session.row], self._aim[:, session.row] = snapshot.take(
            arrays, "controls", np.float32, 2, 2
        )
        self._ramps = True
        state = snapshot.take_state(arrays, "path", self._nothing_heard)
        snapshot.finish(arrays)
        rows.put(self._state, rows.select([session.row]), state)

    def expect(self, session: Session) -> None:
        """A session has whole frames waiting."""
        if not self._ready:
            self.quiet.clear()
            self.on_work()
        self._ready[session] = None

    def tell(self, session: Session) -> None:
        """A session has answers; those of a round are told of after it, as their messages are transport."""
        if self._answered is None:
            session.on_answer()
        else:
            self._answered.append(session)

    def run_round(self, now: float) -> None:
        """Enhance the same number of frames of every session that has some, and answer what can be.

        Before, sessions that are too late catch up: their late frames are sent dry.
        """
        sessions = [session for session in self._ready if session.n_frames]
        self._ready = dict.fromkeys(sessions)
        if not sessions:
            self._rest()
            return
        started, network_before = time.thread_time(), self._model.cpu_seconds
        self._answered = []
        try:
            for n_late, late in _alike(sessions, lambda session: session.n_late(now)).items():
                if n_late:
                    self._bypass(late, n_late)
            waiting = [session for session in sessions if session.n_frames]
            if waiting:
                n_frames = min(min(s.n_frames for s in waiting), max(2, ROUND_FRAMES // len(waiting)))
                self._metrics.tick_streams.observe(len(waiting))
                self._enhance(waiting, n_frames)
        except Exception as error:
            logging.getLogger(__name__).exception("a round of %d streams failed", len(sessions))
            for session in sessions:
                session.fail(error)
        self._ready = dict.fromkeys(session for session in self._ready if session.n_frames)
        self._rest()
        network = self._model.cpu_seconds - network_before
        self.cpu.network += network
        self.cpu.dsp += time.thread_time() - started - network
        answered, self._answered = self._answered, None
        for session in answered:
            session.on_answer()

    def _enhance(self, sessions: list[Session], n_frames: int) -> None:
        sessions = sorted(sessions, key=lambda session: session.row)
        index = rows.select([session.row for session in sessions])
        samples = np.concatenate([session.take_frames(n_frames) for session in sessions])
        samples = samples.reshape(len(sessions), -1)
        wet, sharpening = self._ramp(index, n_frames)
        enhanced, findings = self._enhancer.advance(
            samples, self._state, index, FrameControls(wet, sharpening)
        )
        found = _found(findings) if any(session.options.report for session in sessions) else None
        encoded = _encoded(enhanced, sessions)
        for i, session in enumerate(sessions):
            report = found[:, i] if found is not None and session.options.report else None
            session.deliver(enhanced[i], encoded[i], report)

    def _bypass(self, sessions: list[Session], n_frames: int) -> None:
        """Send the oldest frames dry."""
        sessions = sorted(sessions, key=lambda session: session.row)
        index = rows.select([session.row for session in sessions])
        samples = np.concatenate([session.take_frames(n_frames) for session in sessions])
        samples = samples.reshape(len(sessions), -1)
        self._ramp(index, n_frames)
        passed, state = self._enhancer.bypass(samples, rows.take(self._state, index))
        rows.put(self._state, index, state)
        self._metrics.dry_frames.inc(n_frames * len(sessions))
        encoded = _encoded(passed, sessions)
        for i, session in enumerate(sessions):
            session.deliver(passed[i], encoded[i], dry=True)

    def _ramp(self, index: rows.Rows, n_frames: int) -> np.ndarray:
        """The parameters of the next frames, float32 (2, streams, frames); (2, streams, 1) if they stay."""
        aim = self._aim[:, index, np.newaxis]
        if not self._ramps:
            return aim
        now, step, frames = self._now[:, index, np.newaxis], np.float32(1 / RAMP_FRAMES), []
        for _ in range(n_frames):  # one after the other, with the same bits in rounds of any length
            now = np.where(np.abs(aim - now) <= step, aim, now + np.copysign(step, aim - now))
            frames.append(now)
        self._now[:, index] = now[..., 0]
        self._ramps = bool((self._now != self._aim).any())
        return np.concatenate(frames, axis=-1)

    def _rest(self) -> None:
        if not self._ready:
            self.quiet.set()


def prefill(sample_rate: int, message_samples: int) -> int:
    """Silent samples before a stream's output that let it answer every message at once.

    message_samples: in every message, or 0 for any number. Between two frames up to 479 samples at 48 kHz
    wait; fewer when all messages are multiples of a length that divides the frame.
    """
    length = Fraction(message_samples * SAMPLE_RATE, sample_rate)
    step = gcd(int(length), HOP) if message_samples and length.denominator == 1 else 1
    return (HOP - step) * sample_rate // SAMPLE_RATE


def _alike(sessions: list[Session], key: Callable[[Session], int]) -> dict[int, list[Session]]:
    """The sessions by a number that each of them has."""
    groups: dict[int, list[Session]] = {}
    for session in sessions:
        groups.setdefault(key(session), []).append(session)
    return groups


def _encoded(samples: np.ndarray, sessions: list[Session]) -> list[np.ndarray | None]:
    """Each row as its session at 48 kHz sends it: to encode all at once costs what three do alone."""
    wanted = [s.options.encoding if s.options.sample_rate == SAMPLE_RATE else None for s in sessions]
    encoded = {kind: pcm.encode(samples, kind) for kind in set(wanted) if kind is not None}
    return [None if kind is None else encoded[kind][i] for i, kind in enumerate(wanted)]


def _found(findings: Findings) -> np.ndarray:
    """Speech probability, pitch in Hz, mean gain: (3, streams, frames)."""
    return np.stack([findings.speech_probability, findings.pitch_hz, findings.mean_gain])
