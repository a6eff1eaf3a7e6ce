"""Callers that do everything wrong, over gRPC, WebSocket and bare sockets.

Invariant: what was opened ends in a result or in a declared error, never INTERNAL or 500, never a hang; the
other streams are unharmed, and nothing stays behind.
"""

import gc
import json
import logging
import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import grpc
import httpx
import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running import TIMEOUT_SECONDS, eventually, running
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from percepnet.enhancer import Enhancer
from percepnet.model import Model
from service import streams
from service.client import Client
from service.engine import Session
from service.main import Server
from service.pb.percepnet_service.v1 import enhancement_pb2 as pb
from service.streams import MAX_NOT_BEGUN, Conversation

STREAM = "/percepnet_service.v1.EnhancementService/EnhanceStream"
RATE = 16_000
CONFIG = pb.StreamConfig(sample_rate_hz=RATE, encoding=pb.ENCODING_S16LE)
Request = pb.EnhanceStreamRequest

DECLARED = {"OK", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "CANCELLED", "FAILED_PRECONDITION"}
CLOSED = {1000, 1002, 1006, 1007, 1009, 4409, 4422, 4503}


class Service:
    """A running server that must stand all this."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.grpc_address = "127.0.0.1", server.grpc.port
        self.http_address: tuple[str, int] = server.servers[0].sockets[0].getsockname()
        self.channel = grpc.insecure_channel("{}:{}".format(*self.grpc_address))

    @property
    def n_members(self) -> int:
        """Callers that are watched over, whether they have begun or not."""
        return len(self.server.grpc._streams._members)

    def metrics(self) -> dict[str, float]:
        text = httpx.get("http://{}:{}/metrics".format(*self.http_address), timeout=TIMEOUT_SECONDS).text
        lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in lines}


@pytest.fixture(scope="module")
def service(random_model: Model) -> Iterator[Service]:
    with running(Enhancer(random_model), max_streams=64, stream_idle_seconds=TIMEOUT_SECONDS) as server:
        service = Service(server)
        yield service
        service.channel.close()


@pytest.fixture(autouse=True)
def unharmed(service: Service, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A stream beside them all goes on; in the end there is nothing left, and no line tells of a failure."""
    with Client("{}:{}".format(*service.grpc_address)) as client, client.stream(RATE) as bystander:
        yield
        samples = np.zeros(320, np.float32)
        assert len(bystander.push(samples)) == 320
        bystander.end()
    eventually(lambda: service.metrics()["percepnet_streams_active"] == 0, "free places")
    assert service.metrics().get('percepnet_streams_total{outcome="internal"}', 0) == 0
    ours = [
        record for record in caplog.records if record.name.startswith(("percepnet", "asyncio", "uvicorn"))
    ]
    assert [record.getMessage() for record in ours if record.levelno >= logging.ERROR] == []


# Messages, right and wrong ones

floats = st.floats(width=32) | st.sampled_from([0.0, 0.5, 1.0])
parameters = st.builds(
    pb.Parameters,
    attenuation_limit_db=st.none() | floats,
    mix=st.none() | floats,
    postfilter=st.none() | floats,
)
configs = st.builds(
    pb.StreamConfig,
    sample_rate_hz=st.sampled_from([0, 7_999, 8_000, 11_025, 44_100, 48_000, 48_001, 2**32 - 1]),
    encoding=st.sampled_from([0, 1, 2, 3, -1]),
    parameters=st.none() | parameters,
    message_samples=st.sampled_from([0, 1, 480, 8_000, 8_001, 2**32 - 1]),
    compensate_delay=st.booleans(),
    report=st.booleans(),
)
sound = st.builds(bytes, st.sampled_from([0, 1, 2, 3, 4, 160, 321, 640, 1_920, 32_000, 200_000])) | st.binary(
    max_size=200
)
requests = st.one_of(
    st.builds(Request, config=configs),
    st.builds(Request, audio=sound),
    st.builds(Request, parameters=parameters),
    st.builds(Request, hand_over=st.builds(pb.HandOver, challenge=st.binary(max_size=20))),
    st.builds(Request, resume=st.builds(pb.Resume, state=st.binary(max_size=60))),
    st.just(Request(flush=pb.Flush())),
    st.just(Request(end=pb.End())),
    st.just(Request()),
)
begun = st.lists(requests, max_size=8).map(lambda rest: [Request(config=CONFIG), *rest])
conversations = begun | st.lists(requests, max_size=4)
abuse = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@abuse
@given(
    conversation=conversations,
    garbage=st.none() | st.binary(min_size=1, max_size=50),
    hang_up_after=st.none() | st.integers(0, 4),
)
def test_any_messages_over_grpc_end_in_a_declared_status(
    service: Service, conversation: list[Request], garbage: bytes | None, hang_up_after: int | None
) -> None:
    texts = [request.SerializeToString() for request in conversation]
    if garbage is not None:
        texts.append(garbage)
    call: Any = service.channel.stream_stream(STREAM)(iter(texts), timeout=TIMEOUT_SECONDS)
    with suppress(grpc.RpcError):
        for i, _ in enumerate(call):
            if i == hang_up_after:
                call.cancel()
    assert call.code().name in DECLARED, call.details()
    assert call.code() is not grpc.StatusCode.INVALID_ARGUMENT or call.details()


sessions = st.lists(
    st.builds(pb.SessionRequest, session_id=st.integers(0, 2), request=st.none() | requests), max_size=6
)


@abuse
@given(
    messages=st.lists(sessions, max_size=6),
    garbage=st.none() | st.binary(min_size=1, max_size=50),
    hang_up_after=st.none() | st.integers(0, 4),
)
def test_any_messages_for_many_sessions_end_in_declared_statuses(
    service: Service,
    messages: list[list[pb.SessionRequest]],
    garbage: bytes | None,
    hang_up_after: int | None,
) -> None:
    opening = [pb.SessionRequest(session_id=id, request=Request(config=CONFIG)) for id in range(2)]
    texts = [pb.EnhanceStreamsRequest(sessions=part).SerializeToString() for part in (opening, *messages)]
    if garbage is not None:
        texts.append(garbage)
    call: Any = service.channel.stream_stream(f"{STREAM}s", None, pb.EnhanceStreamsResponse.FromString)(
        iter(texts), timeout=TIMEOUT_SECONDS
    )
    codes = set()
    with suppress(grpc.RpcError):
        for i, response in enumerate(call):
            codes |= {one.ended.code for one in response.sessions if one.HasField("ended")}
            if i == hang_up_after:
                call.cancel()
    assert call.code().name in DECLARED, call.details()
    names = {code.value[0]: code.name for code in grpc.StatusCode}
    assert {names[code] for code in codes} <= DECLARED


texts = st.one_of(
    st.text(max_size=50),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
        max_leaves=8,
    ).map(json.dumps),
    st.sampled_from(
        [
            '{"config": {"sample_rate_hz": 16000, "encoding": "ENCODING_S16LE"}}',
            '{"config": {"sample_rate_hz": 1e99}}',
            '{"config": {"sample_rate_hz": "16000", "encoding": 1, "report": true}}',
            '{"config": null}',
            '{"parameters": {"mix": "Infinity"}}',
            '{"parameters": {"mix": 0.5, "postfilter": "yes"}}',
            '{"parameters": {"attenuation_limit_db": 1e400}}',
            '{"hand_over": {"challenge": "AAAA"}}',
            '{"resume": {"state": "AAAA"}}',
            '{"flush": {}}',
            '{"end": {}}',
            '{"flush": {}, "end": {}}',
            '{"audio": "AAAA"}',
            '{"audio": "%"}',
            "[" * 5_000,
        ]
    ),
)


@abuse
@given(
    opened=st.booleans(),
    messages=st.lists(texts | sound, max_size=8),
    ending=st.sampled_from(["end", "close", "vanish", "garbage"]),
)
def test_any_messages_over_websocket_end_in_a_declared_code(
    service: Service, opened: bool, messages: list[str | bytes], ending: str
) -> None:
    url = "ws://{}:{}/v1/stream".format(*service.http_address)
    with connect(
        url, open_timeout=TIMEOUT_SECONDS, ping_interval=None, close_timeout=TIMEOUT_SECONDS
    ) as call:
        with suppress(ConnectionClosed, OSError):  # a refusal may be quicker
            if opened:
                call.send('{"config": {"sample_rate_hz": 16000, "encoding": "ENCODING_S16LE"}}')
            for message in messages:
                call.send(message)
            if ending == "end":
                call.send('{"end": {}}')
            elif ending == "vanish":
                call.socket.shutdown(socket.SHUT_RDWR)
            elif ending == "garbage":
                call.socket.sendall(b"\xff\xff\xff\xff garbage")
        if ending != "close":
            with pytest.raises(ConnectionClosed) as closed:
                read_on(call)
            code = closed.value.rcvd.code if closed.value.rcvd else 1006
            assert code in CLOSED, closed.value


def read_on(call: Any) -> None:
    while True:
        call.recv(timeout=TIMEOUT_SECONDS)


# Bytes that are no messages

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
UPGRADE = (
    b"GET /v1/stream HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
frames = st.builds(
    lambda kind, flags, length, data: struct.pack(">I", length)[1:] + bytes([kind, flags]) + data,
    st.integers(0, 255),
    st.integers(0, 255),
    st.integers(0, 2**24 - 1),
    st.binary(max_size=40),
)


def ended(address: tuple[str, int], *pieces: bytes) -> bytes:
    """What a server answers to some bytes until it hangs up, after the caller has closed its side."""
    with socket.create_connection(address, timeout=TIMEOUT_SECONDS) as connection:
        with suppress(OSError):  # the server may have hung up
            for piece in pieces:
                connection.sendall(piece)
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        with suppress(ConnectionError):
            while data := connection.recv(65_536):
                answer += data
        return answer


@abuse
@given(
    start=st.sampled_from([b"", PREFACE, PREFACE + bytes(3) + b"\x04\x00\x00\x00\x00\x00"]),
    rest=st.lists(frames),
)
def test_no_bytes_upset_the_grpc_port(service: Service, start: bytes, rest: list[bytes]) -> None:
    ended(service.grpc_address, start, *rest)


@abuse
@given(
    start=st.sampled_from(
        [b"", b"GET / HTTP/1.1\r\n", b"POST /enhance HTTP/1.1\r\nHost: x\r\n", UPGRADE[:-2]]
    ),
    rest=st.lists(st.binary(max_size=60) | st.text(max_size=40).map(str.encode), max_size=4),
)
def test_no_bytes_upset_the_http_port(service: Service, start: bytes, rest: list[bytes]) -> None:
    answer = ended(service.http_address, start, *rest, b"\r\n\r\n")
    assert b" 500 " not in answer.partition(b"\r\n")[0]


@abuse
@given(st.lists(st.binary(min_size=1, max_size=60), max_size=4))
def test_no_bytes_upset_an_open_websocket(service: Service, pieces: list[bytes]) -> None:
    answer = ended(service.http_address, UPGRADE, *pieces)
    assert answer.startswith(b"HTTP/1.1 101 ")


def frame(head: int, data: bytes = b"") -> bytes:
    """One of a WebSocket, masked with zeros."""
    return bytes([head, 0x80 | len(data)]) + bytes(4) + data


@pytest.mark.parametrize(
    ("first", "flood"),
    [(b"", frame(0x8A)), (frame(0x02), frame(0x00))],
    ids=["pongs", "fragments"],
)
def test_a_flood_of_frames_leaves_others_their_turns(service: Service, first: bytes, flood: bytes) -> None:
    """Another stream gets many answers before a ping behind the flood gets one."""
    config = '{"config": {"sample_rate_hz": 16000, "encoding": "ENCODING_S16LE"}}'
    url = "ws://{}:{}/v1/stream".format(*service.http_address)
    with (
        connect(url, open_timeout=TIMEOUT_SECONDS, ping_interval=None) as bystander,
        socket.create_connection(service.http_address, TIMEOUT_SECONDS) as flooder,
        ThreadPoolExecutor() as pool,
    ):
        bystander.send(config)
        bystander.recv(timeout=TIMEOUT_SECONDS)
        flooder.sendall(UPGRADE)
        assert flooder.recv(65_536).startswith(b"HTTP/1.1 101 ")
        flooder.sendall(frame(0x81, config.encode()))
        answer = flooder.recv(65_536)
        assert b"started" in answer
        sent = pool.submit(flooder.sendall, first + 60_000 * flood + frame(0x89, b"behind"))
        for _ in range(20):
            bystander.send(bytes(320))
            bystander.recv(timeout=TIMEOUT_SECONDS)
        flooder.settimeout(0)
        with suppress(BlockingIOError):
            while data := flooder.recv(65_536):
                answer += data
        assert b"behind" not in answer
        flooder.shutdown(socket.SHUT_RDWR)
        with suppress(OSError):
            sent.result()


# Callers that open and do nothing


def test_connections_that_never_speak_are_closed(random_model: Model) -> None:
    """Nothing at all, half of a beginning, and over HTTP half of a second head."""
    whole = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    with running(Enhancer(random_model), transfer_timeout_seconds=0.3) as server:
        http, grpc_port = server.servers[0].sockets[0].getsockname(), ("127.0.0.1", server.grpc.port)
        for address, said in (
            (http, []),
            (http, [whole[:20]]),
            (http, [whole, whole[:20]]),
            (grpc_port, []),
            (grpc_port, [PREFACE]),
        ):
            with socket.create_connection(address, TIMEOUT_SECONDS) as connection:
                for piece in said:
                    connection.sendall(piece)
                    answer = b"" if piece is whole else b"}"
                    while not answer.endswith(b"}"):
                        answer += connection.recv(65_536)
                while connection.recv(65_536):  # gRPC sends its settings first
                    pass


def crowd(service: Service, number: int, said: threading.Event, first: str = STREAM) -> list[Any]:
    """Streams that begin, with a config, when it is said; what is opened first is there before the others."""

    def begin() -> Iterator[bytes]:
        if said.wait(TIMEOUT_SECONDS):
            yield Request(config=CONFIG).SerializeToString()

    calls = []
    eventually(lambda: service.n_members == 1, "the bystander alone")
    for method in (first, *[STREAM] * (number - 1)):
        calls.append(service.channel.stream_stream(method)(begin(), timeout=TIMEOUT_SECONDS))
        eventually(lambda: service.n_members > 1, "the first")
    return calls


@pytest.mark.parametrize(
    "method",
    [
        STREAM,
        f"{STREAM}s",
        "/percepnet_service.v1.EnhancementService/GetStatus",
        "/nvidia.maxine.bnr.v1.MaxineBNR/EnhanceAudio",
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/Watch",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    ],
)
def test_a_crowd_that_never_speaks_keeps_nobody_out(
    service: Service, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it opens: who was silent for longest is told to go."""
    monkeypatch.setattr(streams, "PROMPT_SECONDS", 0.0)
    said = threading.Event()
    oldest, *others = crowd(service, MAX_NOT_BEGUN + 1, said, method)
    assert oldest.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "begin at once" in oldest.details()
    assert dict(oldest.trailing_metadata())["grpc-retry-pushback-ms"] == "1000"
    sockets = [socket.create_connection(service.http_address) for _ in range(50)]
    with Client("{}:{}".format(*service.grpc_address)) as client, client.stream(RATE) as speaking:
        assert len(speaking.push(np.zeros(160, np.float32))) == 160
        speaking.end()
    for call in others:
        call.cancel()
    for connection in sockets:
        connection.close()
    said.set()


def test_a_crowd_that_begins_within_a_second_is_served(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "PROMPT_SECONDS", TIMEOUT_SECONDS)  # the machine may be slow
    said = threading.Event()
    calls = crowd(service, MAX_NOT_BEGUN + 20, said)
    eventually(lambda: service.n_members == 1 + len(calls), "the crowd")
    said.set()
    assert [len(list(call)) for call in calls] == [2] * len(calls)


def test_a_crowd_that_is_too_large_gives_way_at_once(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "PROMPT_SECONDS", TIMEOUT_SECONDS)
    monkeypatch.setattr(streams, "MAX_CROWD", MAX_NOT_BEGUN + 1)
    said = threading.Event()
    oldest, *others = crowd(service, MAX_NOT_BEGUN + 2, said)
    assert oldest.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    said.set()
    assert [len(list(call)) for call in others] == [2] * len(others)


def test_a_crowd_that_stays_silent_gives_way_though_nobody_comes(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "PROMPT_SECONDS", 0.5)
    said = threading.Event()
    oldest, *others = crowd(service, MAX_NOT_BEGUN + 1, said)
    assert oldest.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    said.set()
    assert [len(list(call)) for call in others] == [2] * len(others)


# What stays


def test_a_thousand_streams_leave_nothing_behind(service: Service) -> None:
    """Each is opened with a config and closed at once, which brings the tail; fifty at a time."""
    config = Request(config=CONFIG).SerializeToString()
    ok = 'percepnet_streams_total{outcome="ok"}'

    def converse(times: int) -> None:
        stream = service.channel.unary_stream(STREAM)
        for _ in range(times):
            calls = [stream(config, timeout=TIMEOUT_SECONDS) for _ in range(50)]
            assert [len(list(call)) for call in calls] == [2] * 50

    def kept() -> tuple[int, int]:
        gc.collect()
        ours = sum(isinstance(thing, Session | Conversation) for thing in gc.get_objects())
        return psutil.Process().num_fds(), ours

    converse(1)
    before, ended = kept(), service.metrics().get(ok, 0)
    converse(20)
    eventually(lambda: kept() <= before, "as few open files and sessions as before")
    assert service.metrics()[ok] == ended + 1_000
