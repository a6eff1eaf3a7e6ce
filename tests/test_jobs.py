"""Files in turn: nobody waits for a long file to end, and work that nobody wants stops."""

import asyncio
import os
import threading
from collections.abc import Callable

import pytest

from service.errors import BusyError, ClientGoneError
from service.jobs import FileJobs


def test_files_take_turns_block_by_block() -> None:
    """On one worker, a file of one block that comes later ends before a file of many blocks."""
    order = []
    jobs = FileJobs(workers=1, limit=2)
    started = threading.Event()

    def long(checkpoint: Callable[[], None]) -> None:
        started.set()
        short_queued.wait()
        for _ in range(3):
            order.append("long")
            checkpoint()

    def short(checkpoint: Callable[[], None]) -> None:
        order.append("short")

    short_queued = threading.Event()

    async def both() -> None:
        first = asyncio.create_task(jobs.run(long))
        await asyncio.to_thread(started.wait)
        second = asyncio.create_task(jobs.run(short))
        while not jobs.waiting:
            await asyncio.sleep(0.001)
        short_queued.set()
        await asyncio.gather(first, second)

    asyncio.run(both())
    asyncio.run(jobs.close())
    assert order == ["long", "short", "long", "long"]


def test_no_more_files_run_at_an_instant_than_there_are_workers() -> None:
    jobs = FileJobs(workers=2, limit=8)
    running, most, lock = 0, 0, threading.Lock()

    def work(checkpoint: Callable[[], None]) -> None:
        nonlocal running, most
        for _ in range(20):
            with lock:
                running += 1
                most = max(most, running)
            threading.Event().wait(0.0005)
            with lock:
                running -= 1
            checkpoint()

    async def all_of_them() -> None:
        await asyncio.gather(*(jobs.run(work) for _ in range(8)))

    asyncio.run(all_of_them())
    asyncio.run(jobs.close())
    assert most == 2
    assert jobs.waiting == 0


def test_a_failure_reaches_the_caller_and_frees_the_worker() -> None:
    jobs = FileJobs(workers=1, limit=1)

    def fail(checkpoint: Callable[[], None]) -> None:
        raise ZeroDivisionError

    async def twice() -> str:
        with pytest.raises(ZeroDivisionError):
            await jobs.run(fail)
        return await jobs.run(lambda checkpoint: "done")

    assert asyncio.run(twice()) == "done"
    asyncio.run(jobs.close())


def test_cancelled_work_ends_at_its_next_checkpoint_and_is_waited_for() -> None:
    jobs = FileJobs(workers=1, limit=1)
    started, ended = threading.Event(), []

    def endless(checkpoint: Callable[[], None]) -> None:
        started.set()
        try:
            while True:
                threading.Event().wait(0.001)
                checkpoint()
        except ClientGoneError:
            ended.append(True)
            raise

    async def cancel() -> None:
        task = asyncio.create_task(jobs.run(endless))
        await asyncio.to_thread(started.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended

    asyncio.run(cancel())
    asyncio.run(jobs.close())


def test_places_are_limited_and_given_back() -> None:
    jobs = FileJobs(workers=1, limit=1)
    with jobs.place(), pytest.raises(BusyError, match="all 1 places"), jobs.place():
        pass
    with jobs.place():
        assert jobs.accepted == 1
    assert jobs.accepted == 0
    asyncio.run(jobs.close())


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="the system has no such threads")
def test_files_have_the_core_only_while_nobody_else_wants_it() -> None:
    async def policy() -> int:
        jobs = FileJobs(1, 1)
        with jobs.place():
            found = await jobs.run(lambda _: os.sched_getscheduler(0))
        await jobs.close()
        return found

    assert asyncio.run(policy()) == os.SCHED_IDLE
    assert os.sched_getscheduler(0) != os.SCHED_IDLE
