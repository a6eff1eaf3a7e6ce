"""Many sessions over one RPC, through a real server on a real socket.

Invariant: a session gets what a stream of its own would get, whatever the others of its RPC do.
"""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from queue import SimpleQueue
from typing import Any

import grpc
import numpy as np
import pytest
from running import TIMEOUT_SECONDS, eventually, running

from percepnet.enhancer import Enhancer
from percepnet.stream import enhance
from service import capacity
from service.access import Access
from service.callers import Caller
from service.client import Client
from service.client.conversation import MEMORY_SECONDS, WINDOW_SECONDS
from service.engine import Engine, Room, Session
from service.limits import MAX_MESSAGE_SECONDS
from service.main import Server
from service.metrics import Metrics
from service.multiplex import Multiplex
from service.pb.percepnet_service.v1 import enhancement_pb2 as pb
from service.settings import Settings
from service.streams import MAX_NOT_BEGUN, Streams

METHOD = "/percepnet_service.v1.EnhancementService/EnhanceStreams"


@pytest.fixture(scope="module")
def server(enhancer: Enhancer) -> Iterator[Server]:
    with running(enhancer, max_streams=4, stream_idle_seconds=1, stream_queue_seconds=0.5) as server:
        yield server


@pytest.fixture
def channel(server: Server) -> Iterator[grpc.Channel]:
    eventually(lambda: server.grpc._engine.active == 0, "the end of earlier sessions")
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc.port}") as channel:
        yield channel


def opened(channel: grpc.Channel, messages: Iterable[Any]) -> Any:
    call = channel.stream_stream(
        METHOD,
        lambda message: message if isinstance(message, bytes) else message.SerializeToString(),
        pb.EnhanceStreamsResponse.FromString,
    )
    return call(iter(messages), timeout=TIMEOUT_SECONDS)


def message(*requests: tuple[int, dict[str, Any]]) -> pb.EnhanceStreamsRequest:
    return pb.EnhanceStreamsRequest(
        sessions=[
            pb.SessionRequest(session_id=number, request=pb.EnhanceStreamRequest(**fields))
            for number, fields in requests
        ]
    )


def config(rate: int = 16_000) -> dict[str, Any]:
    return {
        "config": pb.StreamConfig(
            sample_rate_hz=rate,
            encoding=pb.ENCODING_F32LE,
            message_samples=rate // 100,
            compensate_delay=True,
        )
    }


def noise(n_samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(n_samples)).astype("<f4")


def by_session(responses: Iterable[pb.EnhanceStreamsResponse]) -> dict[int, list[pb.SessionResponse]]:
    found = defaultdict(list)
    for response in responses:
        for part in response.sessions:
            found[part.session_id].append(part)
    return found


def audio(parts: list[pb.SessionResponse]) -> np.ndarray:
    return np.frombuffer(b"".join(part.response.audio.audio for part in parts), "<f4")


def test_all_that_a_client_sends_to_take_a_stream_up_again_is_taken(channel: grpc.Channel) -> None:
    """In one message, before the session can begin: what was answered last, and a whole window."""
    seconds = MEMORY_SECONDS + WINDOW_SECONDS + MAX_MESSAGE_SECONDS + 0.05
    chunks = np.split(noise(4_800 * round(10 * seconds)), round(10 * seconds))
    speech = ((1, {"audio": chunk.tobytes()}) for chunk in chunks)
    found = by_session(opened(channel, [message((1, config(48_000)), *speech, (1, {"end": pb.End()}))]))
    assert found[1][-1].ended == pb.SessionEnded()
    assert len(audio(found[1])) == sum(map(len, chunks))


def test_each_session_is_the_offline_result_and_what_is_ready_together_comes_together(channel, enhancer):
    rates = {1: 16_000, 7: 48_000, 9: 8_000}
    signals = {number: noise(rate // 5, number) for number, rate in rates.items()}
    messages = [message(*((number, config(rate)) for number, rate in rates.items()))]
    for i in range(20):
        chunks = {
            number: signals[number][i * rate // 100 : (i + 1) * rate // 100] for number, rate in rates.items()
        }
        messages.append(message(*((number, {"audio": chunk.tobytes()}) for number, chunk in chunks.items())))
    messages.append(message(*((number, {"end": pb.End()}) for number in rates)))
    responses = list(opened(channel, messages))
    found = by_session(responses)
    assert found.keys() == rates.keys()
    for number, rate in rates.items():
        first, *rest = found[number]
        assert first.response.HasField("started")
        assert rest[-1].ended == pb.SessionEnded()
        np.testing.assert_array_equal(audio(rest), enhance(signals[number], rate, enhancer=enhancer))
    assert len(responses) < sum(map(len, found.values())) / 2


def test_sessions_of_one_rpc_are_admitted_by_what_they_take(enhancer, monkeypatch):
    monkeypatch.setattr(capacity, "measure", lambda *_: Room(4.0, stream=1.0, message=1.0, sharing=0.5))
    with running(enhancer) as server, grpc.insecure_channel(f"127.0.0.1:{server.grpc.port}") as channel:
        found = by_session(opened(channel, [message(*((number, config()) for number in range(9)))]))
    started = [number for number, parts in found.items() if parts[0].response.HasField("started")]
    assert sorted(started) == list(range(8))
    assert found[8][0].ended.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]


def test_the_log_tells_the_sessions_of_an_rpc_apart(channel, caplog):
    with caplog.at_level(logging.INFO, "percepnet.service"):
        list(opened(channel, [message((0, config()), (7, config()), (8, {}))]))
    lines = sorted((record.fields["session_id"], record.getMessage()) for record in caplog.records)
    both = [(number, line) for number in (0, 7) for line in ("stream closed", "stream opened")]
    assert lines == [*both, (8, "stream refused")]


def test_closing_the_sending_side_flushes_every_session(channel, enhancer):
    samples = noise(1_600)
    found = by_session(
        opened(
            channel,
            [message((number, config()), (number, {"audio": samples.tobytes()})) for number in (0, 1)],
        )
    )
    for parts in found.values():
        np.testing.assert_array_equal(audio(parts), enhance(samples, 16_000, enhancer=enhancer))
        assert parts[-1].ended.code == 0


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ([{"audio": b"abcd"}], "the first message is audio"),
        ([{}], "the first message is nothing"),
        ([{"config": pb.StreamConfig(sample_rate_hz=1)}], "config.sample_rate_hz: 1"),
        ([config(), {"audio": b"abc"}], "audio: 3 bytes"),
        ([config(), config()], "payload: config came"),
    ],
)
def test_a_bad_session_ends_neither_the_others_nor_the_rpc(channel, wrong, told):
    requests = [*((5, fields) for fields in wrong), (3, {"audio": noise(160).tobytes()})]
    messages = [
        message((3, config())),
        message(*requests),
        message((5, {"audio": b"late"}), (3, {"end": pb.End()})),
    ]
    found = by_session(opened(channel, messages))
    (ended,) = (part.ended for part in found[5] if part.HasField("ended"))
    assert ended.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert told in ended.message
    assert len(audio(found[3])) == 160
    assert found[3][-1].ended.code == 0


def test_a_fault_of_the_service_ends_one_session(channel, monkeypatch):
    push = Session.push

    def faulty(session: Session, *args: Any) -> None:
        if session.options.sample_rate == 8_000:
            raise RuntimeError("a fault")
        push(session, *args)

    monkeypatch.setattr(Session, "push", faulty)
    requests: SimpleQueue[Any] = SimpleQueue()
    requests.put(message((1, config()), (2, config(8_000))))
    responses = opened(channel, iter(requests.get, None))
    first = by_session(islice(responses, 1))
    if len(first) < 2:
        next(responses)
    requests.put(message((2, {"audio": noise(80).tobytes()}), (1, {"audio": noise(160).tobytes()})))
    requests.put(None)
    found = by_session(responses)
    assert found[2][-1].ended.code == grpc.StatusCode.INTERNAL.value[0]
    assert len(audio(found[1])) == 160
    assert found[1][-1].ended == pb.SessionEnded()


def test_sessions_beyond_the_capacity_are_refused_and_their_numbers_can_be_used_again(channel):
    requests: SimpleQueue[Any] = SimpleQueue()
    call = opened(channel, iter(requests.get, None))
    parts = (part for response in call for part in response.sessions)
    for number in range(5):
        requests.put(message((number, config())))
        part = next(parts)
        assert part.session_id == number
        assert part.HasField("response") == (number < 4)
    assert part.ended.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    assert part.ended.retry_seconds > 0
    requests.put(message((0, {"end": pb.End()})))
    assert next(parts).response.audio.flushed
    assert next(parts).ended.code == 0
    requests.put(message((4, config())))
    assert next(parts).response.HasField("started")
    requests.put(None)
    assert all(part.ended.code == 0 for part in parts if part.HasField("ended"))


def test_what_is_no_message_ends_the_rpc_and_gives_the_places_back(channel, server):
    with pytest.raises(grpc.RpcError, match=r"no percepnet_service.v1.EnhanceStreamsRequest") as refused:
        list(opened(channel, [message((1, config())), b"\xff\xff"]))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    eventually(lambda: server.grpc._engine.active == 0, "the places")


def test_a_caller_that_vanishes_leaves_nothing_behind(channel, server):
    requests: SimpleQueue[Any] = SimpleQueue()
    requests.put(message((1, config()), (2, config())))
    call = opened(channel, iter(requests.get, None))
    assert next(call)
    eventually(lambda: server.grpc._engine.active == 2, "two sessions")
    call.cancel()
    eventually(lambda: server.grpc._engine.active == 0, "the places")
    requests.put(None)


def test_a_silent_session_ends_and_then_the_rpc(channel):
    requests: SimpleQueue[Any] = SimpleQueue()
    requests.put(message((1, config())))
    call = opened(channel, iter(requests.get, None))
    assert next(call).sessions[0].response.HasField("started")
    assert next(call).sessions[0].ended.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
    with pytest.raises(grpc.RpcError, match="no session was open for 1 s") as told:
        next(call)
    assert told.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    requests.put(None)


def test_a_caller_that_was_cut_and_still_does_not_read_does_not_hold_up_the_end(enhancer):
    def speak_on() -> Iterator[Any]:
        yield message((1, config(48_000)))
        while True:
            time.sleep(0.02)
            yield message((1, {"audio": bytes(19_200)}))

    choices = {"stream_idle_seconds": 1, "shutdown_grace_seconds": TIMEOUT_SECONDS}
    with ExitStack() as after_the_server, running(enhancer, **choices) as server:
        channel = after_the_server.enter_context(grpc.insecure_channel(f"127.0.0.1:{server.grpc.port}"))
        call = opened(channel, speak_on())
        assert next(call).sessions[0].response.HasField("started")
        eventually(lambda: server.grpc._engine.active == 0, "the end of its session")
        stopping = time.monotonic()
    assert time.monotonic() - stopping < TIMEOUT_SECONDS / 2
    eventually(lambda: not call.is_active(), "the end of the call")


class Hesitating:
    """A caller that sends its message and the end, and takes the answers when the test lets it."""

    def __init__(self, data: bytes) -> None:
        self.requests = [grpc.aio.EOF, data]
        self.answers: list[bytes] = []
        self.goes_on = asyncio.Event()

    async def read(self) -> Any:
        if len(self.requests) == 1:
            await self.goes_on.wait()
        return self.requests.pop()

    def invocation_metadata(self) -> None:
        """None came."""

    async def write(self, data: bytes) -> None:
        await self.goes_on.wait()
        self.answers.append(data)


def begun(enhancer: Enhancer, context: Any) -> tuple[Streams, "asyncio.Task[None]"]:
    """An RPC, and its server, in which rounds run when the test runs them."""
    settings, metrics = Settings(), Metrics(enhancer.model)
    engine = Engine(enhancer, 2, metrics)
    streams = Streams(settings, Access(settings), engine, enhancer.model.manifest, metrics)
    streams.start(lambda: False, lambda: None)

    async def serve() -> None:
        await Multiplex(streams, context, Caller("test")).run()

    return streams, asyncio.create_task(serve())


async def ended_unread(enhancer: Enhancer) -> tuple[Streams, Hesitating, "asyncio.Task[None]"]:
    """An RPC whose only session has ended, while its first answer waits to be taken."""
    requests = message((1, config()), (1, {"audio": noise(160).tobytes()}), (1, {"end": pb.End()}))
    context = Hesitating(requests.SerializeToString())
    streams, rpc = begun(enhancer, context)
    ended = streams.metrics.registry.get_sample_value
    while not ended("percepnet_streams_total", {"outcome": "ok"}):
        if streams.engine.has_work:
            streams.engine.run_round(0.0)
        await asyncio.sleep(0.001)
    for _ in range(20):  # until the RPC has heard of it
        await asyncio.sleep(0)
    return streams, context, rpc


def test_the_last_answers_come_though_the_server_is_told_to_stop(enhancer):
    async def stopped() -> list[bytes]:
        streams, context, rpc = await ended_unread(enhancer)
        stop = asyncio.create_task(streams.stop())
        await asyncio.sleep(0)
        context.goes_on.set()
        await asyncio.gather(rpc, stop)
        return context.answers

    found = by_session(map(pb.EnhanceStreamsResponse.FromString, asyncio.run(stopped())))
    assert len(audio(found[1])) == 160
    assert found[1][-1].ended == pb.SessionEnded()


@pytest.mark.parametrize("prompt_seconds", [0, TIMEOUT_SECONDS])
def test_the_last_answers_come_beside_a_crowd_if_they_are_read_promptly(
    enhancer, monkeypatch, prompt_seconds
):
    monkeypatch.setattr("service.streams.PROMPT_SECONDS", prompt_seconds)

    async def crowded() -> bool:
        streams, context, rpc = await ended_unread(enhancer)
        with ExitStack() as crowd:
            for _ in range(MAX_NOT_BEGUN):
                crowd.enter_context(streams.waiting())
            context.goes_on.set()
            (error,) = await asyncio.gather(rpc, return_exceptions=True)
        return error is None

    assert asyncio.run(crowded()) == (prompt_seconds > 0)


@pytest.mark.parametrize("turns", range(6))
def test_an_rpc_that_is_cut_short_twice_leaves_no_task_behind(enhancer, turns):
    """Whenever the second comes: the first may be a wrong message, the second the caller that hangs up."""

    async def cut() -> set["asyncio.Task[Any]"]:
        context = Hesitating(message((1, config()), (2, config())).SerializeToString())
        context.goes_on.set()
        streams, rpc = begun(enhancer, context)
        while not context.answers:
            await asyncio.sleep(0.001)
        rpc.cancel()
        for _ in range(turns):
            await asyncio.sleep(0)
        rpc.cancel()
        await asyncio.wait([rpc])
        await asyncio.wait_for(streams.stop(), TIMEOUT_SECONDS)
        for _ in range(20):
            await asyncio.sleep(0)
        return asyncio.all_tasks() - {asyncio.current_task()}

    assert asyncio.run(cut()) == set()


def test_a_session_that_runs_ahead_ends_alone(channel):
    second = noise(16_000).tobytes()
    messages = [message((1, config()), (2, config()))]
    messages += [message(*[(1, {"audio": second})] * 30, (2, {"audio": second[:640]}))]
    found = by_session(opened(channel, messages))
    assert found[1][-1].ended.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    assert "sent ahead" in found[1][-1].ended.message
    assert len(audio(found[2])) == 160
    assert found[2][-1].ended.code == 0


def test_waiting_requests_count_however_short_they_are(channel):
    """Behind more audio than may be unanswered, while the caller does not read."""
    mute = {"parameters": pb.Parameters()}
    second = {"audio": noise(16_000).tobytes()}
    short = [(1, mute)] * 20_000
    found = by_session(opened(channel, [message((1, config()), (1, second), *short)]))
    assert found[1][-1].ended.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    assert "sent ahead" in found[1][-1].ended.message


def test_a_message_for_many_sessions_opens_or_refuses_one_after_the_other(channel):
    """Not all before the first is answered: they take memory, and a session takes few bytes to ask for."""
    responses = opened(channel, [message(*((number, {}) for number in range(5_000)))])
    assert len(next(responses).sessions) < 50
    ended = [part.ended.code for response in responses for part in response.sessions]
    assert set(ended) == {grpc.StatusCode.INVALID_ARGUMENT.value[0]}


def test_a_message_that_is_too_large_ends_the_rpc(channel):
    audio = [(1, {"audio": bytes(64_000)})] * 33
    with pytest.raises(grpc.RpcError, match=r"sessions: \d+ bytes; accepted are 2097152") as refused:
        list(opened(channel, [message((1, config()), *audio)]))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_other_streams_of_the_server_go_on(channel, server):
    with Client(f"127.0.0.1:{server.grpc.port}") as client, client.stream(16_000) as stream:
        list(opened(channel, [message((1, config()), (1, {"audio": b"x"}))]))
        assert len(stream.push(noise(160))) == 160
