"""Live hand-over: sessions go on in other engines, other servers, and never twice.

Invariant: a state makes the stream that it was sealed for go on without a difference, once, or is refused.
"""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import numpy as np
import pytest
from conftest import export_random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from running import TIMEOUT_SECONDS, eventually, running
from websockets.sync.client import connect

from percepnet.enhancer import Enhancer
from percepnet.errors import ParameterError, SnapshotError
from percepnet.model import Model
from percepnet.stream import enhance
from percepnet.synthesis import Controls
from service import handover, pcm
from service.client import AsyncClient, AsyncLiveStream, Client, Mark, pods
from service.engine import Answer, Engine, Options, Session
from service.handover import Seals
from service.main import Server
from service.metrics import Metrics
from service.pb.percepnet_service.v1 import enhancement_pb2 as pb
from service.settings import Settings
from service.watched import FilesError

RATE = 16_000
KEY, OTHER_KEY = "0123456789abcdef" * 2, "fedcba9876543210" * 2
CHALLENGE = bytes(range(16))
CONFIG = pb.StreamConfig(sample_rate_hz=RATE, encoding=pb.ENCODING_F32LE)

Request = pb.EnhanceStreamRequest


def noise(n_samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(n_samples)).astype(np.float32)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A file with the key that all servers share."""
    return written(tmp_path / "keys", KEY)


def written(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines))
    return path


# Between engines


def drain(engine: Engine) -> None:
    while engine.has_work:
        engine.run_round(0.0)


def taken(session: Session) -> list[Answer]:
    """Its answers so far, but for the time that each took."""
    answers = list(session.answers)
    session.answers.clear()
    for answer in answers:
        answer.since = 0
    return answers


@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000])
@settings(deadline=None, max_examples=5)
@given(
    sizes=st.lists(st.integers(0, 700), min_size=1, max_size=6),
    encoding=st.sampled_from([pcm.S16LE, pcm.F32LE]),
    compensate=st.booleans(),
    flush=st.booleans(),
)
def test_a_session_goes_on_in_another_engine_without_a_difference(
    enhancer, rate, sizes, encoding, compensate, flush
):
    """After every message, within ramps, in the lead-in, after a flush, with its reports and positions."""
    engines = [Engine(enhancer, 2, Metrics(enhancer.model)) for _ in range(2)]
    options = Options(rate, encoding, compensate_delay=compensate, report=True)
    unbroken, session = engines[0].open(options, lambda: None), engines[0].open(options, lambda: None)
    samples = np.split(noise(sum(sizes)), np.cumsum(sizes)[:-1])
    steps = [lambda s, part=part: s.push(part, 0.0) for part in samples]
    steps[1:1] = [lambda s: s.update(Controls(mix=0.25, postfilter=0.5), 0.0)]
    if flush:
        steps[2:2] = [lambda s: s.flush(0.0)]
    for i, step in enumerate([*steps, lambda s: s.flush(0.0)]):
        step(unbroken)
        step(session)
        for engine in engines:
            drain(engine)
        assert taken(session) == taken(unbroken)
        data = engines[i % 2].save(session)
        engines[i % 2].close(session)
        session = engines[1 - i % 2].open(options, lambda: None)
        engines[1 - i % 2].restore(session, data)


def test_a_state_of_another_config_is_refused(enhancer: Enhancer) -> None:
    engine = Engine(enhancer, 2, Metrics(enhancer.model))
    data = engine.save(engine.open(Options(RATE), lambda: None))
    for options in (Options(8_000), Options(RATE, pcm.F32LE), Options(RATE, message_samples=160)):
        session = engine.open(options, lambda: None)
        with pytest.raises(SnapshotError, match="another config"):
            engine.restore(session, data)
        engine.close(session)


def test_a_message_that_waits_for_samples_cannot_be_handed_over(enhancer: Enhancer) -> None:
    engine = Engine(enhancer, 1, Metrics(enhancer.model))
    session = engine.open(Options(48_000, message_samples=480), lambda: None)
    session.push(noise(48_100), 0.0)
    drain(engine)
    with pytest.raises(ParameterError, match=r"48100 samples wait for more audio; .* messages of 480"):
        engine.save(session)


# Seals


def test_states_are_sealed_with_the_first_key_and_opened_with_all(tmp_path: Path) -> None:
    """Keys are changed with no state refused: the new one comes last, then first, then alone."""
    file = tmp_path / "keys"
    old = Seals(Settings(handover_keys_file=written(file, "# shared", KEY)))
    both = Seals(Settings(handover_keys_file=written(tmp_path / "both", OTHER_KEY, "", KEY)))
    new = Seals(Settings(handover_keys_file=written(tmp_path / "new", OTHER_KEY)))
    assert both.open(old.seal(b"memory", CHALLENGE), CHALLENGE) == b"memory"
    assert new.open(both.seal(b"memory", CHALLENGE), CHALLENGE) == b"memory"
    with pytest.raises(SnapshotError, match="not signed"):
        new.open(old.seal(b"memory", CHALLENGE), CHALLENGE)
    written(file, OTHER_KEY)  # read again
    assert new.open(old.seal(b"memory", CHALLENGE), CHALLENGE) == b"memory"


@pytest.mark.parametrize("lines", [[], ["# nothing"], [KEY[:31]], [KEY, "with a space".ljust(40)]])
def test_a_file_without_good_keys_is_refused_at_the_start(tmp_path: Path, lines: list[str]) -> None:
    with pytest.raises(FilesError, match="32 to 256 visible characters") as refused:
        Seals(Settings(handover_keys_file=written(tmp_path / "keys", *lines)))
    assert KEY[:31] not in str(refused.value)


@settings(max_examples=50)
@given(place=st.integers(0), bit=st.integers(0, 7))
def test_a_state_with_a_changed_bit_is_refused(tmp_path_factory, place, bit):
    seals = Seals(Settings(handover_keys_file=written(tmp_path_factory.getbasetemp() / "keys", KEY)))
    state = bytearray(seals.seal(b"memory", CHALLENGE))
    state[place % len(state)] ^= 1 << bit
    for data in (bytes(state), bytes(state)[: place % len(state)]):
        with pytest.raises(SnapshotError, match="not signed"):
            seals.open(data, CHALLENGE)


# Between servers


class Call:
    """An EnhanceStream RPC, message by message."""

    def __init__(self, server: Server, config: pb.StreamConfig = CONFIG) -> None:
        self._requests: SimpleQueue[Request | None] = SimpleQueue()
        self._channel = grpc.insecure_channel(f"127.0.0.1:{server.grpc.port}")
        self._call: Any = self._channel.stream_stream(
            "/percepnet_service.v1.EnhancementService/EnhanceStream",
            Request.SerializeToString,
            pb.EnhanceStreamResponse.FromString,
        )(iter(self._requests.get, None), timeout=TIMEOUT_SECONDS)
        self.started = self.ask(config=config).started

    def send(self, **payload: Any) -> None:
        self._requests.put(Request(**payload))

    def receive(self) -> pb.EnhanceStreamResponse:
        return next(self._call)

    def ask(self, **payload: Any) -> pb.EnhanceStreamResponse:
        self.send(**payload)
        return self.receive()

    def push(self, samples: np.ndarray) -> bytes:
        return self.ask(audio=samples.tobytes()).audio.audio

    def give(self, challenge: bytes) -> pb.HandedOver:
        """Ask for the state; nothing may come after it."""
        self.send(hand_over=pb.HandOver(challenge=challenge))
        self.send(audio=b"\0" * 640)  # is not taken
        handed_over = self.receive().handed_over
        assert next(self._call, None) is None
        return handed_over

    def refused(self, **payload: Any) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.RpcError) as caught:
            self.ask(**payload)
        return caught.value.code(), caught.value.details()

    def close(self) -> None:
        self._requests.put(None)
        self._channel.close()


@contextmanager
def calling() -> Iterator[Any]:
    """Opens calls that are closed in the end."""
    with ExitStack() as calls:

        def open_call(server: Server, config: pb.StreamConfig = CONFIG) -> Call:
            call = Call(server, config)
            calls.callback(call.close)
            return call

        yield open_call


@pytest.fixture(scope="module")
def servers(enhancer: Enhancer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """Two servers with a key in common."""
    file = written(tmp_path_factory.mktemp("shared") / "keys", KEY)
    with running(enhancer, handover_keys_file=file) as one, running(enhancer, handover_keys_file=file) as two:
        yield [one, two]


@pytest.fixture
def state(servers: list[Server]) -> bytes:
    """A snapshot of a stream of CONFIG."""
    engine = servers[0].grpc._engine
    other = Engine(engine._enhancer, 1, Metrics(engine._enhancer.model))
    return other.save(other.open(Options(RATE, pcm.F32LE), lambda: None))


def test_a_stream_moves_between_servers_without_a_difference(servers: list[Server]) -> None:
    samples = noise(4_000).reshape(8, 500)
    with calling() as call:
        unbroken, moved = call(servers[0]), call(servers[0])
        for i, part in enumerate(samples):
            moved.send(audio=part.tobytes())  # still unanswered when the state is asked for
            if i % 3 == 2:
                following = call(servers[i // 3])
                moved.send(hand_over=pb.HandOver(challenge=following.started.challenge))
            assert moved.receive().audio == unbroken.ask(audio=part.tobytes()).audio
            if i % 3 == 2:
                handed_over = moved.receive().handed_over
                assert handed_over.position == (i + 1) * 500
                assert len(handed_over.state) <= handover.MAX_STATE_BYTES
                moved = following
                assert moved.ask(resume=pb.Resume(state=handed_over.state)).resumed.position == (i + 1) * 500
        assert moved.ask(end=pb.End()).audio == unbroken.ask(end=pb.End()).audio


def test_a_state_counts_once(servers: list[Server]) -> None:
    with calling() as call:
        first, second, third = call(servers[0]), call(servers[1]), call(servers[1])
        state = first.give(second.started.challenge).state
        second.ask(resume=pb.Resume(state=state))
        for again in (third, call(servers[0])):
            refusal = again.refused(resume=pb.Resume(state=state))
            assert refusal == (grpc.StatusCode.FAILED_PRECONDITION, "resume.state: made for another stream")
        code, message = second.refused(resume=pb.Resume(state=state))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "resume came" in message


@pytest.mark.parametrize("age", [61, -61])
def test_an_outdated_state_is_refused(
    servers: list[Server], keys: Path, state: bytes, monkeypatch: pytest.MonkeyPatch, age: float
) -> None:
    with calling() as call:
        stream = call(servers[0])
        with monkeypatch.context() as patch:
            patch.setattr(handover, "time", FixedTime(time.time() - age))
            sealed = Seals(Settings(handover_keys_file=keys)).seal(state, stream.started.challenge)
        code, message = stream.refused(resume=pb.Resume(state=sealed))
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert message == f"resume.state: made {age} s ago; accepted are 60 s"


class FixedTime:
    """A clock that stands."""

    def __init__(self, seconds: float) -> None:
        self.time = lambda: seconds


def test_forged_and_foreign_states_are_refused(
    servers: list[Server], keys: Path, state: bytes, tmp_path: Path
) -> None:
    good = Seals(Settings(handover_keys_file=keys))
    forger = Seals(Settings(handover_keys_file=written(tmp_path / "forged", OTHER_KEY)))
    other = Enhancer(Model.load(export_random_model(tmp_path, seed=1, fc=32, conv=64, gru=64)))
    engine = Engine(other, 1, Metrics(other.model))
    foreign = engine.save(engine.open(Options(RATE, pcm.F32LE), lambda: None))
    config = pb.StreamConfig(sample_rate_hz=RATE, encoding=pb.ENCODING_S16LE)
    with calling() as call:
        for seals, snapshot, chosen, message in (
            (good, state, CONFIG, ""),
            (forger, state, CONFIG, "not signed with a key of this service"),
            (good, foreign, CONFIG, "another model"),
            (good, state, config, "another config"),
            (good, state.replace(b"snapshot-1", b"snapshot-0", 1), CONFIG, "format"),
            (good, b"", CONFIG, "format"),
        ):
            stream = call(servers[0], chosen)
            sealed = seals.seal(snapshot, stream.started.challenge)
            if not message:
                assert stream.ask(resume=pb.Resume(state=sealed)).resumed.position == 0
                continue
            code, told = stream.refused(resume=pb.Resume(state=sealed))
            assert code is grpc.StatusCode.FAILED_PRECONDITION
            assert message in told
        stream = call(servers[0])
        assert stream.refused(resume=pb.Resume())[0] is grpc.StatusCode.FAILED_PRECONDITION


def test_what_comes_at_the_wrong_time_is_refused(servers: list[Server], enhancer: Enhancer) -> None:
    with calling() as call:
        code, message = call(servers[0]).refused(hand_over=pb.HandOver(challenge=b"short"))
        assert (code, message) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "hand_over.challenge: 5 bytes; a challenge has 16",
        )
        late = call(servers[0])
        late.push(noise(160))
        code, message = late.refused(resume=pb.Resume())
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        with running(enhancer) as without_keys:
            for payload, expected in (
                ({"hand_over": pb.HandOver(challenge=CHALLENGE)}, grpc.StatusCode.INVALID_ARGUMENT),
                ({"resume": pb.Resume(state=b"state")}, grpc.StatusCode.FAILED_PRECONDITION),
            ):
                stream = call(without_keys)
                assert stream.started.challenge == b""
                assert stream.refused(**payload)[0] is expected


def test_a_stream_moves_over_websocket(servers: list[Server]) -> None:
    def ask(call: Any, **message: Any) -> dict[str, Any]:
        call.send(json.dumps(message))
        return json.loads(call.recv(timeout=TIMEOUT_SECONDS))

    addresses = [server.servers[0].sockets[0].getsockname() for server in servers]
    config = {"sample_rate_hz": RATE, "encoding": "ENCODING_F32LE"}
    samples = noise(1_000)
    with calling() as call, ExitStack() as connections:
        unbroken = call(servers[0])
        one, two = (
            connections.enter_context(connect(f"ws://{host}:{port}/v1/stream", ping_interval=None))
            for host, port in addresses
        )
        ask(one, config=config)
        challenge = ask(two, config=config)["started"]["challenge"]
        one.send(samples[:600].tobytes())
        assert one.recv(timeout=TIMEOUT_SECONDS) == unbroken.push(samples[:600])
        handed_over = ask(one, hand_over={"challenge": challenge})["handed_over"]
        assert handed_over["position"] == 600
        assert ask(two, resume={"state": handed_over["state"]}) == {"resumed": {"position": 600}}
        two.send(samples[600:].tobytes())
        assert two.recv(timeout=TIMEOUT_SECONDS) == unbroken.push(samples[600:])


def test_a_session_moves_within_an_rpc_of_many(servers: list[Server]) -> None:
    requests: SimpleQueue[pb.EnhanceStreamsRequest | None] = SimpleQueue()
    samples = noise(1_000)
    with calling() as call, grpc.insecure_channel(f"127.0.0.1:{servers[0].grpc.port}") as channel:
        unbroken = call(servers[0])
        responses: Any = channel.stream_stream(
            "/percepnet_service.v1.EnhancementService/EnhanceStreams",
            pb.EnhanceStreamsRequest.SerializeToString,
            pb.EnhanceStreamsResponse.FromString,
        )(iter(requests.get, None), timeout=TIMEOUT_SECONDS)
        parts = (part for response in responses for part in response.sessions)

        def part(number: int, **payload: Any) -> pb.SessionResponse:
            request = pb.SessionRequest(session_id=number, request=Request(**payload))
            requests.put(pb.EnhanceStreamsRequest(sessions=[request]))
            return next(part for part in parts if part.session_id == number)

        def ask(number: int, **payload: Any) -> pb.EnhanceStreamResponse:
            return part(number, **payload).response

        ask(1, config=CONFIG)
        challenge = ask(2, config=CONFIG).started.challenge
        assert ask(1, audio=samples[:600].tobytes()).audio.audio == unbroken.push(samples[:600])
        state = ask(1, hand_over=pb.HandOver(challenge=challenge)).handed_over.state
        assert ask(2, resume=pb.Resume(state=state)).resumed.position == 600
        assert ask(2, audio=samples[600:].tobytes()).audio.audio == unbroken.push(samples[600:])
        ask(3, config=CONFIG)
        ask(3, audio=samples[:600].tobytes())
        assert "resume came" in part(3, resume=pb.Resume(state=state)).ended.message
        requests.put(None)


# The project's clients, and others


class Replacement:
    """A resolver that knows a server until it is told to stop, then its successor."""

    def __init__(self, server: Server, successor: Server) -> None:
        self.server = server
        self._successor = successor

    @property
    def active(self) -> int:
        return self.server.grpc._engine.active

    def stop(self) -> None:
        self.server.should_exit = True
        eventually(lambda: self.server.health.stopping, "the end")

    def __call__(self, host: str, port: int) -> list[str]:
        server = self._successor if self.server.should_exit else self.server
        return [f"127.0.0.1:{server.grpc.port}"]


@pytest.fixture
def replacement(
    enhancer: Enhancer, servers: list[Server], keys: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Replacement]:
    monkeypatch.setattr(pods, "LOOK_UP_SECONDS", 0)
    with running(enhancer, handover_keys_file=keys, shutdown_grace_seconds=TIMEOUT_SECONDS) as server:
        yield Replacement(server, servers[0])


@pytest.mark.parametrize("multiplex", [False, True])
def test_a_client_moves_with_its_state(replacement: Replacement, enhancer: Enhancer, multiplex: bool) -> None:
    """With audio and parameters under way, within a passage that is not the first."""
    with Client("calls:50051", multiplex=multiplex, resolver=replacement) as client:
        stream = client.stream(RATE, compensate_delay=True)
        stream.push(noise(999))
        stream.flush()
        samples = noise(16_000)
        parts = np.split(samples, 20)
        outputs = [stream.push(part) for part in parts[:2]]
        stream.send(Controls())
        for part in parts[2:6]:
            stream.send(part)
        replacement.stop()
        for part in parts[6:]:
            stream.send(part)
        stream.send(Mark.FLUSH)
        outputs += [answer.samples for _ in range(20) if (answer := stream.receive()) is not None]
        assert (stream.handovers, stream.reconnections) == (1, 0)
        assert len(stream.end()) == 0
    np.testing.assert_array_equal(np.concatenate(outputs), enhance(samples, RATE, enhancer=enhancer))


@pytest.mark.parametrize("multiplex", [False, True])
def test_an_asyncio_client_moves_with_its_state(
    replacement: Replacement, enhancer: Enhancer, multiplex: bool
) -> None:
    """With audio under way, and the end held back: once it is sent the stream stays where it is."""
    samples = noise(16_000)
    parts = np.split(samples, 50)

    async def main() -> list[np.ndarray]:
        stopping = asyncio.Event()

        async def speak() -> AsyncIterator[np.ndarray]:
            for part in parts[:25]:
                yield part
            await stopping.wait()
            for part in parts[25:]:
                yield part
            while not (stream.handovers or stream.reconnections):
                await asyncio.sleep(0.005)

        async with AsyncClient("calls:50051", multiplex=multiplex, resolver=replacement) as client:
            stream = await client.stream(RATE, compensate_delay=True)
            outputs = []
            async for output in stream.pipe(speak()):
                outputs.append(output)
                if len(outputs) == 10:
                    await asyncio.to_thread(replacement.stop)
                    stopping.set()
            assert (stream.handovers, stream.reconnections) == (1, 0)
            return outputs

    output = np.concatenate(asyncio.run(main()))
    np.testing.assert_array_equal(output, enhance(samples, RATE, enhancer=enhancer))


def test_a_stream_whose_end_was_sent_ends_where_it_is(replacement: Replacement) -> None:
    samples = noise(4_000)

    async def speak(client: AsyncClient) -> tuple[AsyncLiveStream, list[np.ndarray]]:
        stream = await client.stream(RATE, compensate_delay=True)
        outputs = [await stream.push(samples[:2_000])]
        await asyncio.to_thread(stopping.wait)
        for item in (samples[2_000:], Mark.END):
            await stream.send(item)
        outputs += [answer.samples for _ in range(2) if (answer := await stream.receive()) is not None]
        return stream, outputs

    async def main() -> tuple[AsyncLiveStream, list[np.ndarray]]:
        async with AsyncClient("calls:50051", resolver=replacement) as client:
            return await speak(client)

    stopping = threading.Event()
    with ThreadPoolExecutor() as pool, Client("calls:50051", resolver=replacement) as client:
        other = pool.submit(asyncio.run, main())
        stream = client.stream(RATE, compensate_delay=True)
        outputs = [stream.push(samples[:2_000])]
        eventually(lambda: replacement.active == 2, "both streams")
        replacement.stop()
        stopping.set()
        for item in (samples[2_000:], Mark.END):
            stream.send(item)
        outputs += [answer.samples for _ in range(2) if (answer := stream.receive()) is not None]
        results = [(stream, outputs), other.result()]
    for call, heard in results:
        assert (call.handovers, call.reconnections) == (0, 0)
        assert sum(map(len, heard)) == len(samples)


def test_a_client_whose_state_is_refused_begins_afresh(
    replacement: Replacement, enhancer: Enhancer, keys: Path
) -> None:
    """All dry the output does not depend on the memory that is lost: every sample must be in its place."""
    samples = noise(8_000)
    parts = np.split(samples, 50)
    dry = Controls(mix=0)

    async def speak(client: AsyncClient) -> tuple[AsyncLiveStream, list[np.ndarray]]:
        stream = await client.stream(RATE, controls=dry, compensate_delay=True)
        outputs = [await stream.push(part) for part in parts[:10]]
        await asyncio.to_thread(told_to_stop.wait)
        return stream, [*outputs, *[await stream.push(part) for part in parts[10:]], await stream.end()]

    async def main() -> tuple[AsyncLiveStream, list[np.ndarray]]:
        async with AsyncClient("calls:50051", resolver=replacement) as client:
            return await speak(client)

    told_to_stop = threading.Event()
    with ThreadPoolExecutor() as pool, Client("calls:50051", resolver=replacement) as client:
        other = pool.submit(asyncio.run, main())
        stream = client.stream(RATE, controls=dry, compensate_delay=True)
        outputs = [stream.push(part) for part in parts[:10]]
        eventually(lambda: replacement.active == 2, "both streams")
        written(keys, OTHER_KEY)
        replacement.stop()
        told_to_stop.set()
        outputs += [stream.push(part) for part in parts[10:]]
        outputs.append(stream.end())
        results = [(stream, outputs), other.result()]
    expected = enhance(samples, RATE, controls=dry, enhancer=enhancer)
    for call, heard in results:
        assert (call.handovers, call.reconnections) == (0, 1)
        np.testing.assert_allclose(np.concatenate(heard), expected, atol=1e-3)


def test_a_caller_that_knows_no_hand_over_ends_within_the_grace(
    replacement: Replacement, enhancer: Enhancer
) -> None:
    samples = noise(2_000)
    with calling() as call:
        stream = call(replacement.server)
        output = stream.push(samples[:1_000])
        replacement.stop()
        answer = stream.ask(audio=samples[1_000:].tobytes()).audio
        assert answer.draining
        output += answer.audio + stream.ask(end=pb.End()).audio.audio
    expected = enhance(samples, RATE, enhancer=enhancer)
    np.testing.assert_array_equal(np.frombuffer(output, "<f4")[stream.started.delay_samples :], expected)
