"""How many live streams this process can carry, measured before it serves."""

import gc
import time
from collections.abc import Sequence
from statistics import median

import numpy as np

from percepnet.constants import HOP, SAMPLE_RATE
from percepnet.enhancer import Enhancer
from service.engine import DEADLINE_SECONDS, Engine, Options, Room
from service.metrics import Metrics
from service.pcm import S16LE

USABLE = 0.75
"""Share of the time that may be planned for; the rest is for the pauses of a shared machine."""

TWO_BEATS_SECONDS = 0.0085
"""Of the 10 ms: a frame that just misses a beat of the ticker waits for it and for its own."""

BEAT_SECONDS = 0.6e-3
"""What a beat of the ticker takes besides its round and messages: turns of the loop, and rests for gRPC."""

TRANSPORT_SECONDS = 85e-6
"""CPU time of a message and its answer, gRPC's and all around it; not to be measured without callers."""

SHARED_TRANSPORT_SECONDS = 20e-6
"""The same for a session's part of a message that many share: to parse it, and to write its answer."""

_BATCHES = (8, 24)
_ROUNDS = 12
"""Of each batch, in turn, so that a moment when other work has the machine hits both."""

_PAUSE_SECONDS = 0.002
"""Between rounds, as between beats: meanwhile the caches forget, and rounds take longer."""


def measure(enhancer: Enhancer, share: float = 1.0) -> Room:
    """The room for live streams in a frame's 10 ms; it takes at least one that sends 10 ms at a time.

    share: of a core that this process may use. Takes about a quarter of a second.
    """
    few, many = _round_seconds(enhancer, _BATCHES)
    each = max(1e-6, (many - few) / (_BATCHES[1] - _BATCHES[0]))
    beat = BEAT_SECONDS + max(0.0, few - each * _BATCHES[0])
    seconds = USABLE * min(share, 1.0) * DEADLINE_SECONDS * max(0.0, 1 - 2 * beat / TWO_BEATS_SECONDS)
    stream = each + TRANSPORT_SECONDS
    return Room(max(seconds, stream), each, TRANSPORT_SECONDS, each + SHARED_TRANSPORT_SECONDS)


def _round_seconds(enhancer: Enhancer, batches: Sequence[int]) -> list[float]:
    """CPU time of a round of the engine with a frame of so many streams each, for each number of streams."""
    engines = [_Speaking(enhancer, n) for n in batches]
    gc.disable()  # a collection would count for one round what a hundred share
    rounds = [[engine.round_seconds() for engine in engines] for _ in range(_ROUNDS)]
    gc.enable()
    return [median(seconds) for seconds in zip(*rounds, strict=True)]


class _Speaking:
    """An engine with streams that all speak."""

    def __init__(self, enhancer: Enhancer, n_streams: int) -> None:
        self._engine = Engine(enhancer, n_streams, Metrics(enhancer.model))
        options = Options(SAMPLE_RATE, S16LE)
        self._sessions = [self._engine.open(options, lambda: None) for _ in range(n_streams)]
        self._frames = np.random.default_rng(0).normal(0, 0.1, (n_streams, HOP)).astype(np.float32)

    def round_seconds(self) -> float:
        """Bring every stream one frame further; returns the CPU time that it took."""
        time.sleep(_PAUSE_SECONDS)
        started = time.thread_time()
        for session, frame in zip(self._sessions, self._frames, strict=True):
            session.push(frame, 0.0)
        self._engine.run_round(0.0)
        for session in self._sessions:
            session.answers.clear()
        return time.thread_time() - started
