"""Which server a stream goes to."""

import time
from typing import Any

import grpc
import pytest

from percepnet.errors import ParameterError
from service.client import pods
from service.client.pods import Attempts, CallError, Pods, look_up


class Refusal(grpc.RpcError):
    """An error as a call raises it."""

    def __init__(self, code: grpc.StatusCode, pushback: str | None = None) -> None:
        self._code = code
        self._pushback = pushback

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return "no"

    def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        return () if self._pushback is None else (("grpc-retry-pushback-ms", self._pushback),)


def found(*addresses: str) -> Pods[Any]:
    """Pods whose name was looked up."""
    known: Pods[Any] = Pods("calls:50051", grpc, resolver=lambda host, port: list(addresses))
    known.look_up()
    return known


def test_the_system_resolver_gives_targets() -> None:
    assert look_up("127.0.0.1", 50051) == ["127.0.0.1:50051"]
    assert look_up("::1", 50051) == ["[::1]:50051"]
    assert "127.0.0.1:50051" in look_up("localhost", 50051)


@pytest.mark.parametrize("target", ["calls", "calls:port", ":70000", "::1:50051"])
def test_other_targets_are_refused(target: str) -> None:
    with pytest.raises(ParameterError, match="accepted is HOST:PORT"):
        Pods(target, grpc)


def test_streams_go_where_the_fewest_are_and_in_turn() -> None:
    known = found("a", "b", "c")
    assert {known.choose() for _ in range(3)} == {"a", "b", "c"}
    known.release("b")
    assert known.choose() == "b"
    first, second = known.choose(), known.choose()
    assert len({first, second, known.choose()}) == 3


def test_clients_begin_at_different_pods() -> None:
    assert {found("a", "b").choose() for _ in range(64)} == {"a", "b"}


def test_a_full_pod_is_left_alone_as_long_as_it_said() -> None:
    known = found("a", "b")
    attempts = Attempts(known, 10)
    attempts.failed("a", Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "400"))
    assert attempts.choose() == attempts.choose() == "b"
    attempts.failed("b", Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "700"))
    assert attempts.choose() is None
    assert 0.3 < attempts.pause_seconds() <= 0.5


@pytest.mark.parametrize("pushback", [None, "-1", "soon"])
def test_one_that_does_not_want_to_be_asked_again_is_not(pushback: str | None) -> None:
    refusal = Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, pushback)
    with pytest.raises(CallError, match=r"no \(RESOURCE_EXHAUSTED\)"):
        Attempts(found("a"), 10).failed("a", refusal)


def test_an_unreachable_pod_is_left_alone_for_longer_and_longer() -> None:
    known = found("a")
    pauses = []
    for _ in range(2000):
        known.avoid("a")
        pauses.append(known.seconds_until_ready())
    assert pauses[0] < 0.13
    assert 2.0 * 0.99 < pauses[-1] <= 2.5
    assert pauses[:4] == sorted(pauses[:4])
    known.succeeded("a")
    known.avoid("a")
    assert known.seconds_until_ready() < 0.13


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED])
def test_a_pod_that_goes_as_the_stream_comes_costs_an_attempt_only(code: grpc.StatusCode) -> None:
    attempts = Attempts(found("a", "b"), 10)
    attempts.failed("a", Refusal(code))
    assert attempts.choose() == attempts.choose() == "b"
    attempts.lost("b", Refusal(code))
    assert attempts.choose() is None
    assert 0 < attempts.pause_seconds() < 0.13


def test_the_most_telling_error_is_raised() -> None:
    """One pod is full, the other is not there: the caller learns that it is full."""
    attempts = Attempts(found("a", "b"), 0)
    attempts.failed("a", Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "1000"))
    attempts.failed("b", Refusal(grpc.StatusCode.UNAVAILABLE))
    with pytest.raises(CallError, match=r"no \(RESOURCE_EXHAUSTED\)") as raised:
        attempts.pause_seconds()
    assert raised.value.trailing_metadata() == (("grpc-retry-pushback-ms", "1000"),)


def test_a_resolver_that_fails_leaves_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pods, "LOOK_UP_SECONDS", 0.01)
    known = found("a")

    def fail(host: str, port: int) -> list[str]:
        raise OSError("no answer")

    known._resolver = fail
    time.sleep(0.02)
    assert known.stale
    known.look_up()
    assert not known.stale
    assert known.choose() == "a"
