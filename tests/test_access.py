"""Keys, certificates and limits, through real servers and real handshakes, over gRPC, HTTP and WebSocket.

Invariant: who has no key or certificate gets a declared error and nothing else; probes and metrics are open.
"""

import json
import logging
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import httpx
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from running import TIMEOUT_SECONDS, eventually, running
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from percepnet.enhancer import Enhancer
from service import keys
from service.callers import Caller
from service.main import Server
from service.pb.percepnet_service.v1 import enhancement_pb2 as pb
from service.settings import Settings, SettingsError
from service.watched import FilesError

ALICE, BOB = "alices-secret-key-0001", "bobs~secret.key_0002"
CONFIG = {"sample_rate_hz": 16_000, "encoding": "ENCODING_S16LE"}
SERVICE = "/percepnet_service.v1.EnhancementService/"
Headers = dict[str, str]


class Callers:
    """Ways to call a running server; each returns None or the code of the error."""

    def __init__(
        self,
        server: Server,
        credentials: grpc.ChannelCredentials | None = None,
        context: ssl.SSLContext | None = None,
    ) -> None:
        self.server = server
        self.context = context
        target = f"localhost:{server.grpc.port}"
        self.channel = (
            grpc.secure_channel(target, credentials) if credentials else grpc.insecure_channel(target)
        )
        self.address = f"localhost:{server.servers[0].sockets[0].getsockname()[1]}"
        self.http = httpx.Client(
            base_url=f"http{'s' if context else ''}://{self.address}",
            verify=context or True,
            timeout=TIMEOUT_SECONDS,
        )

    def grpc(self, headers: Headers) -> str | None:
        call = self.channel.unary_unary(SERVICE + "GetStatus")
        try:
            call(b"", metadata=tuple(headers.items()), timeout=TIMEOUT_SECONDS)
        except grpc.RpcError as error:
            return error.code().name  # type: ignore[attr-defined]
        return None

    def open_grpc(self, headers: Headers) -> Any:
        """A live stream that stays open."""
        request = pb.EnhanceStreamRequest(
            config=pb.StreamConfig(sample_rate_hz=16_000, encoding=pb.ENCODING_S16LE)
        )
        call = self.channel.stream_stream(
            SERVICE + "EnhanceStream",
            pb.EnhanceStreamRequest.SerializeToString,
            pb.EnhanceStreamResponse.FromString,
        )
        done = call(_one(request), metadata=tuple(headers.items()), timeout=TIMEOUT_SECONDS)
        next(done)
        return done

    def rest(self, headers: Headers) -> str | None:
        answer = self.http.get("/v1/model", headers=headers)
        return None if answer.status_code == 200 else answer.json()["code"]

    def upload(self, headers: Headers) -> str | None:
        answer = self.http.post("/enhance", content=b"not audio", headers=headers)
        return answer.json()["code"]

    @contextmanager
    def open_websocket(self, headers: Headers, **choices: Any) -> Iterator[dict[str, Any]]:
        scheme = "wss" if self.context else "ws"
        with connect(
            f"{scheme}://{self.address}/v1/stream",
            additional_headers=headers,
            ssl=self.context,
            open_timeout=TIMEOUT_SECONDS,
            **choices,
        ) as socket:
            with suppress(ConnectionClosed):  # a refusal may be quicker
                socket.send(json.dumps({"config": CONFIG}))
            yield json.loads(socket.recv(timeout=TIMEOUT_SECONDS))

    def websocket(self, headers: Headers, **choices: Any) -> str | None:
        with self.open_websocket(headers, **choices) as answer:
            return answer.get("error", {}).get("code")

    def close(self) -> None:
        self.channel.close()
        self.http.close()


def _one(request: pb.EnhanceStreamRequest) -> Iterator[pb.EnhanceStreamRequest]:
    """A request, and then nothing until the call ends."""
    yield request
    threading.Event().wait(TIMEOUT_SECONDS)


@contextmanager
def serving(enhancer: Enhancer, **choices: Any) -> Iterator[Callers]:
    callers = None
    try:
        with running(enhancer, shutdown_grace_seconds=0.1, **choices) as server:
            callers = Callers(server)
            yield callers
    finally:
        if callers is not None:
            callers.close()


@pytest.fixture(scope="module")
def locked(enhancer: Enhancer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callers]:
    """A service that knows Alice from the environment and Bob from a file."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"# who may call\n\nbob: {BOB}\n")
    with serving(enhancer, api_keys=keys.parse(f"alice:{ALICE}"), api_keys_file=file) as callers:
        yield callers


# Keys


def test_a_key_in_either_header_opens_every_door(locked: Callers) -> None:
    for key in (ALICE, BOB):
        for headers in ({"authorization": f"Bearer {key}"}, {"x-api-key": key}):
            for call in (locked.grpc, locked.rest, locked.websocket):
                assert call(headers) is None
            assert locked.upload(headers) == "not_audio"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"x-api-key": ""},
        {"x-api-key": "alice"},
        {"x-api-key": ALICE[:-1]},
        {"x-api-key": ALICE + "1"},
        {"authorization": f"Basic {ALICE}"},
        {"authorization": "Bearer"},
        {"authorization": f"bearer {ALICE} {ALICE}"},
    ],
)
def test_without_a_known_key_every_door_is_shut(locked: Callers, headers: Headers) -> None:
    assert locked.grpc(headers) == "UNAUTHENTICATED"
    assert locked.rest(headers) == "unauthenticated"
    assert locked.upload(headers) == "unauthenticated"
    assert locked.websocket(headers) == "unauthenticated"


def test_a_refusal_says_what_is_missing(locked: Callers) -> None:
    answer = locked.http.get("/v1/model")
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert "Bearer KEY" in answer.json()["detail"]
    with pytest.raises(grpc.RpcError, match="no API key came"):
        locked.open_grpc({})
    listing = reflection_pb2.ServerReflectionRequest(list_services="")
    call = reflection_pb2_grpc.ServerReflectionStub(locked.channel).ServerReflectionInfo(iter([listing]))
    with pytest.raises(grpc.RpcError, match="no API key came"):
        list(call)


def test_refused_streams_are_counted_and_logged(locked: Callers, caplog: pytest.LogCaptureFixture) -> None:
    def refused() -> float:
        name = 'percepnet_streams_total{outcome="unauthenticated"} '
        lines = locked.http.get("/metrics").text.splitlines()
        return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))

    before = refused()
    with caplog.at_level(logging.INFO, "percepnet.service"):
        locked.websocket({})
        with pytest.raises(grpc.RpcError):
            locked.open_grpc({})
        locked.grpc({})  # no stream
        eventually(lambda: refused() == before + 2, "both streams counted")
    outcomes = [record.fields["outcome"] for record in caplog.records if record.msg == "stream refused"]  # type: ignore[attr-defined]
    assert outcomes == ["unauthenticated"] * 2


def test_a_browser_offers_its_key_as_a_subprotocol(locked: Callers) -> None:
    assert locked.websocket({}, subprotocols=["percepnet.v1", f"percepnet.key.{BOB}"]) is None
    refused = locked.websocket({}, subprotocols=["percepnet.v1", "percepnet.key.wrong"])
    assert refused == "unauthenticated"


def test_probes_metrics_and_documentation_are_open(locked: Callers) -> None:
    for path in ("/healthz", "/readyz", "/metrics", "/docs", "/openapi.json"):
        assert locked.http.get(path).status_code == 200
    health = health_pb2_grpc.HealthStub(locked.channel).Check(health_pb2.HealthCheckRequest())
    assert health.status == health_pb2.HealthCheckResponse.SERVING


def test_the_log_names_the_key_and_never_tells_it(locked: Callers, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        locked.websocket({"x-api-key": BOB})
        locked.websocket({}, subprotocols=["percepnet.v1", f"percepnet.key.{BOB}"])
        locked.rest({"x-api-key": ALICE})
        locked.rest({"x-api-key": "a-key-that-nobody-knows"})
        eventually(lambda: caplog.text.count("request") >= 2, "the lines")
    named = [record.fields["key"] for record in caplog.records if "key" in getattr(record, "fields", {})]  # type: ignore[attr-defined]
    assert {"alice", "bob"} <= set(named)
    service = [record for record in caplog.records if record.name.startswith(("percepnet", "uvicorn"))]
    told = str([(record.getMessage(), getattr(record, "fields", "")) for record in service])
    assert not any(key in told for key in (ALICE, BOB, "a-key-that-nobody-knows"))


def test_every_line_of_the_log_tells_the_callers_address(
    locked: Callers, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "percepnet.service"):
        for path in ("/docs", "/openapi.json", "/v1/model", "/nowhere"):
            locked.http.get(path)
        locked.websocket({})
        with pytest.raises(grpc.RpcError):
            locked.open_grpc({})
        locked.open_grpc({"x-api-key": ALICE}).cancel()
        eventually(lambda: "stream closed" in caplog.messages, "the last line")
    peers = [record.fields["peer"] for record in caplog.records]  # type: ignore[attr-defined]
    assert len(peers) == 8
    assert all(re.fullmatch(r"(127\.0\.0\.1|\[::1\]):\d+", peer) for peer in peers)


@pytest.mark.parametrize(
    ("peer", "told"),
    [
        ("ipv4:127.0.0.1:36004", "127.0.0.1:36004"),
        ("ipv6:%5B::1%5D:53754", "[::1]:53754"),
        ("[::1]:53754", "[::1]:53754"),
        ("unix:/run/percepnet", "unix:/run/percepnet"),
    ],
)
def test_an_address_has_one_form_in_the_log(peer: str, told: str) -> None:
    assert Caller(peer).fields == {"peer": told}


def test_a_changed_key_file_counts_at_once_and_a_broken_one_not_at_all(
    enhancer: Enhancer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys"
    file.write_text(f"alice:{ALICE}")
    with serving(enhancer, api_keys_file=file) as callers:
        assert callers.rest({"x-api-key": BOB}) == "unauthenticated"
        file.write_text(f"alice:{ALICE}\nbob:{BOB}")
        for call in (callers.grpc, callers.rest, callers.websocket):
            assert call({"x-api-key": BOB}) is None
        for broken in ("", "bob:short", "no entry"):
            file.write_text(broken)
            assert callers.rest({"x-api-key": BOB}) is None
        file.unlink()
        assert callers.rest({"x-api-key": BOB}) is None
        assert str(file) in caplog.text
        assert "stays" in caplog.text
        file.write_text(f"bob:{BOB}")
        assert callers.rest({"x-api-key": ALICE}) == "unauthenticated"


def test_a_removed_key_opens_no_more_sessions_over_its_rpc(enhancer: Enhancer, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"alice:{ALICE}\nbob:{BOB}")
    requests: SimpleQueue[pb.EnhanceStreamsRequest | None] = SimpleQueue()
    with serving(enhancer, api_keys_file=file) as callers:
        responses: Any = callers.channel.stream_stream(
            SERVICE + "EnhanceStreams",
            pb.EnhanceStreamsRequest.SerializeToString,
            pb.EnhanceStreamsResponse.FromString,
        )(iter(requests.get, None), metadata=(("x-api-key", BOB),), timeout=TIMEOUT_SECONDS)

        def ask(number: int, **payload: Any) -> pb.SessionResponse:
            request = pb.SessionRequest(session_id=number, request=pb.EnhanceStreamRequest(**payload))
            requests.put(pb.EnhanceStreamsRequest(sessions=[request]))
            return next(responses).sessions[0]

        config = pb.StreamConfig(sample_rate_hz=16_000, encoding=pb.ENCODING_S16LE)
        assert ask(1, config=config).response.HasField("started")
        file.write_text(f"alice:{ALICE}")
        assert ask(2, config=config).ended.code == grpc.StatusCode.UNAUTHENTICATED.value[0]
        assert len(ask(1, audio=bytes(320)).response.audio.audio) == 320
        requests.put(None)


@pytest.mark.parametrize(
    "text", ["", "# nobody", "alice", "alice:tooshort", f"al ice:{ALICE}", f"a:{ALICE}/"]
)
def test_keys_that_cannot_be_meant_are_refused_without_telling_them(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="NAME:KEY") as refused:
        keys.parse(text)
    assert ALICE not in str(refused.value)
    if text:
        with pytest.raises(SettingsError, match="PERCEPNET_API_KEYS: expected") as refused:
            Settings.load({"PERCEPNET_API_KEYS": text}, {})
        assert ALICE not in str(refused.value)


def test_keys_stand_in_no_flag_and_no_representation() -> None:
    settings = Settings.load({"PERCEPNET_API_KEYS": f"alice:{ALICE}, bob:{BOB}"}, {"api_keys": f"x:{BOB}"})
    assert [name for name, _ in settings.api_keys] == ["alice", "bob"]
    assert "api_keys=" not in repr(settings)


def test_a_name_may_have_two_keys() -> None:
    entries = keys.parse(f"alice:{ALICE}\nalice:{BOB}")
    assert keys.find(entries, ALICE) == keys.find(entries, BOB) == "alice"
    assert keys.find(entries, "another") is None


# Limits


def test_a_key_has_only_so_many_streams_and_files(enhancer: Enhancer) -> None:
    given = keys.parse(f"alice:{ALICE},bob:{BOB}")
    with serving(enhancer, api_keys=given, max_streams_per_key=2, max_requests_per_key=1) as callers:
        alice, bob = {"x-api-key": ALICE}, {"x-api-key": BOB}
        first = callers.open_grpc(alice)
        with callers.open_websocket(alice) as second:
            assert "started" in second
            assert callers.websocket(alice) == "too_many"
            with pytest.raises(grpc.RpcError, match="at most 2 live streams with one API key") as refused:
                callers.open_grpc(alice)
            assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # type: ignore[attr-defined]
            assert "grpc-retry-pushback-ms" in dict(refused.value.trailing_metadata())  # type: ignore[attr-defined]
            assert callers.websocket(bob) is None
        first.cancel()
        eventually(lambda: callers.websocket(alice) is None, "a free place")

        def pieces() -> Iterator[bytes]:
            yield b"RIFF"
            refused = callers.http.post("/enhance", content=b"x", headers=alice)
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) > 0
            assert refused.json()["code"] == "too_many"
            assert callers.upload(bob) == "not_audio"

        callers.http.post("/enhance", content=pieces(), headers=alice)
        assert callers.upload(alice) == "not_audio"


def test_a_connection_has_only_so_many_streams(enhancer: Enhancer) -> None:
    with serving(enhancer, max_streams_per_connection=2) as callers:
        held = [callers.open_grpc({}) for _ in range(2)]
        with pytest.raises(grpc.RpcError, match="at most 2 live streams over one connection"):
            callers.open_grpc({})
        assert callers.websocket({}) is None  # a connection of its own
        for call in held:
            call.cancel()


# Traces


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", True),
        ("cc-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more", True),
        ("ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", False),
        ("00-00000000000000000000000000000000-b7ad6b7169203331-01", False),
        ("00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01", False),
        ("00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01", False),
        ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more", False),
        ("anything\nelse", False),
        ("", False),
    ],
)
def test_only_a_valid_trace_is_kept(text: str, kept: bool) -> None:
    assert Caller.of("peer", None, {"traceparent": text}).traceparent == (text if kept else None)


# Certificates


class Authority:
    """A certificate authority and the files of a deployment."""

    def __init__(self, folder: Path) -> None:
        self.ca = trustme.CA()
        self.cert, self.key, self.client_ca = (folder / name for name in ("tls.crt", "tls.key", "ca.crt"))
        self.issue("localhost")
        self.ca.cert_pem.write_to_path(self.client_ca)
        client = self.ca.issue_cert("client@example.org")
        self.client_key = client.private_key_pem.bytes()
        self.client_cert = client.cert_chain_pems[0].bytes()
        self.client_file = folder / "client.pem"
        client.private_key_and_cert_chain_pem.write_to_path(self.client_file)

    def issue(self, *names: str) -> None:
        """Write a new certificate for the server."""
        issued = self.ca.issue_cert(*names)
        issued.private_key_pem.write_to_path(self.key)
        issued.cert_chain_pems[0].write_to_path(self.cert)

    def callers(self, server: Server, *, certified: bool) -> Callers:
        pair = {"private_key": self.client_key, "certificate_chain": self.client_cert} if certified else {}
        credentials = grpc.ssl_channel_credentials(self.ca.cert_pem.bytes(), **pair)
        context = ssl.create_default_context(cadata=self.ca.cert_pem.bytes().decode())
        if certified:
            context.load_cert_chain(self.client_file)
        return Callers(server, credentials, context)

    def seen(self, port: int) -> int:
        """What tells apart the certificates that a server shows."""
        pem = ssl.get_server_certificate(("localhost", port), timeout=TIMEOUT_SECONDS)
        der = ssl.PEM_cert_to_DER_cert(pem)
        return hash(der)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@contextmanager
def calling(authority: Authority, server: Server, *, certified: bool = False) -> Iterator[Callers]:
    callers = authority.callers(server, certified=certified)
    try:
        yield callers
    finally:
        callers.close()


def test_no_session_is_resumed_where_certificates_are_asked_for(
    enhancer: Enhancer, authority: Authority
) -> None:
    """Or who was let in once would be for ever, whatever authority is accepted by now."""
    context = ssl.create_default_context(cadata=authority.ca.cert_pem.bytes().decode())
    context.load_cert_chain(authority.client_file)
    session, resumed = None, []
    choices = {"tls_cert": authority.cert, "tls_key": authority.key, "tls_client_ca": authority.client_ca}
    with running(enhancer, **choices) as server:
        for _ in range(2):
            with (
                socket.create_connection(
                    server.servers[0].sockets[0].getsockname(), timeout=TIMEOUT_SECONDS
                ) as plain,
                context.wrap_socket(plain, server_hostname="localhost", session=session) as connection,
            ):
                connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert connection.recv(4096).startswith(b"HTTP/1.1 200")
                session = connection.session
                resumed.append(connection.session_reused)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"https://localhost:{server.servers[0].sockets[0].getsockname()[1]}/", verify=context)
    assert resumed == [False, False]


def test_a_handshake_that_does_not_go_on_is_ended(enhancer: Enhancer, authority: Authority) -> None:
    choices = {"tls_cert": authority.cert, "tls_key": authority.key, "transfer_timeout_seconds": 0.2}
    with (
        running(enhancer, **choices) as server,
        socket.create_connection(
            server.servers[0].sockets[0].getsockname(), timeout=TIMEOUT_SECONDS
        ) as connection,
    ):
        begun = time.monotonic()
        assert connection.recv(1) == b""
        assert time.monotonic() - begun < 50  # not after asyncio's own 60 s


def test_tls_from_files_covers_all_interfaces(enhancer: Enhancer, authority: Authority) -> None:
    choices = {"tls_cert": authority.cert, "tls_key": authority.key}
    with running(enhancer, **choices) as server, calling(authority, server) as callers:
        for call in (callers.grpc, callers.rest, callers.websocket):
            assert call({}) is None
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://{callers.address}/healthz")


def test_new_certificates_are_shown_from_the_next_connection_on(
    enhancer: Enhancer, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    choices = {"tls_cert": authority.cert, "tls_key": authority.key}
    with running(enhancer, **choices) as server:
        ports = [server.grpc.port, server.servers[0].sockets[0].getsockname()[1]]
        before = {authority.seen(port) for port in ports}
        assert len(before) == 1
        authority.issue("localhost")
        after = {authority.seen(port) for port in ports}
        assert len(after) == 1
        assert after != before
        authority.cert.write_text("garbage")
        assert {authority.seen(port) for port in ports} == after
        assert "cannot be used any more" in caplog.text
        with calling(authority, server) as callers:
            assert (callers.grpc({}), callers.rest({})) == (None, None)


def test_a_client_certificate_is_asked_for_but_not_by_probes(
    enhancer: Enhancer, authority: Authority
) -> None:
    choices = {"tls_cert": authority.cert, "tls_key": authority.key, "tls_client_ca": authority.client_ca}
    with running(enhancer, **choices) as server:
        with calling(authority, server, certified=True) as callers:
            for call in (callers.grpc, callers.rest, callers.websocket):
                assert call({}) is None
        with calling(authority, server) as callers:
            assert callers.grpc({}) == "UNAVAILABLE"  # refused in the handshake
            assert callers.rest({}) == "unauthenticated"
            assert callers.websocket({}) == "unauthenticated"
            for path in ("/healthz", "/readyz", "/metrics"):
                assert callers.http.get(path).status_code == 200
        other = Authority(_folder(authority, "other"))
        stranger = ssl.create_default_context(cadata=authority.ca.cert_pem.bytes().decode())
        stranger.load_cert_chain(other.client_file)
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"https://localhost:{server.servers[0].sockets[0].getsockname()[1]}/", verify=stranger)
        other.ca.cert_pem.write_to_path(authority.client_ca)  # now only the other's clients are known
        with calling(authority, server, certified=True) as callers:
            assert callers.grpc({}) == "UNAVAILABLE"
            with pytest.raises(httpx.HTTPError):
                callers.rest({})


def _folder(authority: Authority, name: str) -> Path:
    folder = authority.cert.parent / name
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    "break_it",
    [
        lambda authority: authority.cert.unlink(),
        lambda authority: authority.key.write_text("garbage"),
        lambda authority: Authority(_folder(authority, "x")).key.replace(authority.key),
        lambda authority: authority.client_ca.write_text(""),
    ],
    ids=["missing", "garbage", "another_key", "empty_authority"],
)
def test_files_that_cannot_be_used_are_named_at_the_start(
    enhancer: Enhancer, authority: Authority, break_it: Callable[[Authority], object]
) -> None:
    break_it(authority)
    settings = Settings(tls_cert=authority.cert, tls_key=authority.key, tls_client_ca=authority.client_ca)
    with pytest.raises(FilesError, match=str(authority.cert)):
        Server(settings, enhancer)


@pytest.mark.parametrize(
    "given",
    [{"TLS_CERT": "x"}, {"TLS_KEY": "x"}, {"TLS_CLIENT_CA": "x"}],
    ids=lambda given: next(iter(given)),
)
def test_half_of_tls_is_refused(given: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match="set"):
        Settings.load({f"PERCEPNET_{name}": text for name, text in given.items()}, {})


def test_a_file_reached_through_a_changed_link_is_read_again(enhancer: Enhancer, tmp_path: Path) -> None:
    """As Kubernetes changes the files of a secret."""
    for name, key in (("one", ALICE), ("two", BOB)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "keys").write_text(f"caller:{key}")
    link = tmp_path / "data"
    link.symlink_to("one")
    with serving(enhancer, api_keys_file=link / "keys") as callers:
        assert callers.rest({"x-api-key": ALICE}) is None
        (tmp_path / "next").symlink_to("two")
        os.replace(tmp_path / "next", link)
        assert callers.rest({"x-api-key": BOB}) is None
        assert callers.rest({"x-api-key": ALICE}) == "unauthenticated"
