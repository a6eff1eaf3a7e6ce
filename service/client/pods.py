"""Which server a stream goes to: the addresses behind a name, what they carry, and which to leave alone.

Behind a headless service a name stands for all pods. A client holds a channel to each that it uses, spreads
its streams evenly, leaves a full or a dead one alone for a while, and looks the name up again now and then.
"""

import random
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import grpc

from percepnet.errors import ParameterError, PercepNetError, reason
from service.client.conversation import EndedError
from service.settings import Address

LOOK_UP_SECONDS = 5.0
"""Age from which the addresses are looked up again: cluster DNS lets records live as long."""

PATIENCE_SECONDS = 10.0
"""Time without a server after which an error is raised, by default: one that is replaced is back by then."""

MOVE_SECONDS = 1.0
"""Between two looks for another server, while the present one is about to stop."""

ANSWER_SECONDS = 1.0
"""Longest wait for that other server's first answer: meanwhile the call gets none of the present one's."""

PING_SECONDS, PONG_SECONDS = 20.0, 5.0
"""A server that was silent for the first is pinged, and given up if it does not answer within the second: one
that hangs is left within 25 s, one that pauses for a second or two is kept."""

CLOSED_SECONDS = 0.1
"""Within this time a sender that waits for room learns that the client was closed."""

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 2.0
"""A server that cannot be reached is left alone for a time that doubles from one to the other."""

_LOST = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
"""How a call ends when its server goes. CANCELLED, if it was not ours to cancel, is what gRPC makes of a
stream that reaches a server just as that stops to take calls."""

Resolver = Callable[[str, int], Iterable[str]]
"""Host and port → addresses HOST:PORT; blocks, and raises OSError."""

Channel = TypeVar("Channel")


class CallError(grpc.RpcError, PercepNetError):
    """A server refused, had no room for longer than the patience, or was lost for good: `code` says which."""

    def __init__(self, code: grpc.StatusCode, details: str, retry_seconds: float = 0.0) -> None:
        super().__init__(f"{details} ({code.name})")
        self._code = code
        self._details = details
        self._retry_seconds = retry_seconds

    @classmethod
    def of(cls, error: grpc.RpcError) -> "CallError":
        """The same for an error of any kind of call."""
        return cls(error.code(), error.details() or "", pushback_seconds(error) or 0.0)

    def code(self) -> grpc.StatusCode:
        """The status."""
        return self._code

    def details(self) -> str:
        """The reason."""
        return self._details

    def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        """When to come back, if that helps."""
        pause = round(1000 * self._retry_seconds)
        return (("grpc-retry-pushback-ms", str(pause)),) if pause else ()


@dataclass(frozen=True)
class Tls:
    """Files for TLS, in PEM: who is trusted, and for mTLS who we are."""

    root_certificates: str | Path | None = None
    """Of those who may vouch for the server; None for those that gRPC brings."""
    certificate: str | Path | None = None
    key: str | Path | None = None

    def credentials(self) -> Any:
        """For gRPC; raises ParameterError for half of a pair, and for files that cannot be used."""
        if (self.certificate is None) != (self.key is None):
            missing = "key" if self.key is None else "certificate"
            raise ParameterError(f"mTLS takes a certificate and its key; the {missing} is missing")
        try:
            roots, key, certificate = (
                None if path is None else Path(path).read_bytes()
                for path in (self.root_certificates, self.key, self.certificate)
            )
        except OSError as error:
            raise ParameterError(f"a file for TLS cannot be read: {reason(error)}") from error
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # gRPC would only tell that no handshake came about
        try:
            wanted = f"certificates in {self.root_certificates}"
            if self.root_certificates is not None:
                context.load_verify_locations(self.root_certificates)
            wanted = f"a certificate and its key, without a passphrase, in {self.certificate} and {self.key}"
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, self.key, password="")
        except ssl.SSLError as error:
            raise ParameterError(f"TLS takes PEM files; there must be {wanted}") from error
        return grpc.ssl_channel_credentials(roots, key, certificate)


def look_up(host: str, port: int) -> list[str]:
    """The addresses of a name by the system's resolver."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(Address(str(info[4][0]), port)) for info in found))


@dataclass
class _Pod:
    streams: int = 0
    """Held by this client."""
    turn: int = 0
    """When it was chosen last."""
    pause_seconds: float = FIRST_PAUSE_SECONDS
    """How long it is left alone after the next failure."""
    until: float = 0.0
    """Left alone till then."""
    listed: bool = True
    """Its address still stands behind the name."""


class Pods(Generic[Channel]):
    """The servers behind one name, and a channel to each that is used. May be shared by threads.

    target: HOST:PORT, or dns:///HOST:PORT. maker: grpc or grpc.aio, which make channels alike. tls: None
    talks in the clear. resolver: looks the name up.
    Raises ParameterError for a target of another form, and for files that cannot be used.
    """

    def __init__(
        self,
        target: str,
        maker: Any,
        tls: Tls | None = None,
        resolver: Resolver = look_up,
    ) -> None:
        try:
            self._name = Address.parse(target.removeprefix("dns:///"))
        except ValueError as error:
            raise ParameterError(f"the target {target!r}; accepted is {error}") from error
        self._maker = maker
        self._credentials = tls and tls.credentials()
        self._resolver = resolver
        self._pods: dict[str, _Pod] = {}
        self._channels: dict[str, Channel] = {}
        self._looked_up = float("-inf")
        self._turn = 0
        self._closed = False
        self._lock = threading.Lock()

    @property
    def stale(self) -> bool:
        """Whether it is time for `look_up`."""
        return not self._closed and time.monotonic() - self._looked_up > LOOK_UP_SECONDS

    def look_up(self) -> None:
        """Look the name up; blocks. Raises OSError if that fails and no address is known from before."""
        with self._lock:
            self._looked_up = time.monotonic()  # the others go on with what is known
        try:
            found = list(self._resolver(self._name.host, self._name.port))
        except OSError:
            if not self._pods:
                self._looked_up = float("-inf")
                raise
            return
        random.shuffle(found)  # or all clients would begin with the same pod
        with self._lock:
            for pod in self._pods.values():
                pod.listed = False
            for address in found:
                self._pods.setdefault(address, _Pod()).listed = True

    def choose(self, *, anyway: bool = False) -> str | None:
        """Take a place at the listed pod with the fewest streams of this client, in turn among equals.

        `release` gives it back. Of pods that are all to be left alone for now, none is taken (None), or
        anyway the one whose time is over soonest. Raises EndedError after `close`.
        """
        now = time.monotonic()
        with self._lock:
            self.check_open()
            listed = {name: pod for name, pod in self._pods.items() if pod.listed}
            ready = {name: pod for name, pod in listed.items() if pod.until <= now}
            if ready:
                chosen = min(ready, key=lambda name: (ready[name].streams, ready[name].turn))
            elif listed and anyway:
                chosen = min(listed, key=lambda name: listed[name].until)
            else:
                return None
            self._turn += 1
            self._pods[chosen].turn = self._turn
            self._pods[chosen].streams += 1
            return chosen

    def release(self, address: str) -> None:
        """Give a place back."""
        with self._lock:
            if address in self._pods:
                self._pods[address].streams -= 1

    def succeeded(self, address: str) -> None:
        """A pod works."""
        with self._lock:
            if address in self._pods:
                self._pods[address].pause_seconds = FIRST_PAUSE_SECONDS

    def avoid(self, address: str, seconds: float | None = None) -> None:
        """Leave a pod alone for the time it asked for, or one that doubles with every failure."""
        with self._lock:
            pod = self._pods.get(address, _Pod())  # it may be gone by now
            if seconds is None:
                seconds = pod.pause_seconds
                pod.pause_seconds = min(2 * seconds, LONGEST_PAUSE_SECONDS)
                self._looked_up = float("-inf")  # there may be another one in its place
            # Those who were turned away together should not come back together.
            pod.until = time.monotonic() + seconds * random.uniform(1, 1.25)

    def seconds_until_ready(self) -> float:
        """Time until `choose` may find one."""
        with self._lock:
            times = [pod.until for pod in self._pods.values() if pod.listed]
        return max(0.0, min(times) - time.monotonic()) if times else FIRST_PAUSE_SECONDS

    def channel(self, address: str) -> Channel:
        """The channel to a pod; raises EndedError after `close`."""
        with self._lock:
            self.check_open()
            if address not in self._channels:
                self._channels[address] = self._make(address)
            return self._channels[address]

    def forget(self) -> list[Channel]:
        """Forget the pods that are gone and carry no stream; returns their channels for closing."""
        with self._lock:
            gone = [name for name, pod in self._pods.items() if not (pod.listed or pod.streams)]
            for name in gone:
                del self._pods[name]
            return [self._channels.pop(name) for name in gone if name in self._channels]

    def close(self) -> list[Channel]:
        """Take no more streams; returns all channels for closing."""
        with self._lock:
            self._closed = True
            channels = list(self._channels.values())
            self._channels.clear()
            return channels

    def check_open(self) -> None:
        """Raise EndedError after `close`."""
        if self._closed:
            raise EndedError("the client was closed")

    def _make(self, address: str) -> Channel:
        options: list[tuple[str, Any]] = [
            ("grpc.default_authority", str(self._name)),
            ("grpc.keepalive_time_ms", round(1000 * PING_SECONDS)),
            ("grpc.keepalive_timeout_ms", round(1000 * PONG_SECONDS)),
            # So long gRPC really waits, for keepalive and for its other pings; 60 s by default.
            ("grpc.http2.ping_timeout_ms", round(1000 * PONG_SECONDS)),
            # A connection that does not come about is given up after this time.
            ("grpc.min_reconnect_backoff_ms", 5_000),
            ("grpc.initial_reconnect_backoff_ms", round(1000 * FIRST_PAUSE_SECONDS)),
            ("grpc.max_reconnect_backoff_ms", round(1000 * LONGEST_PAUSE_SECONDS)),
            ("grpc.max_receive_message_length", -1),
        ]
        if self._credentials is None:
            return self._maker.insecure_channel(address, options=options)
        # Pods are reached by number; their certificate bears the name.
        options.append(("grpc.ssl_target_name_override", self._name.host))
        return self._maker.secure_channel(address, self._credentials, options=options)


class Attempts:
    """How long one stream goes on trying to find a server: decides, and waits for nobody.

    patience_seconds: after this time without a server, or with servers that break as soon as they are found,
    the last error stands. Whatever the patience, one server is tried, and every one that does not want to be
    left alone.
    """

    def __init__(self, pods: Pods[Any], patience_seconds: float) -> None:
        self._pods = pods
        self._deadline = time.monotonic() + patience_seconds
        self._error: Exception | None = None
        self._broken = False

    def choose(self) -> str | None:
        """The server to try now; None if it is time for `pause_seconds`."""
        return self._pods.choose(anyway=self._error is None)

    def lost(self, address: str, error: grpc.RpcError) -> None:
        """Take note of a connection that broke; raises CallError where trying again is no use."""
        late = self._broken and time.monotonic() > self._deadline
        if late or error.code() not in _LOST:
            raise CallError.of(error) from None
        self._pods.avoid(address)
        if self._broken:
            self._error = CallError.of(error)  # the same server is not tried at once a second time
        self._broken = True

    def failed(self, address: str, error: grpc.RpcError) -> None:
        """Take note of a server that did not take the call; raises CallError where trying again is no use."""
        full, pause = error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, pushback_seconds(error)
        if full and pause is not None:
            self._pods.avoid(address, pause)
            self._error = CallError.of(error)
        elif error.code() in _LOST:
            self._pods.avoid(address)
            # That one server is full says more than that another one is not there.
            if not is_full(self._error):
                self._error = CallError.of(error)
        else:
            raise CallError.of(error) from None

    def not_found(self, error: OSError) -> None:
        """Take note that the name could not be looked up."""
        self._error = error

    def pause_seconds(self) -> float:
        """How long to wait before the next attempt; raises the last error when patience is over."""
        pause = self._pods.seconds_until_ready()
        if time.monotonic() + pause > self._deadline:
            raise self._error or OSError("no address stands behind the name")
        return pause


def pushback_seconds(error: grpc.RpcError) -> float | None:
    """When the server wants to be asked again; None if it did not say, or never."""
    for name, value in error.trailing_metadata() or ():
        if name == "grpc-retry-pushback-ms" and str(value).isdecimal():
            return int(value) / 1000
    return None


def is_full(error: object) -> bool:
    """Whether a server has no room, or none for this caller."""
    return isinstance(error, grpc.RpcError) and error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def call_metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """What goes with every call; raises ParameterError for a key that cannot."""
    if api_key is None:
        return ()
    if not isinstance(api_key, str) or not re.fullmatch("[!-~]*", api_key):
        raise ParameterError(
            "the API key cannot be sent; accepted are letters, digits and punctuation of ASCII, "
            "without spaces or line ends anywhere"
        )
    return (("authorization", f"Bearer {api_key}"),)
