"""The Python clients, sync and asyncio, against real servers on real sockets.

Invariant: whatever happens to connections and servers, a stream's output has a sample for every sample sent,
in its place, or the stream ends in one error that says why.
"""

import asyncio
import gc
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import trustme
from running import Link, eventually, running

from percepnet.enhancer import Enhancer
from percepnet.stream import enhance
from percepnet.synthesis import Controls
from service import keys
from service.client import (
    AsyncClient,
    AsyncLiveStream,
    CallError,
    Client,
    EndedError,
    LiveStream,
    Mark,
    ParameterError,
    Tls,
    TurnError,
    aio,
    conversation,
    pods,
    sync,
)
from service.main import Server
from service.pb.percepnet_service.v1 import enhancement_pb2 as pb

RATE = 16_000
KEY = "0123456789abcdef0123456789abcdef"


@contextmanager
def serving(enhancer: Enhancer, **choices: Any) -> Iterator[str]:
    with running(enhancer, **choices) as server:
        yield address(server)


def address(server: Server) -> str:
    return f"127.0.0.1:{server.grpc.port}"


@pytest.fixture(scope="module")
def target(enhancer: Enhancer) -> Iterator[str]:
    """A server that anybody may use."""
    with serving(enhancer) as target:
        yield target


@pytest.fixture
def link(target: str) -> Iterator[Link]:
    """A way to that server that can be cut."""
    with Link(int(target.rpartition(":")[2])) as link:
        yield link


def noise(n_samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(n_samples)).astype(np.float32)


def chunks(samples: np.ndarray, size: int = 160) -> Iterator[np.ndarray]:
    return (samples[start : start + size] for start in range(0, len(samples), size))


each_way = pytest.mark.parametrize("multiplex", [False, True])


@each_way
def test_a_pipe_gives_the_offline_result(target: str, enhancer: Enhancer, multiplex: bool) -> None:
    samples = noise(40_000)
    with Client(target, multiplex=multiplex) as client:
        stream = client.stream(RATE, compensate_delay=True)
        output = np.concatenate(list(stream.pipe(chunks(samples, 777))))
    np.testing.assert_array_equal(output, enhance(samples, RATE, enhancer=enhancer))


@each_way
def test_an_asyncio_pipe_gives_the_offline_result(target: str, enhancer: Enhancer, multiplex: bool) -> None:
    samples = noise(40_000)

    async def main() -> list[np.ndarray]:
        async with AsyncClient(target, multiplex=multiplex) as client:
            stream = await client.stream(RATE, compensate_delay=True)
            return [output async for output in stream.pipe(chunks(samples, 777))]

    output = np.concatenate(asyncio.run(main()))
    np.testing.assert_array_equal(output, enhance(samples, RATE, enhancer=enhancer))


@each_way
def test_asyncio_streams_speak_at_once(target: str, enhancer: Enhancer, multiplex: bool) -> None:
    """Lockstep, with parameters, passages and a report, many on one connection."""

    async def speak(client: AsyncClient, seed: int) -> list[np.ndarray]:
        samples = noise(2_000, seed)
        async with client.stream(RATE, compensate_delay=True, report=True) as stream:
            passages = [np.concatenate([await stream.push(samples), await stream.flush()])]
            assert stream.last is not None
            assert 0 < stream.last.report.mean_gain <= 1
            assert await stream.update(Controls(mix=0)) == 0
            return [*passages, np.concatenate([await stream.push(samples), await stream.end()])]

    async def main() -> list[list[np.ndarray]]:
        async with AsyncClient(target, multiplex=multiplex) as client:
            results = await asyncio.gather(*(speak(client, seed) for seed in range(3)))
            assert (await client.status()).model_name == "random"
            clip = noise(1_000)
            np.testing.assert_array_equal(
                await client.enhance(clip, RATE), enhance(clip, RATE, enhancer=enhancer)
            )
            return results

    for seed, passages in enumerate(asyncio.run(main())):
        for passage, controls in zip(passages, (Controls(), Controls(mix=0)), strict=True):
            expected = enhance(noise(2_000, seed), RATE, controls=controls, enhancer=enhancer)
            np.testing.assert_array_equal(passage, expected)


def test_a_long_push_goes_in_pieces(target: str, enhancer: Enhancer) -> None:
    samples = noise(35_200)
    with Client(target) as client, client.stream(RATE, message_samples=160) as stream:
        output = np.concatenate([stream.push(samples), stream.end()])
        with pytest.raises(EndedError):
            stream.push(samples)
    expected = enhance(samples, RATE, enhancer=enhancer)
    np.testing.assert_array_equal(output[stream.delay_samples :], expected)


@each_way
def test_long_items_go_in_pieces(target: str, enhancer: Enhancer, multiplex: bool) -> None:
    """One that fits in a message, and one of several seconds."""
    items = [noise(RATE), noise(3 * RATE + 160, seed=1)]
    expected = enhance(np.concatenate(items), RATE, enhancer=enhancer)

    async def main() -> list[np.ndarray]:
        async with AsyncClient(target, multiplex=multiplex) as client:
            stream = await client.stream(RATE, compensate_delay=True)
            return [output async for output in stream.pipe(items)]

    with Client(target, multiplex=multiplex) as client:
        outputs = list(client.stream(RATE, compensate_delay=True).pipe(items))
    for answers in (outputs, asyncio.run(main())):
        assert len(answers) == 6
        np.testing.assert_array_equal(np.concatenate(answers), expected)


@pytest.mark.parametrize(
    "bad", [np.zeros((2, 80), np.float32), np.zeros((160, 2), np.float32), np.zeros(160, np.int16)]
)
def test_what_cannot_be_sent_is_told_at_once(target: str, bad: np.ndarray) -> None:
    with Client(target) as client, client.stream(RATE) as stream:
        with pytest.raises(ParameterError, match="takes"):
            stream.push(bad)
        with pytest.raises(ParameterError, match="takes"):
            list(stream.pipe([bad]))
        with pytest.raises(ParameterError, match="takes"):
            client.enhance(bad, RATE)


def test_a_message_of_another_length_than_promised_is_told_at_once(target: str) -> None:
    with Client(target) as client, client.stream(RATE, message_samples=160) as stream:
        with pytest.raises(ParameterError, match="takes multiples of 160"):
            stream.push(np.zeros(159, np.float32))
        with pytest.raises(ParameterError, match="takes multiples of 160"):
            list(stream.pipe([np.zeros(159, np.float32)]))


def test_nothing_is_sent_of_a_push_that_is_refused(target: str) -> None:
    """Its first second would fit in a message."""

    async def main() -> None:
        async with AsyncClient(target) as client, client.stream(RATE, message_samples=160) as stream:
            with pytest.raises(ParameterError, match="33000 samples; this stream takes multiples of 160"):
                await stream.push(noise(33_000))
            assert await stream.update(Controls()) == 0

    with Client(target) as client, client.stream(RATE, message_samples=160) as stream:
        with pytest.raises(ParameterError, match="33000 samples; this stream takes multiples of 160"):
            stream.push(noise(33_000))
        assert stream.update(Controls()) == 0
    asyncio.run(main())


@each_way
def test_a_server_that_refuses_is_not_asked_again(
    target: str, monkeypatch: pytest.MonkeyPatch, multiplex: bool
) -> None:
    monkeypatch.setattr(conversation, "MAX_RATE_HZ", 96_000)
    with Client(target, multiplex=multiplex) as client, pytest.raises(grpc.RpcError) as refused:
        client.stream(96_000)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@each_way
def test_errors_of_calls_are_of_one_kind_and_one_line(
    enhancer: Enhancer, monkeypatch: pytest.MonkeyPatch, multiplex: bool
) -> None:
    """Refused, no room for longer than the patience, and lost for good."""
    monkeypatch.setattr(conversation, "MAX_RATE_HZ", 96_000)
    choices: Any = {"multiplex": multiplex, "patience_seconds": 0}
    told: list[str] = []

    def fail(client: Client, rate: int) -> None:
        with pytest.raises(CallError) as raised:
            client.stream(rate)
        told.append(str(raised.value))

    async def fail_async(client: AsyncClient, rate: int) -> None:
        with pytest.raises(CallError) as raised:
            await client.stream(rate)
        told.append(str(raised.value))

    async def main(target: str, server: ExitStack) -> None:
        async with AsyncClient(target, **choices) as client, client.stream(RATE):
            await fail_async(client, 96_000)
            await fail_async(client, RATE)
            await asyncio.to_thread(server.close)
            await fail_async(client, RATE)

    with ExitStack() as server:
        target = server.enter_context(serving(enhancer, max_streams=1, shutdown_grace_seconds=0.1))
        with Client(target, **choices) as client, client.stream(RATE):
            fail(client, 96_000)
            fail(client, RATE)
            server.close()
            fail(client, RATE)
    with ExitStack() as server:
        target = server.enter_context(serving(enhancer, max_streams=1, shutdown_grace_seconds=0.1))
        asyncio.run(main(target, server))
    ends = [
        "config.sample_rate_hz: 96000; accepted are 8000 to 48000 (INVALID_ARGUMENT)",
        "all 1 live streams of this server are taken (RESOURCE_EXHAUSTED)",
        "(UNAVAILABLE)",
    ]
    for line, end in zip(told, ends * 2, strict=True):
        assert line.endswith(end)
        assert "\n" not in line


@pytest.mark.parametrize("value", [-1, 2**40, "16000", 16_000.5, None])
def test_numbers_that_no_server_takes_are_told_before_one_is_asked(value: Any) -> None:
    for kind in (Client, AsyncClient):
        client = kind("127.0.0.9:9")
        with pytest.raises(ParameterError, match=f"sample_rate: {value!r}; accepted are .* 8000 to 48000"):
            client.stream(value)
        with pytest.raises(ParameterError, match=f"samples: {value!r}; accepted are .* 0 to 16000"):
            client.stream(RATE, message_samples=value)
    with Client("127.0.0.9:9") as client, pytest.raises(ParameterError, match="8000 to 48000"):
        client.enhance(noise(160), value)


def test_a_target_of_another_form_is_told() -> None:
    with pytest.raises(ParameterError, match="'nowhere'; accepted is HOST:PORT"):
        Client("nowhere")


def test_realtime_sends_no_sample_before_it_was_spoken(target: str) -> None:
    with Client(target) as client:
        started = time.monotonic()
        samples = noise(RATE // 4)
        outputs = list(client.stream(RATE).pipe(chunks(samples), realtime=True))
        assert time.monotonic() - started >= 0.25
    assert sum(map(len, outputs[:-1])) == len(samples)


def test_sending_waits_while_nobody_receives(target: str) -> None:
    with Client(target) as client, client.stream(RATE) as stream:
        sent = []

        def speak() -> None:
            for chunk in chunks(noise(4 * RATE), 1_600):
                stream.send(chunk)
                sent.append(chunk)
            stream.send(Mark.END)

        speaker = threading.Thread(target=speak)
        speaker.start()
        eventually(lambda: len(sent) == 11, "a full window")
        received = [stream.receive() for _ in range(40)]
        tail = stream.receive()
        assert tail is not None
        assert len(tail.samples) == stream.delay_samples
        assert stream.receive() is None
        speaker.join()
    assert [len(answer.samples) for answer in received if answer] == [1_600] * 40


def test_leaving_a_stream_frees_a_sender_that_waits(target: str) -> None:
    failures: list[Exception] = []

    def speak(stream: LiveStream) -> None:
        try:
            while True:
                stream.send(noise(1_600))
        except Exception as error:
            failures.append(error)

    with Client(target) as client:
        with client.stream(RATE) as stream:
            speaker = threading.Thread(target=speak, args=[stream])
            speaker.start()
            time.sleep(0.05)
        speaker.join()
    assert isinstance(failures[0], EndedError)


@each_way
def test_pushes_at_once_take_turns(target: str, multiplex: bool) -> None:
    """All dry each gets its own samples back, and long ones whole."""
    sizes = [100, 60_000, 480, 100_000, 7]
    voices = [noise(size, seed) for seed, size in enumerate(sizes)]
    dry = Controls(mix=0)

    async def main() -> list[np.ndarray]:
        async with (
            AsyncClient(target, multiplex=multiplex) as client,
            client.stream(48_000, controls=dry) as stream,
        ):
            heard = [*await asyncio.gather(*(stream.push(voice) for voice in voices)), await stream.end()]
            return [np.concatenate(heard)[stream.delay_samples :], *heard]

    with Client(target, multiplex=multiplex) as client, client.stream(48_000, controls=dry) as stream:
        with ThreadPoolExecutor() as threads:
            heard = [*threads.map(stream.push, voices), stream.end()]
        assert [len(samples) for samples in heard] == [*sizes, stream.delay_samples]
    said, *heard = asyncio.run(asyncio.wait_for(main(), 60))
    assert [len(samples) for samples in heard[:-1]] == sizes
    np.testing.assert_allclose(said, np.concatenate(voices), atol=1e-5)


@each_way
def test_answers_that_another_call_waits_for_are_not_taken_from_it(target: str, multiplex: bool) -> None:
    """Parameters can be sent meanwhile."""

    async def main() -> None:
        async with AsyncClient(target, multiplex=multiplex) as client, client.stream(RATE) as stream:
            waiting = asyncio.create_task(stream.receive())
            await asyncio.sleep(0)
            for call in (stream.receive(), stream.push(noise(160)), anext(stream.pipe([]))):
                with pytest.raises(TurnError, match="another call waits for the answers"):
                    await call
            await stream.send(Controls())
            answer = await waiting
            assert answer is not None
            assert answer.position == 0
            assert len(await stream.push(noise(160))) == 160

    asyncio.run(asyncio.wait_for(main(), 60))
    with Client(target, multiplex=multiplex) as client:
        stream = client.stream(RATE)
        items = iter([noise(160), Controls()])
        outputs = []
        for output in stream.pipe(items):
            outputs.append(len(output))
            for call in (stream.receive, stream.end, lambda: list(stream.pipe([]))):
                with pytest.raises(TurnError, match="another call waits for the answers"):
                    call()
        assert outputs == [160, 0, stream.delay_samples]


@each_way
def test_answers_to_what_was_sent_are_not_taken_from_who_receives_them(target: str, multiplex: bool) -> None:
    async def main() -> None:
        async with AsyncClient(target, multiplex=multiplex) as client, client.stream(RATE) as stream:
            await stream.send(noise(160))
            with suppress(TimeoutError):  # the answer may be there, and is not taken
                await asyncio.wait_for(stream.receive(), 0)
            await asyncio.sleep(0.1)
            for call in (stream.push(noise(320)), stream.update(Controls()), stream.end()):
                with pytest.raises(TurnError, match="answers that are still to be received"):
                    await call
            answer = await stream.receive()
            assert answer is not None
            assert len(answer.samples) == 160
            assert len(await stream.push(noise(320))) == 320

    asyncio.run(asyncio.wait_for(main(), 60))
    with Client(target, multiplex=multiplex) as client, client.stream(RATE) as stream:
        stream.send(noise(160))
        for call in (lambda: stream.push(noise(320)), lambda: stream.update(Controls()), stream.end):
            with pytest.raises(TurnError, match="answers that are still to be received"):
                call()
        answer = stream.receive()
        assert answer is not None
        assert len(answer.samples) == 160
        assert len(stream.push(noise(320))) == 320


@each_way
def test_what_is_sent_during_a_long_push_waits_until_it_is_answered(target: str, multiplex: bool) -> None:
    samples = noise(20 * RATE)

    async def main() -> None:
        async with AsyncClient(target, multiplex=multiplex) as client, client.stream(RATE) as stream:
            pushing = asyncio.create_task(stream.push(samples))
            while not stream._talk.n_answers:
                await asyncio.sleep(0.001)
            await stream.send(Controls())
            assert len(await pushing) == len(samples)
            answer = await stream.receive()
            assert answer is not None
            assert 0 <= len(samples) - answer.position <= stream.delay_samples
            assert len(await stream.push(noise(160))) == 160

    asyncio.run(asyncio.wait_for(main(), 60))
    with (
        ThreadPoolExecutor() as threads,
        Client(target, multiplex=multiplex) as client,
        client.stream(RATE) as stream,
    ):
        pushing = threads.submit(stream.push, samples)
        eventually(lambda: stream._talk.n_answers > 0, "the first answer")
        stream.send(Controls())
        assert len(pushing.result(60)) == len(samples)
        answer = stream.receive()
        assert answer is not None
        assert 0 <= len(samples) - answer.position <= stream.delay_samples
        assert len(stream.push(noise(160))) == 160


@each_way
def test_a_cancelled_push_drops_no_answer_to_what_was_sent(target: str, multiplex: bool) -> None:
    async def main() -> None:
        async with AsyncClient(target, multiplex=multiplex) as client, client.stream(RATE) as stream:
            pushing = asyncio.create_task(stream.push(noise(RATE)))
            while not stream._talk.n_asked:
                await asyncio.sleep(0)
            sending = asyncio.create_task(stream.send(noise(320)))
            await asyncio.sleep(0)
            pushing.cancel()
            await sending
            answer = await stream.receive()
            assert answer is not None
            assert len(answer.samples) == 320

    asyncio.run(asyncio.wait_for(main(), 60))


@each_way
def test_pushes_that_are_cancelled_again_and_again_leave_no_answer_unread(
    target: str, multiplex: bool
) -> None:
    """Together they hold more than may be unanswered."""

    async def main() -> None:
        async with AsyncClient(target, multiplex=multiplex) as client, client.stream(RATE) as stream:
            for _ in range(4):
                n_asked = stream._talk.n_asked
                pushing = asyncio.create_task(stream.push(noise(RATE)))
                while stream._talk.n_asked == n_asked:
                    await asyncio.sleep(0)
                pushing.cancel()
            assert len(await stream.push(noise(160))) == 160

    asyncio.run(asyncio.wait_for(main(), 60))


@each_way
def test_long_items_that_are_sent_at_once_stay_whole(target: str, multiplex: bool) -> None:
    """All dry the output is the delayed input: one voice is positive, the other negative."""
    voice = np.full(5 * RATE, 0.1, np.float32)
    dry = Controls(mix=0)

    def check(answers: list[np.ndarray]) -> None:
        assert sum(map(len, answers)) == 10 * RATE
        signs = np.sign(np.concatenate(answers)[RATE // 10 :])
        assert np.count_nonzero(np.diff(signs)) == 1

    async def main() -> None:
        async with (
            AsyncClient(target, multiplex=multiplex) as client,
            client.stream(RATE, controls=dry) as stream,
        ):
            speakers = [asyncio.create_task(stream.send(said)) for said in (voice, -voice)]
            answers = [await stream.receive() for _ in range(10)]
            await asyncio.gather(*speakers)
            check([answer.samples for answer in answers if answer])

    asyncio.run(asyncio.wait_for(main(), 60))
    with (
        ThreadPoolExecutor() as threads,
        Client(target, multiplex=multiplex) as client,
        client.stream(RATE, controls=dry) as stream,
    ):
        speaking = threads.map(stream.send, (voice, -voice))
        received = [stream.receive() for _ in range(10)]
        list(speaking)
        check([answer.samples for answer in received if answer])


@each_way
def test_who_reads_a_pipe_may_send_parameters_while_a_window_of_audio_waits(
    target: str, multiplex: bool
) -> None:
    items = [noise(5 * RATE), noise(5 * RATE, seed=1)]

    async def main() -> None:
        async with AsyncClient(target, multiplex=multiplex) as client:
            stream, sizes = await client.stream(RATE), []
            async for output in stream.pipe(items):
                sizes.append(len(output))
                if sizes.count(RATE) < 5 and len(output):
                    await stream.send(Controls())
                    with pytest.raises(TurnError, match="another call waits for the answers"):
                        await stream.push(noise(160))
            assert (sizes.count(RATE), sizes.count(0)) == (10, 4)

    asyncio.run(asyncio.wait_for(main(), 60))
    with Client(target, multiplex=multiplex) as client:
        stream, sizes = client.stream(RATE), []
        for output in stream.pipe(items):
            sizes.append(len(output))
            if sizes.count(RATE) < 5 and len(output):
                stream.send(Controls())
                with pytest.raises(TurnError, match="another call waits for the answers"):
                    stream.push(noise(160))
        assert (sizes.count(RATE), sizes.count(0)) == (10, 4)


@each_way
def test_a_cancelled_asyncio_task_gives_its_place_back(target: str, multiplex: bool) -> None:
    async def main() -> None:
        async with AsyncClient(target, multiplex=multiplex) as client:

            async def speak() -> None:
                async with client.stream(RATE) as stream:
                    while True:
                        await stream.push(noise(160))

            speaker = asyncio.create_task(speak())
            while not (await client.status()).active_streams:
                await asyncio.sleep(0.01)
            speaker.cancel()
            with pytest.raises(asyncio.CancelledError):
                await speaker
            while (await client.status()).active_streams:
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(main(), 60))


@each_way
def test_a_broken_connection_leaves_no_trace(link: Link, enhancer: Enhancer, multiplex: bool) -> None:
    """Cut between messages, with parameters changed and a passage ended on the way."""
    samples = noise(7_200)
    with (
        Client(link.target, multiplex=multiplex) as client,
        client.stream(RATE, compensate_delay=True) as stream,
    ):
        passages = []
        for controls in (Controls(), Controls(mix=0.5)):
            stream.update(controls)
            outputs = []
            for i, chunk in enumerate(chunks(samples, 480)):
                if i % 9 == 5:
                    link.cut()
                outputs.append(stream.push(chunk))
            link.cut()
            outputs.append(stream.flush())
            passages.append(np.concatenate(outputs))
        assert stream.reconnections == 6
        assert len(stream.end()) == 0
    np.testing.assert_array_equal(passages[0], enhance(samples, RATE, enhancer=enhancer))
    # Parameters of a passage that has begun ramp; here they are those of its beginning.
    expected = enhance(samples, RATE, controls=Controls(mix=0.5), enhancer=enhancer)
    np.testing.assert_array_equal(passages[1], expected)


@each_way
def test_an_asyncio_pipe_survives_a_broken_connection(
    link: Link, enhancer: Enhancer, multiplex: bool
) -> None:
    samples = noise(7_200)

    async def main() -> np.ndarray:
        async with AsyncClient(link.target, multiplex=multiplex) as client:
            stream = await client.stream(RATE, compensate_delay=True)
            outputs = []
            async for output in stream.pipe(chunks(samples), realtime=True):
                outputs.append(output)
                if len(outputs) in (10, 30):
                    link.cut()
            assert stream.reconnections == 2
            return np.concatenate(outputs)

    np.testing.assert_array_equal(asyncio.run(main()), enhance(samples, RATE, enhancer=enhancer))


@each_way
def test_an_answer_that_was_not_waited_for_comes_with_the_next_call(
    link: Link, enhancer: Enhancer, multiplex: bool
) -> None:
    """Each wait is cancelled again and again, while a connection is taken up anew and at the end too."""
    samples = noise(7_200)

    async def patiently(stream: AsyncLiveStream) -> np.ndarray:
        while True:
            with suppress(TimeoutError):
                answer = await asyncio.wait_for(stream.receive(), 0.0001)
                assert answer is not None
                return answer.samples

    async def main() -> np.ndarray:
        async with (
            AsyncClient(link.target, multiplex=multiplex) as client,
            client.stream(RATE, compensate_delay=True) as stream,
        ):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(stream.receive(), 0.01)
            outputs = []
            for i, item in enumerate([*chunks(samples, 480), Mark.END]):
                if i == 5:
                    link.cut()
                await stream.send(item)
                outputs.append(await patiently(stream))
            assert await stream.receive() is None
            assert stream.reconnections == 1
            return np.concatenate(outputs)

    output = asyncio.run(asyncio.wait_for(main(), 60))
    np.testing.assert_array_equal(output, enhance(samples, RATE, enhancer=enhancer))


@each_way
def test_a_push_after_a_cancelled_one_gets_its_own_answer(target: str, multiplex: bool) -> None:
    """All dry the output is the delayed input. Cancelled while it sends, while it waits, when all is done."""
    samples = noise(43_200)

    async def main() -> None:
        async with (
            AsyncClient(target, multiplex=multiplex) as client,
            client.stream(48_000, controls=Controls(mix=0)) as stream,
        ):
            delayed = np.concatenate([np.zeros(stream.delay_samples), samples])
            for i, chunk in enumerate(chunks(samples, 1_440)):
                pushing = asyncio.create_task(stream.push(chunk))
                if i % 3 == 2:
                    output = await pushing
                    np.testing.assert_allclose(output, delayed[1_440 * i :][:1_440], atol=1e-5)
                    continue
                for _ in range(1 + i):
                    await asyncio.sleep(0)
                pushing.cancel()
                with suppress(asyncio.CancelledError):
                    await pushing

    asyncio.run(asyncio.wait_for(main(), 60))


@each_way
def test_a_stream_that_fails_while_nobody_receives_does_so_without_noise(
    target: str, caplog: pytest.LogCaptureFixture, multiplex: bool
) -> None:
    async def main() -> None:
        async with AsyncClient(target, multiplex=multiplex) as client:
            for seconds in (1, None):  # over by then, or still waited for
                async with client.stream(RATE, timeout_seconds=seconds) as stream:
                    with pytest.raises(TimeoutError):
                        await asyncio.wait_for(stream.receive(), 0.01)
                    await asyncio.sleep(1)

    asyncio.run(asyncio.wait_for(main(), 60))
    gc.collect()
    assert [record.message for record in caplog.records if record.name == "asyncio"] == []


@each_way
def test_a_client_that_is_closed_ends_its_streams(target: str, multiplex: bool) -> None:
    with ThreadPoolExecutor() as threads:
        client = Client(target, multiplex=multiplex)
        streams = [client.stream(RATE) for _ in range(2)]
        assert active(target) == [2]
        waiting = threads.submit(streams[0].receive)
        client.close()
        for call in (
            waiting.result,
            lambda: streams[0].push(noise(160)),
            lambda: streams[1].push(noise(160)),
            lambda: client.stream(RATE),
            client.status,
        ):
            with pytest.raises(EndedError, match="the client was closed"):
                call()
    eventually(lambda: active(target) == [0], "an idle server")


@each_way
def test_an_asyncio_client_that_is_closed_ends_its_streams(target: str, multiplex: bool) -> None:
    async def main() -> None:
        client = AsyncClient(target, multiplex=multiplex)
        streams = [await client.stream(RATE) for _ in range(2)]
        assert await asyncio.to_thread(active, target) == [2]
        under_way = [asyncio.create_task(call) for call in (streams[0].receive(), client.status())]
        await asyncio.sleep(0)
        await client.close()
        later = (
            lambda: streams[0].push(noise(160)),
            lambda: streams[1].push(noise(160)),
            lambda: client.stream(RATE),
            client.status,
        )
        for call in (*under_way, *(call() for call in later)):
            with pytest.raises(EndedError, match="the client was closed"):
                await call

    asyncio.run(asyncio.wait_for(main(), 60))
    eventually(lambda: active(target) == [0], "an idle server")


@each_way
def test_a_client_that_is_closed_frees_a_sender_that_waits(target: str, multiplex: bool) -> None:
    def speak(stream: LiveStream) -> None:
        while True:
            stream.send(noise(1_600))

    client = Client(target, multiplex=multiplex)
    with ThreadPoolExecutor() as threads, client.stream(RATE) as stream:
        speaker = threads.submit(speak, stream)
        eventually(lambda: stream._talk.unanswered_samples > RATE, "a full window")
        client.close()
        with pytest.raises(EndedError, match="the client was closed"):
            speaker.result(30)


@each_way
def test_an_asyncio_client_that_is_closed_frees_a_sender_that_waits(target: str, multiplex: bool) -> None:
    async def speak(stream: AsyncLiveStream) -> None:
        while True:
            await stream.send(noise(1_600))

    async def main() -> None:
        client = AsyncClient(target, multiplex=multiplex)
        stream = await client.stream(RATE)
        speaker = asyncio.create_task(speak(stream))
        while stream._talk.unanswered_samples <= RATE:
            await asyncio.sleep(0.01)
        await client.close()
        with pytest.raises(EndedError, match="the client was closed"):
            await speaker

    asyncio.run(asyncio.wait_for(main(), 60))


@each_way
def test_a_client_that_is_closed_ends_what_is_being_opened(
    caplog: pytest.LogCaptureFixture, multiplex: bool
) -> None:
    """The server takes the connection and says nothing. No task stays behind."""

    async def close_while_opening() -> None:
        client = AsyncClient(target, multiplex=multiplex)
        opening = asyncio.ensure_future(client.stream(RATE).__aenter__())
        connected = await asyncio.to_thread(mute.accept)
        await client.close()
        with pytest.raises(EndedError, match="the client was closed"):
            await opening
        connected[0].close()

    async def main() -> None:
        await close_while_opening()
        await asyncio.sleep(0.1)
        gc.collect()
        assert [record.message for record in caplog.records if record.name == "asyncio"] == []

    with socket.create_server(("127.0.0.1", 0)) as mute:
        target = f"127.0.0.1:{mute.getsockname()[1]}"
        asyncio.run(asyncio.wait_for(main(), 60))


def test_positions_go_on_after_a_break_in_a_long_passage(link: Link) -> None:
    """All dry the output is the input, whatever the model's memory: every sample must be in its place."""
    samples = noise(4 * 48_000, seed=1)
    with Client(link.target) as client, client.stream(48_000, controls=Controls(mix=0)) as stream:
        outputs = []
        for i, chunk in enumerate(chunks(samples, 4_800)):
            if i == 30:
                link.cut()
            outputs.append(stream.push(chunk))
            assert stream.last is not None
            assert stream.last.position == 4_800 * i - stream.delay_samples
        outputs.append(stream.end())
        assert stream.reconnections == 1
    output = np.concatenate(outputs)
    np.testing.assert_allclose(output[stream.delay_samples :], samples, atol=1e-5)


def test_a_lost_server_is_told_when_patience_is_over(enhancer: Enhancer) -> None:
    with serving(enhancer, shutdown_grace_seconds=0.1) as target:
        client = Client(target, patience_seconds=0.3)
        stream = client.stream(RATE)
        stream.push(noise(160))
    with client:
        for call in (lambda: stream.push(noise(160)), client.status):
            with pytest.raises(grpc.RpcError) as lost:
                call()
            assert lost.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED])
def test_a_server_that_breaks_every_stream_is_told_when_patience_is_over(code: grpc.StatusCode) -> None:
    """It takes the stream up again and again, and never answers."""

    def begin_and_break(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        next(requests)
        yield pb.EnhanceStreamResponse(started=pb.StreamStarted(delay_samples=480))
        context.abort(code, "the connection broke")

    handler = grpc.stream_stream_rpc_method_handler(
        begin_and_break, pb.EnhanceStreamRequest.FromString, pb.EnhanceStreamResponse.SerializeToString
    )
    service = grpc.method_handlers_generic_handler(
        "percepnet_service.v1.EnhancementService", {"EnhanceStream": handler}
    )
    with ThreadPoolExecutor() as threads:
        server = grpc.server(threads, [service])
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        with Client(f"127.0.0.1:{port}", patience_seconds=0.3) as client, client.stream(RATE) as stream:
            with pytest.raises(grpc.RpcError, match="the connection broke"):
                stream.push(noise(160))
            assert stream.reconnections > 1
        server.stop(None).wait()


@each_way
def test_a_full_server_is_asked_again_when_it_said(enhancer: Enhancer, multiplex: bool) -> None:
    with serving(enhancer, max_streams=1) as target, Client(target, multiplex=multiplex) as client:
        first = client.stream(RATE)
        threading.Timer(0.1, first.close).start()
        started = time.monotonic()
        with client.stream(RATE) as second:
            assert len(second.push(noise(160))) == 160
        assert time.monotonic() - started >= 1  # the server's hint


class Names:
    """A resolver whose answer can be changed."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = list(addresses)
        self.asked: set[tuple[str, int]] = set()

    def __call__(self, host: str, port: int) -> list[str]:
        self.asked.add((host, port))
        return self.addresses


def test_streams_spread_evenly_avoid_full_pods_and_find_new_ones(
    enhancer: Enhancer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pods, "LOOK_UP_SECONDS", 0)
    with (
        serving(enhancer, max_streams=2) as one,
        serving(enhancer, max_streams=4) as two,
        serving(enhancer, max_streams=4) as three,
    ):
        names = Names(one, two)
        with Client("calls:50051", resolver=names, patience_seconds=0) as client:
            streams = [client.stream(RATE) for _ in range(4)]
            assert active(one, two, three) == [2, 2, 0]
            streams += [client.stream(RATE) for _ in range(2)]
            assert active(one, two, three) == [2, 4, 0]
            with pytest.raises(grpc.RpcError) as full:
                client.stream(RATE)
            assert full.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            names.addresses.append(three)
            streams += [client.stream(RATE) for _ in range(2)]
            assert active(one, two, three) == [2, 4, 2]
            names.addresses.remove(two)
            streams[0].close()
            streams += [client.stream(RATE)]
            for stream in streams[1:]:
                assert len(stream.push(noise(160))) == 160
                stream.end()
        assert names.asked == {("calls", 50051)}


def active(*targets: str) -> list[int]:
    """How many streams each server has."""
    counts = []
    for target in targets:
        with Client(target) as client:
            counts.append(client.status().active_streams)
    return counts


def test_dead_pods_cost_their_streams_nothing(enhancer: Enhancer, target: str) -> None:
    """An address where nobody listens, and one whose server goes away."""
    samples = noise(8_000)
    with serving(enhancer, shutdown_grace_seconds=0.1) as dying:
        names = Names(dying, "127.0.0.9:9")
        client = Client("calls:50051", resolver=names)
        streams = [client.stream(RATE, compensate_delay=True) for _ in range(3)]
        assert active(dying) == [3]
        heads = [stream.push(samples[:4_000]) for stream in streams]
        names.addresses = [target, "127.0.0.9:9"]
    with client:
        for stream, head in zip(streams, heads, strict=True):
            output = np.concatenate([head, stream.push(samples[4_000:]), stream.end()])
            assert stream.reconnections == 1
            np.testing.assert_array_equal(output, enhance(samples, RATE, enhancer=enhancer))


@each_way
def test_a_server_that_hangs_is_left(
    link: Link, target: str, enhancer: Enhancer, monkeypatch: pytest.MonkeyPatch, multiplex: bool
) -> None:
    """Pings tell: gRPC alone would wait for a minute."""
    monkeypatch.setattr(pods, "PING_SECONDS", 1)
    monkeypatch.setattr(pods, "PONG_SECONDS", 1)
    monkeypatch.setattr(pods, "LOOK_UP_SECONDS", 0)
    samples, names = noise(8_000), Names(link.target)
    with Client("calls:50051", resolver=names, multiplex=multiplex) as client:
        stream = client.stream(RATE, compensate_delay=True)
        outputs = [stream.push(samples[:4_000])]
        names.addresses = [target]
        link.hold()
        held = time.monotonic()
        outputs += [stream.push(samples[4_000:]), stream.end()]
        assert time.monotonic() - held < 30
        assert stream.reconnections == 1
    np.testing.assert_array_equal(np.concatenate(outputs), enhance(samples, RATE, enhancer=enhancer))


@each_way
def test_streams_leave_a_server_that_is_about_to_stop(
    enhancer: Enhancer, target: str, monkeypatch: pytest.MonkeyPatch, multiplex: bool
) -> None:
    monkeypatch.setattr(pods, "LOOK_UP_SECONDS", 0)
    samples = noise(4_800)
    with running(enhancer, shutdown_grace_seconds=30) as stopping:
        names = Names(address(stopping))
        with Client("calls:50051", resolver=names, multiplex=multiplex) as client:
            stream = client.stream(RATE, compensate_delay=True)
            outputs = [stream.push(samples[:1_600])]
            names.addresses = [target]
            stopping.should_exit = True
            eventually(lambda: stopping.health.stopping, "the end")
            outputs += [stream.push(chunk) for chunk in chunks(samples[1_600:])]
            assert stream.reconnections == 1
            outputs.append(stream.end())
    np.testing.assert_array_equal(np.concatenate(outputs), enhance(samples, RATE, enhancer=enhancer))


@each_way
def test_streams_stay_with_a_server_that_is_about_to_stop_while_the_other_says_nothing(
    enhancer: Enhancer, monkeypatch: pytest.MonkeyPatch, multiplex: bool
) -> None:
    monkeypatch.setattr(pods, "LOOK_UP_SECONDS", 0)
    for module in (sync, aio):
        monkeypatch.setattr(module, "ANSWER_SECONDS", 0.1)
    samples = noise(4_800)

    async def main(names: Names) -> tuple[AsyncLiveStream, list[np.ndarray]]:
        async with AsyncClient("calls:50051", resolver=names, multiplex=multiplex) as client:
            stream = await client.stream(RATE, compensate_delay=True)
            outputs = [await stream.push(samples[:1_600])]
            await asyncio.to_thread(both_speak.wait)
            await asyncio.to_thread(told_to_stop.wait)
            outputs += [await stream.push(chunk) for chunk in chunks(samples[1_600:])]
            return stream, [*outputs, await stream.end()]

    both_speak, told_to_stop = threading.Barrier(2), threading.Event()
    with (
        running(enhancer, shutdown_grace_seconds=30) as stopping,
        socket.create_server(("127.0.0.1", 0)) as mute,
        Client("calls:50051", resolver=(names := Names(address(stopping))), multiplex=multiplex) as client,
        ThreadPoolExecutor() as pool,
    ):
        other = pool.submit(asyncio.run, main(names))
        stream = client.stream(RATE, compensate_delay=True)
        outputs = [stream.push(samples[:1_600])]
        both_speak.wait()
        names.addresses = [f"127.0.0.1:{mute.getsockname()[1]}"]
        stopping.should_exit = True
        eventually(lambda: stopping.health.stopping, "the end")
        told = time.monotonic()
        told_to_stop.set()
        outputs += [stream.push(chunk) for chunk in chunks(samples[1_600:])]
        results = [(stream, [*outputs, stream.end()]), other.result()]
        assert time.monotonic() - told < 4  # gRPC gives a connection up after 5 s
    for call, heard in results:
        assert (call.handovers, call.reconnections) == (0, 0)
        np.testing.assert_array_equal(np.concatenate(heard), enhance(samples, RATE, enhancer=enhancer))


def test_a_name_that_nobody_knows_is_told() -> None:
    def unknown(host: str, port: int) -> list[str]:
        raise OSError(f"{host} is not known")

    with Client("calls:50051", resolver=unknown, patience_seconds=0) as client:
        with pytest.raises(OSError, match="calls is not known"):
            client.stream(RATE)
        client.pods._resolver = lambda host, port: []
        with pytest.raises(OSError, match="no address stands behind"):
            client.status()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An authority, the server's certificate for `calls`, and a client's."""
    folder = tmp_path_factory.mktemp("certificates")
    authority = trustme.CA()
    server, client = authority.issue_cert("calls"), authority.issue_cert("caller")
    parts = {
        "authority": [authority.cert_pem],
        "server": server.cert_chain_pems,
        "server_key": [server.private_key_pem],
        "client": client.cert_chain_pems,
        "client_key": [client.private_key_pem],
    }
    for name, blobs in parts.items():
        (folder / name).write_bytes(b"".join(blob.bytes() for blob in blobs))
    return {name: folder / name for name in parts}


def test_a_file_for_tls_that_cannot_be_read_is_told() -> None:
    with pytest.raises(ParameterError, match=r"TLS cannot be read: none.pem: No such file"):
        Client("calls:50051", tls=Tls("none.pem"))


@pytest.mark.parametrize("key", [f"{KEY}\n", f" {KEY}", "schlüssel", 5, KEY.encode()])
def test_a_key_that_cannot_be_sent_is_told_and_not_repeated(key: Any) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(ParameterError, match="the API key cannot be sent; accepted are") as told:
            kind("calls:50051", api_key=key)
        assert str(key).strip() not in str(told.value)


def test_files_that_are_no_certificates_and_keys_are_told(certificates: dict[str, Path]) -> None:
    trust, certificate, key = (certificates[name] for name in ("authority", "client", "client_key"))
    for tls, told in (
        (Tls(trust, certificate), "the key is missing"),
        (Tls(key=key), "the certificate is missing"),
        (Tls(key), f"there must be certificates in {key}"),
        (Tls(trust, key, key), f"there must be a certificate and its key, .* in {key} and {key}"),
        (Tls(trust, certificate, certificates["server_key"]), "there must be a certificate and its key"),
    ):
        for kind in (Client, AsyncClient):
            with pytest.raises(ParameterError, match=told):
                kind("calls:50051", tls=tls)


def test_keys_and_certificates_open_the_door(enhancer: Enhancer, certificates: dict[str, Path]) -> None:
    """The pods are reached by number, and their certificate bears the service's name."""
    choices = {
        "api_keys": keys.parse(f"me:{KEY}"),
        "tls_cert": certificates["server"],
        "tls_key": certificates["server_key"],
        "tls_client_ca": certificates["authority"],
    }
    trust = certificates["authority"]
    tls = Tls(str(trust), certificates["client"], certificates["client_key"])
    with serving(enhancer, **choices) as target:
        names = Names(target)
        with Client("dns:///calls:50051", tls=tls, api_key=KEY, resolver=names) as client:
            assert client.status().model_name == "random"
            stream = client.stream(RATE)
            assert sum(map(len, stream.pipe([noise(160)]))) == 160 + stream.delay_samples

        async def main() -> None:
            async with (
                AsyncClient("calls:50051", tls=tls, api_key=KEY, resolver=names) as client,
                client.stream(RATE) as stream,
            ):
                assert len(await stream.push(noise(160))) == 160

        asyncio.run(main())
        for host, wrong_tls, key, code in (
            ("calls", tls, "guessed", grpc.StatusCode.UNAUTHENTICATED),
            ("calls", tls, None, grpc.StatusCode.UNAUTHENTICATED),
            ("calls", Tls(trust), KEY, grpc.StatusCode.UNAVAILABLE),
            ("others", tls, KEY, grpc.StatusCode.UNAVAILABLE),
            ("calls", None, KEY, grpc.StatusCode.UNAVAILABLE),
        ):
            with (
                Client(
                    f"{host}:50051", tls=wrong_tls, api_key=key, resolver=names, patience_seconds=0
                ) as client,
                pytest.raises(grpc.RpcError) as refused,
            ):
                client.stream(RATE)
            assert refused.value.code() is code


def test_asyncio_streams_leave_a_server_that_stops_and_tell_of_one_that_is_lost(
    enhancer: Enhancer, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pods, "LOOK_UP_SECONDS", 0)
    samples = noise(4_800)

    async def main(stopping: Server) -> np.ndarray:
        names = Names(address(stopping))
        async with AsyncClient("calls:50051", resolver=names, patience_seconds=0.3) as client:
            stream = await client.stream(RATE, compensate_delay=True)
            outputs = [await stream.push(samples[:1_600])]
            names.addresses = [target]
            stopping.should_exit = True
            await asyncio.to_thread(eventually, lambda: stopping.health.stopping, "the end")
            outputs += [await stream.push(chunk) for chunk in chunks(samples[1_600:])]
            assert stream.reconnections == 1
            outputs.append(await stream.end())
            names.addresses = ["127.0.0.9:9"]
            for call in (client.stream(RATE), client.status()):
                with pytest.raises(grpc.RpcError) as lost:
                    await call
                assert lost.value.code() is grpc.StatusCode.UNAVAILABLE
        return np.concatenate(outputs)

    with running(enhancer, shutdown_grace_seconds=30) as stopping:
        output = asyncio.run(main(stopping))
    np.testing.assert_array_equal(output, enhance(samples, RATE, enhancer=enhancer))


def test_asyncio_sending_waits_while_nobody_receives(target: str) -> None:
    async def main() -> None:
        async with AsyncClient(target) as client, client.stream(RATE) as stream:
            sent = []

            async def speak() -> None:
                for chunk in chunks(noise(2 * RATE), 1_600):
                    await stream.send(chunk)
                    sent.append(chunk)

            speaker = asyncio.create_task(speak())
            while len(sent) < 11:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            assert len(sent) == 11
            for _ in range(20):
                answer = await stream.receive()
                assert answer is not None
                assert len(answer.samples) == 1_600
            await speaker

    asyncio.run(asyncio.wait_for(main(), 60))


def failing() -> Iterator[np.ndarray]:
    yield noise(160)
    raise LookupError("no more audio")


@each_way
def test_a_source_that_fails_ends_the_pipe_with_its_error(target: str, multiplex: bool) -> None:
    async def main() -> None:
        async with AsyncClient(target, multiplex=multiplex) as client:
            stream = await client.stream(RATE)
            async for _ in stream.pipe(failing()):
                pass

    with Client(target, multiplex=multiplex) as client, pytest.raises(LookupError, match="no more audio"):
        list(client.stream(RATE).pipe(failing()))
    with pytest.raises(LookupError, match="no more audio"):
        asyncio.run(main())


@each_way
def test_a_pipe_that_is_left_gives_its_place_back(target: str, multiplex: bool) -> None:
    with Client(target, multiplex=multiplex) as client:
        pipe = client.stream(RATE).pipe(noise(160) for _ in range(10_000))
        assert len(next(pipe)) == 160
        pipe.close()
        eventually(lambda: client.status().active_streams == 0, "an idle server")


def test_the_sessions_of_one_rpc_are_apart(
    target: str, enhancer: Enhancer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many speakers in one thread; one that is refused or leaves harms no other."""
    monkeypatch.setattr(conversation, "MAX_RATE_HZ", 96_000)
    samples = [noise(3_200, seed) for seed in range(6)]
    with Client(target, multiplex=True, patience_seconds=0) as client:
        streams = [client.stream(RATE, compensate_delay=True) for _ in samples]
        with pytest.raises(grpc.RpcError) as refused:
            client.stream(96_000)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "config.sample_rate_hz: 96000" in refused.value.details()
        client.stream(RATE).close()
        outputs: list[list[np.ndarray]] = [[] for _ in samples]
        for start in range(0, 3_200, 160):
            for stream, voice in zip(streams, samples, strict=True):
                stream.send(voice[start : start + 160])
            for stream, output in zip(streams, outputs, strict=True):
                answer = stream.receive()
                assert answer is not None
                output.append(answer.samples)
        assert len(client._trunks) == 1
        for stream, output, voice in zip(streams, outputs, samples, strict=True):
            output.append(stream.end())
            np.testing.assert_array_equal(np.concatenate(output), enhance(voice, RATE, enhancer=enhancer))
        with client.stream(RATE, timeout_seconds=0.2) as late, pytest.raises(grpc.RpcError) as over:
            late.receive()
        assert over.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_the_client_loads_neither_engine_nor_service():
    """Its users have little else to do with them."""
    heavy = {"onnxruntime", "soundfile", "fastapi", "uvicorn", "service.engine"}
    code = f"import sys, service.client; print({heavy} & sys.modules.keys() or 'light')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "light\n"
