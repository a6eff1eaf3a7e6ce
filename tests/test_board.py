"""What workers tell each other: any of them gives the figures of the whole service."""

import os

import pytest
from prometheus_client.parser import text_string_to_metric_families

from percepnet.model import Model
from service import board
from service.board import SHEET_BYTES, Board
from service.callers import Quota
from service.errors import LimitError
from service.metrics import Metrics


@pytest.fixture
def boards() -> list[Board]:
    """The same board as three workers see it."""
    file = board.shared_file(3)
    workers = [Board(3, mine, file) for mine in range(3)]
    os.close(file)
    for worker in workers:
        worker.mine.ready = 1
    return workers


def told(metrics: Metrics) -> dict[str, float]:
    """All values that one worker tells, by name and labels."""
    families = text_string_to_metric_families(metrics.render("")[0].decode())
    return {
        sample.name + "".join(sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


def test_numbers_and_snapshots_reach_the_other_workers(boards: list[Board]) -> None:
    boards[0].mine.streams, boards[2].mine.streams = 3, 4
    boards[2].mine.snapshot = ["ä", 1.5]
    assert boards[1].total("streams") == 7
    assert boards[1].slots[2].snapshot == ["ä", 1.5]
    assert boards[1].mine.snapshot is None
    boards[2].mine.snapshot = []
    assert boards[0].slots[2].snapshot == []


def test_a_worker_killed_while_it_publishes_leaves_its_last_snapshot(boards: list[Board]) -> None:
    boards[0].mine.snapshot = "whole"
    halves = boards[0].mine.sheets[0]
    [torn] = [half for half in halves if bytes(half[:7]) != b'"whole"']
    torn[:4] = b"torn"
    assert boards[1].slots[0].snapshot == "whole"


def test_a_snapshot_that_has_no_room_is_refused(boards: list[Board]) -> None:
    boards[0].mine.snapshot = "small"
    with pytest.raises(ValueError, match="there is room for"):
        boards[0].mine.snapshot = "x" * SHEET_BYTES
    assert boards[1].slots[0].snapshot == "small"


def test_a_limit_counts_over_all_workers_and_a_lost_one_holds_nothing(boards: list[Board]) -> None:
    quotas = [Quota(2, "streams", each) for each in boards]
    with quotas[0].hold("radio"), quotas[1].hold("radio"), quotas[2].hold("mixer"):
        for quota in quotas:
            with pytest.raises(LimitError), quota.hold("radio"):
                pass
        boards[0].slots[1].vacate()
        with quotas[2].hold("radio"):
            pass
    assert [slot.held for slot in boards[0].slots] == [{}, {}, {}]


def test_every_worker_tells_the_sum_of_all(boards: list[Board], random_model: Model) -> None:
    workers = [Metrics(random_model, each) for each in boards]
    for i, worker in enumerate(workers):
        worker.streams.labels("ok").inc(i + 1)
        worker.stream_latency.observe(0.004)
        worker.load.changed(i, 20)
        worker.queue_frames.set(10)
        worker.publish()
    for worker in workers:
        values = told(worker)
        assert values["percepnet_streams_totalok"] == 6
        assert values["percepnet_stream_latency_seconds_count"] == 3
        assert values["percepnet_stream_latency_seconds_bucket0.003"] == 0
        assert values["percepnet_stream_latency_seconds_bucket0.004"] == 3
        assert values["percepnet_streams_active"] == 3
        assert values["percepnet_streams_capacity"] == 60
        assert values["percepnet_queue_frames"] == 30
        assert values["percepnet_workers"] == 3
        assert values["percepnet_worker_restarts_total"] == 0
        assert sum(name.startswith("percepnet_build_info") for name in values) == 1


def test_counters_go_on_and_gauges_end_with_a_lost_worker(boards: list[Board], random_model: Model) -> None:
    lost, other = (Metrics(random_model, each) for each in boards[:2])
    lost.streams.labels("ok").inc(5)
    lost.deadline_misses.inc(2)
    lost.load.changed(4, 20)
    lost.queue_frames.set(10)
    lost.publish()
    assert told(other)["percepnet_streams_active"] == 4

    boards[1].slots[0].vacate()
    boards[1].slots[0].restarts += 1
    alone = told(other)
    assert alone["percepnet_streams_totalok"] == 5
    assert (alone["percepnet_streams_active"], alone["percepnet_queue_frames"]) == (0, 0)
    assert (alone["percepnet_workers"], alone["percepnet_worker_restarts_total"]) == (2, 1)
    assert alone["percepnet_streams_lost_total"] == 4

    boards[0].mine.ready = 1
    replacement = Metrics(random_model, boards[0])
    replacement.streams.labels("ok").inc()
    replacement.publish()
    for worker in (replacement, other):
        values = told(worker)
        assert values["percepnet_streams_totalok"] == 6
        assert values["percepnet_deadline_misses_total"] == 2
        assert values["percepnet_queue_frames"] == 0


def test_the_cost_of_a_stream_is_that_of_all_workers(boards: list[Board], random_model: Model) -> None:
    worker = Metrics(random_model, boards[0])
    for slot, cpu_seconds, open_seconds in zip(
        boards[0].slots, (1.0, 3.0, 0.0), (100.0, 60.0, 0), strict=True
    ):
        slot.cpu_seconds, slot.open_seconds = cpu_seconds, open_seconds
    assert told(worker)["percepnet_stream_cpu_ratio"] == pytest.approx(4 / 160)
