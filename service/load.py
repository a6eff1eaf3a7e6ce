"""`percepnet load`: live streams paced as callers send them, and what they cost the server.

The sender is open-loop: every message has its time, and its latency counts from there to the reading of its
answer, whatever happened to the ones before.
"""

import argparse
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpc
import numpy as np

from percepnet.audio import AudioReader
from percepnet.errors import ParameterError, PercepNetError
from percepnet.report import count, machine, markdown
from percepnet.resample import Resampler
from percepnet.stream import enhance
from service import pcm
from service.engine import DEADLINE_SECONDS
from service.loadwire import Connection, WireError
from service.pb.percepnet_service.v1 import enhancement_pb2 as pb
from service.settings import Address

EXAMPLE = Path(__file__).parents[1] / "tests" / "data" / "noisy.wav"

WARM_UP_SECONDS = 1.0
"""Sent before anything is counted."""

PATIENCE_SECONDS = 2.0
"""How long after the last message its answer is waited for."""

MOST_STREAMS, MOST_SECONDS = 500, 900
"""This is a measurement, no weapon."""

BUNDLE_SECONDS = 0.005
"""How often a mixer sends what its speakers have said."""

_SERVICE = "/" + pb.DESCRIPTOR.services_by_name["EnhancementService"].full_name


class LoadError(PercepNetError):
    """The load could not be put on, or the server gave a stream up."""


@dataclass(frozen=True)
class Plan:
    """What is sent: `streams` speakers, messages of `message_ms` milliseconds, for `seconds`."""

    streams: int
    seconds: float
    message_ms: int
    connections: int
    """That the streams share."""
    multiplexed: bool = False
    """All streams over one RPC, as a mixer has them."""
    compared: bool = False
    """Whether a stream's output is compared with that of a file."""


@dataclass(frozen=True)
class Result:
    """What came of a plan."""

    plan: Plan
    latency: np.ndarray
    """Of each message in seconds; infinite if it was not answered, or could not even be sent."""
    lateness: np.ndarray
    """By which the sender itself missed a message's time, in seconds."""
    cores: float | None
    """CPU seconds of the server per second."""
    bytes_per_stream: float | None
    """By which the server's memory grew."""
    client_cores: float
    differences: int | None = None
    """Samples of the first stream that are not those of a file with all that was sent."""

    @property
    def misses(self) -> int:
        """Messages that were answered after the deadline, or never."""
        return int((self.latency > DEADLINE_SECONDS).sum())

    @property
    def passed(self) -> bool:
        """Whether every message was answered in time."""
        return self.misses == 0


class Process:
    """A process and its children, as Linux counts what they use."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def cpu_seconds(self) -> float:
        """User and system time so far."""
        ticks = 0
        for pid in self._family(self.pid):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def resident_bytes(self) -> int:
        """Memory held now."""
        pages = (int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self._family(self.pid))
        return sum(pages) * os.sysconf("SC_PAGE_SIZE")

    def _family(self, pid: int) -> Iterator[int]:
        yield pid
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in children.read_text().split():
                yield from self._family(int(child))


_Take = Callable[[pb.EnhanceStreamResponse, float], None]
"""What is done with an answer, and the time at which it was read."""


class _Rpc:
    """One stream over an RPC of its own."""

    def __init__(self, connection: Connection, take: _Take) -> None:
        def read(message: bytes, now: float) -> None:
            take(pb.EnhanceStreamResponse.FromString(message), now)

        self._stream = connection.open(_SERVICE + "/EnhanceStream", read)
        self.send = self._stream.send
        self.close = self._stream.close

    @property
    def ended(self) -> bool:
        """Whether the server ended it."""
        return self._stream.ended


class _Mixer:
    """Many streams over one RPC."""

    def __init__(self, connection: Connection) -> None:
        self._stream = connection.open(_SERVICE + "/EnhanceStreams", self._read)
        self._bundle: list[pb.SessionRequest] = []
        self._sessions: list[_Session] = []

    def open(self, take: _Take) -> "_Session":
        """A further stream."""
        self._sessions.append(_Session(self, len(self._sessions), take))
        return self._sessions[-1]

    def add(self, number: int, message: bytes) -> bool:
        """Let the next bundle bring a message of a stream."""
        request = pb.EnhanceStreamRequest.FromString(message)
        self._bundle.append(pb.SessionRequest(session_id=number, request=request))
        return True

    def send(self) -> bool:
        """Send the bundle; False if too much waits already."""
        bundle, self._bundle = self._bundle, []
        return not bundle or self._stream.send(pb.EnhanceStreamsRequest(sessions=bundle).SerializeToString())

    def _read(self, message: bytes, now: float) -> None:
        for part in pb.EnhanceStreamsResponse.FromString(message).sessions:
            session = self._sessions[part.session_id]
            if part.HasField("ended"):
                session.ended = True
            else:
                session.take(part.response, now)


class _Session:
    """A stream of a mixer."""

    def __init__(self, mixer: _Mixer, number: int, take: _Take) -> None:
        self.take = take
        self.ended = False
        self.send = partial(mixer.add, number)

    def close(self) -> None:
        """It ends with what was sent."""


class _Speaker:
    """One live stream: its messages, and when they were answered. open: begins it on the wire."""

    def __init__(
        self,
        open: Callable[[_Take], _Rpc | _Session],
        rate: int,
        messages: list[bytes],
        first: int,
    ) -> None:
        self.started: pb.StreamStarted | None = None
        self.answered: list[float] = []
        self.flushed = False
        self.said: list[bytes] | None = None  # the messages, if they are kept, and with them
        self.output: list[bytes] = []  # the audio that came back
        self._messages = messages
        self._next = first
        self.stream = open(self._take)
        config = pb.StreamConfig(
            sample_rate_hz=rate,
            encoding=pb.ENCODING_S16LE,
            message_samples=len(pb.EnhanceStreamRequest.FromString(messages[0]).audio) // 2,
        )
        self.stream.send(pb.EnhanceStreamRequest(config=config).SerializeToString())

    def heard(self) -> bool:
        """Whether the server took the stream, or refused it."""
        return self.started is not None or self.stream.ended

    def speak(self) -> bool:
        """Send the next message."""
        message = self._messages[self._next]
        self._next = (self._next + 1) % len(self._messages)
        sent = self.stream.send(message)
        if sent and self.said is not None:
            self.said.append(message)
        return sent

    def end(self) -> None:
        """Ask for the tail."""
        self.stream.send(pb.EnhanceStreamRequest(end=pb.End()).SerializeToString())
        self.stream.close()

    def _take(self, response: pb.EnhanceStreamResponse, now: float) -> None:
        if self.said is not None:
            self.output.append(response.audio.audio)
        if self.started is None:
            self.started = response.started
        elif response.audio.flushed:
            self.flushed = True
        else:
            self.answered.append(now)


def differences(speaker: _Speaker, rate: int) -> int:
    """Samples of a stream's whole output that are not those of a file with all that was sent."""
    assert speaker.started is not None
    assert speaker.said is not None
    sent = b"".join(pb.EnhanceStreamRequest.FromString(message).audio for message in speaker.said)
    expected = pcm.encode(enhance(pcm.decode(sent, pcm.S16LE), rate), pcm.S16LE)
    output = np.frombuffer(b"".join(speaker.output), pcm.S16LE)[speaker.started.delay_samples :]
    return int((output != expected).sum()) if len(output) == len(expected) else len(expected)


def speech(path: Path, rate: int) -> bytes:
    """A recording's first channel as 16-bit samples at a rate; raises AudioError, ParameterError."""
    with AudioReader(path) as reader:
        (samples,) = np.concatenate(list(reader.blocks(1 << 16)), axis=1)[:1]
        if reader.sample_rate != rate:
            samples = Resampler(reader.sample_rate, rate).push(samples)
    return pcm.encode(samples, pcm.S16LE).tobytes()


def messages_of(audio: bytes, rate: int, message_ms: int) -> list[bytes]:
    """Requests that carry a recording piece by piece."""
    size = 2 * rate * message_ms // 1000
    pieces = (audio[start : start + size] for start in range(0, len(audio) - size + 1, size))
    return [pb.EnhanceStreamRequest(audio=piece).SerializeToString() for piece in pieces]


def put_on(
    plan: Plan, address: tuple[str, int], messages: list[bytes], rate: int, server: Process | None
) -> Result:
    """Carry out a plan; raises LoadError, OSError."""
    n_connections = 1 if plan.multiplexed else min(plan.connections, plan.streams)
    connections = [Connection(*address) for _ in range(n_connections)]
    try:
        return _put_on(plan, connections, messages, rate, server)
    except WireError as error:
        raise LoadError(str(error)) from error
    finally:
        for connection in connections:
            connection.close()


def _put_on(
    plan: Plan, connections: list[Connection], messages: list[bytes], rate: int, server: Process | None
) -> Result:
    rng = np.random.default_rng(plan.streams)
    memory = server.resident_bytes() if server else 0
    poll = select.epoll()
    readers = {connection.socket.fileno(): connection.receive for connection in connections}
    for fd in readers:
        poll.register(fd, select.EPOLLIN)

    def read(timeout: float) -> None:
        # The clock of epoll itself counts in milliseconds.
        if timeout and not select.select([poll], [], [], timeout)[0]:
            return
        for fd, _ in poll.poll(0):
            readers[fd]()

    mixer = _Mixer(connections[0]) if plan.multiplexed else None
    flush = mixer.send if mixer else bool
    speakers = []
    for i in range(plan.streams):
        open = mixer.open if mixer else partial(_Rpc, connections[i % len(connections)])
        speaker = _Speaker(open, rate, messages, int(rng.integers(len(messages))))
        speakers.append(speaker)
        flush()
        _until(speaker.heard, read)
        if speaker.stream.ended:
            raise LoadError(f"the server takes no more than {i} streams")
    if plan.compared:
        speakers[0].said = []

    period = plan.message_ms / 1000
    n_warm = round(WARM_UP_SECONDS / period)
    n_messages = n_warm + round(plan.seconds / period)
    # Callers are at any phase to each other, and keep it.
    phases = np.sort(rng.uniform(0, period, plan.streams))
    if mixer:
        phases = np.ceil(phases / BUNDLE_SECONDS) * BUNDLE_SECONDS
    started = time.monotonic() + 0.05
    due = started + period * np.arange(n_messages)[:, np.newaxis] + phases
    sent = np.full(due.shape, np.inf)
    times = due.ravel().tolist()
    sent_times = sent.reshape(-1)
    cpu = own_cpu = 0.0
    first = n_warm * plan.streams
    for i, when in enumerate(times):
        if i == first:
            cpu, own_cpu, begun = (
                (server.cpu_seconds() if server else 0.0),
                time.process_time(),
                time.monotonic(),
            )
        while (wait := when - time.monotonic()) > 0:
            read(wait)
        if speakers[i % plan.streams].speak():
            sent_times[i] = time.monotonic()
        if times[i + 1 : i + 2] != [when]:
            flush()
        if not i % 8:
            read(0)
    lasted = time.monotonic() - begun
    cores = (server.cpu_seconds() - cpu) / lasted if server else None
    client_cores = (time.process_time() - own_cpu) / lasted
    grown = (server.resident_bytes() - memory) / plan.streams if server else None
    patience = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < patience and any(len(s.answered) < n_messages for s in speakers):
        read(0.01)
    answered = np.full(due.shape, np.inf)
    for column, speaker in enumerate(speakers):
        whole = np.isfinite(sent[:, column])
        # Answers come in the order of the messages that were sent.
        rows = np.flatnonzero(whole)[: len(speaker.answered)]
        answered[rows, column] = speaker.answered[: len(rows)]
        if speaker.stream.ended:
            raise LoadError(
                f"the server ended {sum(s.stream.ended for s in speakers)} of {plan.streams} streams"
            )
        speaker.end()
    flush()
    _until(lambda: all(speaker.flushed for speaker in speakers), read)
    lateness = (sent - due)[n_warm:]
    return Result(
        plan,
        (answered - due)[n_warm:].ravel(),
        lateness[np.isfinite(lateness)],
        cores,
        grown,
        client_cores,
        differences(speakers[0], rate) if plan.compared else None,
    )


def _until(condition: Callable[[], bool], read: Callable[[float], None]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        if time.monotonic() > deadline:
            raise LoadError("the server does not answer")
        read(0.01)


@contextmanager
def started_server(core: int, module: list[str]) -> Iterator[tuple[tuple[str, int], Process]]:
    """A server on one core, and on a free port of the loopback; this process keeps to the other cores."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = free.getsockname()
    command = [sys.executable, "-m", *module, "--grpc-listen", "{}:{}".format(*address)]
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        server = subprocess.Popen(command)
    finally:
        os.sched_setaffinity(0, allowed - {core} or allowed)
    try:
        with grpc.insecure_channel("{}:{}".format(*address)) as channel:
            grpc.channel_ready_future(channel).result(timeout=60)
        yield address, Process(server.pid)
    except grpc.FutureTimeoutError:
        raise LoadError("the server did not start") from None
    finally:
        server.terminate()
        server.wait(60)
        os.sched_setaffinity(0, allowed)


HEADER = ["streams", "CPU of each", "in all", "p50 ms", "p99 ms", "p99.9 ms", "longest", "misses", "kB each"]


def row(result: Result) -> list[str]:
    """A result as a row of the table."""
    latencies = 1000 * np.percentile(result.latency, [50, 99, 99.9, 100], method="higher")
    cores, streams = result.cores, result.plan.streams
    memory = result.bytes_per_stream
    return [
        str(streams),
        "–" if cores is None else f"{cores / streams:.2%}",
        "–" if cores is None else f"{cores:.0%}",
        *(f"{latency:.1f}" for latency in latencies),
        str(result.misses),
        "–" if memory is None else f"{memory / 1000:.0f}",
    ]


def sender(results: list[Result]) -> str:
    """How exact the sender was."""
    late = max(1000 * float(np.percentile(result.lateness, 99)) for result in results)
    busy = max(result.client_cores for result in results)
    return (
        f"The sender was up to {late:.1f} ms late (99 % of its messages) and took up to {busy:.0%} of a core."
    )


def comparison(result: Result) -> str:
    """How a stream's output compares with a file's."""
    equals = f"differs in {result.differences} samples from" if result.differences else "equals"
    return (
        f"With {result.plan.streams} streams, the whole output of the first one {equals} that of a file "
        "with the same speech."
    )


def idle_share(server: Process, seconds: float) -> float:
    """Share of a core that a server takes without a stream."""
    before = server.cpu_seconds()
    time.sleep(seconds)
    return (server.cpu_seconds() - before) / seconds


def search(measure: Callable[[int], Result], most: int) -> Iterator[Result]:
    """Measure until the highest number of streams that passes is known to one part in sixteen."""
    passes, fails = 0, most + 1
    streams = min(16, most)
    while fails - passes > max(1, passes // 16):
        result = measure(streams)
        yield result
        if result.passed:
            passes = streams
        else:
            fails = streams
        streams = min(2 * passes, most) if fails > most else (passes + fails) // 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe `percepnet load`."""
    parser.description = (
        "Send live streams to a server at the pace of speech; tell what they cost it and when answers came. "
        "Without --target it starts a server on a core of its own."
    )
    parser.add_argument(
        "--streams", type=count, nargs="+", default=(1, 8, 16, 32), metavar="K", help="streams at once"
    )
    parser.add_argument(
        "--find",
        action="store_true",
        help="search the most streams, up to the largest K, that are all answered within 10 ms",
    )
    parser.add_argument(
        "--seconds", type=count, default=10, metavar="S", help="length of each run (default: 10; at most 900)"
    )
    parser.add_argument(
        "--message-ms", type=count, default=10, metavar="MS", help="audio in a message (default: 10)"
    )
    parser.add_argument("--rate", type=count, default=48_000, metavar="HZ", help="default: 48000")
    parser.add_argument(
        "--connections",
        type=count,
        default=1000,
        metavar="N",
        help="connections that the streams share (default: one each)",
    )
    parser.add_argument(
        "--multiplexed",
        action="store_true",
        help="all streams over one RPC, which brings what was said every 5 ms, as a mixer does",
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="compare the whole output of one stream with what `percepnet enhance` makes of the same speech",
    )
    parser.add_argument("--audio", type=Path, default=EXAMPLE, metavar="FILE", help="the speech that is sent")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--target", metavar="HOST:PORT", help="a gRPC server that runs already")
    where.add_argument(
        "--echo",
        action="store_true",
        help="start a server that sends the audio back: what gRPC and this sender cost alone",
    )
    parser.add_argument("--pid", type=count, metavar="PID", help="its process, to measure its CPU time")
    parser.add_argument(
        "--core", type=int, default=0, metavar="N", help="core of the server that is started (default: 0)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; returns the exit status."""
    if arguments.seconds > MOST_SECONDS or max(arguments.streams) > MOST_STREAMS:
        raise ParameterError(f"accepted are up to {MOST_STREAMS} streams and {MOST_SECONDS} s")
    messages = messages_of(speech(arguments.audio, arguments.rate), arguments.rate, arguments.message_ms)
    with _server(arguments) as (address, server):
        print(f"{machine()}.\n", flush=True)
        if server is not None:
            print(f"Without streams: {idle_share(server, 3):.1%} of a core.\n", flush=True)

        def measure(streams: int) -> Result:
            plan = Plan(
                streams,
                arguments.seconds,
                arguments.message_ms,
                arguments.connections,
                arguments.multiplexed,
                arguments.compare,
            )
            return put_on(plan, address, messages, arguments.rate, server)

        if arguments.find:
            results = sorted(search(measure, max(arguments.streams)), key=lambda result: result.plan.streams)
        else:
            results = [measure(streams) for streams in arguments.streams]
    print(markdown(HEADER, [row(result) for result in results]))
    print(f"\n{sender(results)}")
    for result in results if arguments.compare else []:
        print(f"\n{comparison(result)}")
    return 0


@contextmanager
def _server(arguments: argparse.Namespace) -> Iterator[tuple[tuple[str, int], Process | None]]:
    """The server that is measured."""
    if arguments.target is None:
        most = str(max(arguments.streams) + 1)
        serve = ["percepnet.cli", "serve", "--workers", "1", "--http-listen", "127.0.0.1:0"]
        serve += ["--max-streams", most, "--log-level", "warning"]
        with started_server(arguments.core, ["service.echo"] if arguments.echo else serve) as started:
            yield started
        return
    try:
        address = Address.parse(arguments.target)
    except ValueError as error:
        raise ParameterError(f"--target: expected {error}") from error
    yield (address.host, address.port), Process(arguments.pid) if arguments.pid else None
