"""Rows of a nested state are copied out and in without touching the others."""

from dataclasses import dataclass

import numpy as np

from percepnet import rows


@dataclass
class Inner:
    counts: np.ndarray


@dataclass
class Outer:
    named: dict[str, np.ndarray]
    inner: Inner


def numbered(n: int) -> Outer:
    return Outer({"a": np.arange(n * 3.0).reshape(n, 3)}, Inner(np.arange(n)))


def test_taken_rows_are_copies_in_the_order_asked_for() -> None:
    state = numbered(4)
    taken = rows.take(state, np.array([3, 1]))
    assert taken.inner.counts.tolist() == [3, 1]
    assert taken.named["a"].tolist() == [[9, 10, 11], [3, 4, 5]]
    taken.inner.counts[:] = -1
    taken.named["a"][:] = -1
    assert state.inner.counts.tolist() == [0, 1, 2, 3]
    assert state.named["a"].min() == 0


def test_rows_put_back_leave_the_others_alone() -> None:
    state = numbered(4)
    rows.put(state, np.array([2, 0]), Outer({"a": np.full((2, 3), 7.0)}, Inner(np.array([20, 0]))))
    assert state.inner.counts.tolist() == [0, 1, 20, 3]
    assert state.named["a"][:, 0].tolist() == [7, 3, 7, 9]


def test_one_row_can_fill_many() -> None:
    state = numbered(3)
    rows.put(state, np.array([0, 2]), rows.take(state, np.array([1])))
    assert state.inner.counts.tolist() == [1, 1, 1]


def test_rows_side_by_side_are_viewed_and_others_copied() -> None:
    state = numbered(5)
    assert rows.select([3]) == slice(3, 4)
    assert rows.select([1, 2, 3]) == slice(1, 4)
    assert rows.select([0, 2, 3]).tolist() == [0, 2, 3]
    side_by_side = rows.take(state, rows.select([1, 2, 3]))
    assert side_by_side.inner.counts.tolist() == [1, 2, 3]
    assert np.shares_memory(side_by_side.named["a"], state.named["a"])
    rows.put(state, rows.select([1, 2, 3]), Outer({"a": np.full((3, 3), 7.0)}, Inner(np.array([10, 20, 30]))))
    assert state.inner.counts.tolist() == [0, 10, 20, 30, 4]
    assert state.named["a"][:, 0].tolist() == [0, 7, 7, 7, 12]
