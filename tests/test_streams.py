"""One live stream on a wire of the test's own, which has all messages there at once."""

import asyncio
from collections import deque
from itertools import pairwise

import pytest

from percepnet.enhancer import Enhancer
from service.access import Access
from service.callers import Caller
from service.engine import Engine
from service.metrics import Metrics
from service.pb.percepnet_service.v1 import enhancement_pb2 as pb
from service.settings import Settings
from service.streams import MAX_UNANSWERED, Streams, Wire

Request = pb.EnhanceStreamRequest
CONFIG = Request(config=pb.StreamConfig(sample_rate_hz=16_000, encoding=pb.ENCODING_S16LE))

short = pytest.mark.parametrize(
    "message", [Request(audio=b""), Request(parameters=pb.Parameters())], ids=["no samples", "parameters"]
)


class CountingWire(Wire):
    """Brings as many messages as are asked for, and counts them."""

    def __init__(self, requests: list[Request], *, is_read: bool) -> None:
        self.requests = deque(requests)
        self.n_answers = 0
        self._is_read = is_read

    async def read(self) -> Request | None:
        return self.requests.popleft() if self.requests else None

    async def write(self, response: pb.EnhanceStreamResponse) -> None:
        self.n_answers += 1
        if not self._is_read and self.n_answers > 1:
            await asyncio.Event().wait()

    def release(self, writer: asyncio.Task[None]) -> None:
        writer.cancel()


async def converse(enhancer: Enhancer, wire: Wire, turns: int | None = None) -> list[int]:
    """How many messages are left at each turn of the loop, until the stream ends or so many turns passed."""
    settings, metrics = Settings(), Metrics(enhancer.model)
    engine = Engine(enhancer, 1, metrics)
    streams = Streams(settings, Access(settings), engine, enhancer.model.manifest, metrics)
    stream = asyncio.create_task(streams.converse(wire, Caller("test")))
    left = []
    while not stream.done() and len(left) != turns:
        left.append(len(wire.requests))
        if engine.has_work:
            engine.run_round(0.0)
        await asyncio.sleep(0)
    stream.cancel()
    await asyncio.gather(stream, return_exceptions=True)
    return left


@short
def test_what_is_not_read_is_not_taken_however_little_each_message_brings(enhancer, message):
    wire = CountingWire([CONFIG, *[message] * 5_000], is_read=False)
    asyncio.run(converse(enhancer, wire, turns=1_000))
    assert len(wire.requests) >= 5_000 - MAX_UNANSWERED - 2


@short
def test_messages_that_are_there_at_once_leave_turns_for_others(enhancer, message):
    wire = CountingWire([CONFIG, *[message] * 1_000], is_read=True)
    left = asyncio.run(converse(enhancer, wire))
    assert wire.n_answers == 1_002  # with `started` and the tail
    assert max(before - after for before, after in pairwise(left)) < 50
