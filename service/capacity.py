"""How many live streams this process can carry, measured before it serves."""

import gc
import time

import numpy as np

from percepnet.constants import HOP, SAMPLE_RATE
from percepnet.enhancer import Enhancer
from service.engine import DEADLINE_SECONDS, Engine, Options, Room
from service.metrics import Metrics
from service.pcm import S16LE

USABLE = 0.8
"""Share of a core that streams may take: at more, frames that come in at the same moment wait too long."""

TRANSPORT_SECONDS = 100e-6
"""CPU time of a message and its answer, which cannot be measured without callers: gRPC takes 80 to 95 µs in a
busy process of the machine this was written on, and the rest is for a session's share of the event loop."""

_BATCHES = (8, 24)
_ROUNDS = 8
_WARM_UP = 3


def measure(enhancer: Enhancer, share: float = 1.0) -> Room:
    """The room for live streams in a tick; it takes at least one that sends 10 ms at a time.

    share: of a core that this process may use. Takes about a tenth of a second.
    """
    few, many = (_round_seconds(enhancer, n) for n in _BATCHES)
    each = max(1e-6, (many - few) / (_BATCHES[1] - _BATCHES[0]))
    fixed = max(0.0, few - each * _BATCHES[0])
    budget = USABLE * min(share, 1.0) * DEADLINE_SECONDS - fixed
    return Room(max(budget, each + TRANSPORT_SECONDS), each, TRANSPORT_SECONDS)


def _round_seconds(enhancer: Enhancer, n_streams: int) -> float:
    """CPU time of a round of the engine with one frame of so many streams: the quickest of some."""
    engine = Engine(enhancer, n_streams, Metrics(enhancer.model))
    sessions = [engine.open(Options(SAMPLE_RATE, S16LE), lambda: None) for _ in range(n_streams)]
    noise = np.random.default_rng(0).normal(0, 0.1, (n_streams, HOP)).astype(np.float32)
    rounds = []
    gc.disable()  # a collection would count for one round what a hundred share
    for _ in range(_WARM_UP + _ROUNDS):
        started = time.thread_time()
        for session, samples in zip(sessions, noise, strict=True):
            session.push(samples, 0.0)
        engine.run_round()
        for session in sessions:
            session.answers.clear()
        rounds.append(time.thread_time() - started)
    gc.enable()
    return min(rounds[_WARM_UP:])
