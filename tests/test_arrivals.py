"""When messages came, though the loop took them later: what waited for the service counts, and no more."""

import threading
import time
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from running import TIMEOUT_SECONDS, Service, running

from percepnet.constants import HOP
from percepnet.enhancer import Enhancer
from percepnet.model import Model
from service.arrivals import LOOK_SECONDS
from service.engine import DEADLINE_SECONDS, LEAD_SECONDS, Engine, Options, Session
from service.metrics import Metrics
from service.pb.percepnet_service.v1 import enhancement_pb2 as pb

FRAME = np.zeros(HOP, np.float32)
STALL_SECONDS = 0.3


@pytest.fixture
def engine(enhancer: Enhancer) -> Engine:
    return Engine(enhancer, 1, Metrics(enhancer.model))


@pytest.fixture
def session(engine: Engine) -> Session:
    return engine.open(Options(48_000, message_samples=HOP), lambda: None)


def push(session: Session, now: float) -> float:
    """A frame that is taken at some time; returns how long it had waited by then."""
    session.push(FRAME, now)
    session._engine.run_round(now)
    return now - session.take_answer().since


def speak(session: Session, seconds: float = 0.1) -> float:
    """Frames that are taken as they come, by a loop that rests meanwhile; returns the time of the last."""
    for i in range(round(100 * seconds)):
        now = 0.01 * i
        assert push(session, now) == 0
        session._engine.arrivals.looked(now + 0.001, now + 0.001 + LOOK_SECONDS)
    return now


@pytest.mark.parametrize("looks_first", [False, True], ids=["message first", "look first"])
def test_what_piled_up_while_nobody_looked_has_waited(
    engine: Engine, session: Session, looks_first: bool
) -> None:
    begun = speak(session)
    now = begun + STALL_SECONDS
    if looks_first:
        engine.arrivals.looked(now, now + LOOK_SECONDS)
    waited = []
    for _ in range(30):
        waited.append(push(session, now))
        now += 0.0005
        engine.arrivals.looked(now, now + LOOK_SECONDS)
    expected = STALL_SECONDS - 0.01 * np.arange(1, 31)
    np.testing.assert_allclose(waited, expected, atol=0.025)
    assert sum(seconds > DEADLINE_SECONDS for seconds in waited) >= 25
    assert session.n_dry > 20  # by the policy: they are more than 40 ms too late
    assert push(session, now + 0.01) == 0


def test_what_comes_while_the_loop_works_has_waited(engine: Engine, session: Session) -> None:
    now = speak(session)
    engine.arrivals.looked(now + 0.008)
    assert push(session, now + 0.014) == pytest.approx(0.004, abs=0.001)


def test_who_is_late_or_was_silent_has_not_waited(engine: Engine, session: Session) -> None:
    """Nor if the loop stood still in that silence."""
    now = speak(session)
    for pause in (0.3, 1.0):
        for i in range(round(100 * pause)):
            engine.arrivals.looked(now + 0.01 * i + 0.005, now + 0.01 * i + 0.005 + LOOK_SECONDS)
        now += pause
        assert push(session, now) == 0
        engine.arrivals.looked(now, now + LOOK_SECONDS)
    engine.arrivals.looked(now + STALL_SECONDS, now + STALL_SECONDS + LOOK_SECONDS)
    assert push(session, now + 1) == 0
    assert session.n_dry == 0


def test_who_sends_ahead_has_not_waited(engine: Engine, session: Session) -> None:
    engine.arrivals.looked(0.0, 0.0 + LOOK_SECONDS)
    for _ in range(round(100 * LEAD_SECONDS) + 20):
        assert push(session, 0.0) == 0
    for now in (STALL_SECONDS, 10.0):
        assert push(session, now) == 0
        engine.arrivals.looked(now, now + LOOK_SECONDS)
    assert session.n_dry == 0


@pytest.fixture(scope="module")
def service(random_model: Model) -> Iterator[Service]:
    with running(Enhancer(random_model), max_streams=2) as server:
        service = Service(server)
        yield service
        service.close()


def test_a_process_that_stands_still_counts_its_misses(service: Service) -> None:
    """From a caller that sends 10 ms each 10 ms, come what may."""
    blocked = threading.Event()
    loop = service.server.grpc._ticker._task.get_loop()

    def block() -> None:
        blocked.set()
        time.sleep(0.5)

    def requests() -> Iterator[pb.EnhanceStreamRequest]:
        config = pb.StreamConfig(sample_rate_hz=48_000, encoding=pb.ENCODING_S16LE, message_samples=HOP)
        yield pb.EnhanceStreamRequest(config=config)
        begun = time.monotonic()
        for i in range(100):
            time.sleep(max(0.0, begun + 0.01 * i - time.monotonic()))
            if i == 30:
                loop.call_soon_threadsafe(block)
            yield pb.EnhanceStreamRequest(audio=bytes(2 * HOP))

    with grpc.insecure_channel(f"127.0.0.1:{service.server.grpc.port}") as channel:
        call = channel.stream_stream(
            "/percepnet_service.v1.EnhancementService/EnhanceStream",
            pb.EnhanceStreamRequest.SerializeToString,
            pb.EnhanceStreamResponse.FromString,
        )
        before = service.metric("percepnet_deadline_misses_total")
        assert len(list(call(requests(), timeout=TIMEOUT_SECONDS))) == 102
    assert blocked.is_set()
    assert service.metric("percepnet_deadline_misses_total") >= before + 30
