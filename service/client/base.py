"""What the two clients have in common: all that does not wait."""

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Generic, TypeVar

import grpc

from percepnet.synthesis import Controls
from service.client.conversation import Answer, Conversation, TurnError
from service.client.pods import (
    PATIENCE_SECONDS,
    Attempts,
    Channel,
    Pods,
    Resolver,
    Tls,
    call_metadata,
    look_up,
)
from service.pb.percepnet_service.v1 import enhancement_pb2 as pb

Connection = TypeVar("Connection")
Stream = TypeVar("Stream")


class BaseStream(Generic[Connection]):
    """A live stream, whatever waits for its answers."""

    def __init__(
        self, client: "BaseClient[Any, Any]", talk: Conversation, timeout_seconds: float | None
    ) -> None:
        self.last: pb.EnhancedAudio | None = None
        """The newest audio that came, with its position and its report."""
        self.handovers = 0
        """How often another server went on with the stream's state, without a difference."""
        self.reconnections = 0
        """How often the stream was taken up again without it, after a short fade."""
        self._answers: deque[Answer] = deque()  # that came early, while the stream moved
        self._n_told = 0  # answers that calls got, or that were dropped
        self._n_unwanted = 0  # answers to cancelled calls that are still to be dropped
        self._talk = talk
        self._timeout_seconds = timeout_seconds
        self._pods = client.pods
        self._patience_seconds = client.patience_seconds
        self._listening = threading.Lock()
        self._error: Exception | None = None
        self._connection: Connection
        self._may_move = 0.0  # not before this time
        self._spent = False  # the server has given the state away, or was asked to: it answers nothing more
        self._attempts = Attempts(self._pods, self._patience_seconds)
        self._n_answers = -1  # when they began, after a loss

    @property
    def started(self) -> pb.StreamStarted:
        """The server's description of the stream."""
        return self._talk.started

    @property
    def delay_samples(self) -> int:
        """Samples by which the output lags behind the input; left out if the delay is compensated."""
        return self.started.delay_samples

    @contextmanager
    def _listen(self) -> Iterator[None]:
        """Whoever is inside, and nobody else, hears the answers; raises TurnError."""
        if not self._listening.acquire(blocking=False):
            raise TurnError(
                "another call waits for the answers of this stream; meanwhile only send may be called"
            )
        try:
            yield
        finally:
            self._listening.release()

    def _check_received(self, *, sending: bool) -> None:
        """Raises TurnError if the next answers belong to `send`."""
        if self._error or self._talk.ended:
            return
        if sending or self._talk.n_asked - self._n_told > self._n_unwanted:
            raise TurnError("what was sent has answers that are still to be received")

    def _tell(self, answer: Answer) -> Answer:
        self._n_told += 1
        if answer.message.HasField("audio"):
            self.last = answer.message.audio
        return answer

    def _lost(self, address: str, error: grpc.RpcError | None) -> Attempts:
        """How to go on after a connection was lost, or is of no use (None); raises the error if that's it."""
        if self._error:
            raise self._error from None
        if self._talk.n_answers != self._n_answers:  # it worked since the last time
            self._n_answers = self._talk.n_answers
            self._attempts = Attempts(self._pods, self._patience_seconds)
        if error is not None:
            self._attempts.lost(address, error)
        return self._attempts


class BaseClient(ABC, Generic[Channel, Stream]):
    """Streams and clips at the servers behind one name.

    target: HOST:PORT, or dns:///HOST:PORT; the streams spread over all addresses that the name has. tls:
    files for TLS; None talks in the clear. api_key: sent with every call. multiplex: the streams to a server
    share one RPC, and what is sent at about the same time one message, so that many speakers cost little.
    patience_seconds: longest time without a server, when a stream is opened or its connection lost, before
    the error is raised; full servers are asked again when they said.
    timeout_seconds: longest time for a unary call. resolver: looks the name up, and may block.
    Raises ParameterError for a target of another form, a key that cannot be sent, and files that cannot be
    used. Opening a stream, and calls, raise CallError if the server refuses, has no room for longer than the
    patience, or is not there, OSError for a name that nobody knows, and EndedError after `close`.
    """

    _maker: ClassVar[Any]
    """grpc or grpc.aio."""
    _trunk: ClassVar[Any]
    """Trunk or AsyncTrunk."""

    def __init__(
        self,
        target: str,
        *,
        tls: Tls | None = None,
        api_key: str | None = None,
        multiplex: bool = False,
        patience_seconds: float = PATIENCE_SECONDS,
        timeout_seconds: float = 60.0,
        resolver: Resolver = look_up,
    ) -> None:
        self.pods: Pods[Channel] = Pods(target, self._maker, tls, resolver)
        self.metadata = call_metadata(api_key)
        self.multiplex = multiplex
        self._trunks: dict[str, Any] = {}
        self._trunks_lock = threading.Lock()
        self.patience_seconds = patience_seconds
        self._timeout_seconds = timeout_seconds

    def stream(
        self,
        sample_rate: int,
        *,
        controls: Controls = Controls(),
        message_samples: int = 0,
        compensate_delay: bool = False,
        report: bool = False,
        never_dry: bool = False,
        timeout_seconds: float | None = None,
    ) -> Stream:
        """Open a live stream; the fields are those of the proto's StreamConfig.

        Raises ParameterError for numbers that are not accepted.
        """
        talk = Conversation(
            sample_rate,
            controls,
            message_samples=message_samples,
            compensate_delay=compensate_delay,
            report=report,
            never_dry=never_dry,
        )
        return self._begin(talk, timeout_seconds)

    def session(self, address: str, timeout_seconds: float | None) -> Any:
        """A session with a server, over the RPC that is there or a new one."""
        with self._trunks_lock:
            trunk = self._trunks.get(address)
            session = trunk.session(timeout_seconds) if trunk else None
            if session is None:
                trunk = self._trunks[address] = self._trunk(self.pods.channel(address), self.metadata)
                session = trunk.session(timeout_seconds)
                trunk.start()
            return session

    @abstractmethod
    def _begin(self, talk: Conversation, timeout_seconds: float | None) -> Stream:
        """Open the stream that a conversation is held over."""
