"""Rows of a state: the memories of single streams inside the arrays of many.

A state is an array with one row per stream, or a dataclass or a dictionary of states.
"""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import TypeVar, cast

import numpy as np

State = TypeVar("State")

Rows = np.ndarray | slice
"""Which rows: int (n,), each once, or a slice."""


def select(rows: Sequence[int]) -> Rows:
    """Ascending row numbers as an index: a slice if they lie side by side."""
    first, end = rows[0], rows[-1] + 1
    return slice(first, end) if end - first == len(rows) else np.array(rows)


def take(state: State, rows: Rows) -> State:
    """Some rows: a view of those of a slice, else a copy."""
    if isinstance(state, np.ndarray):
        return cast(State, state[rows] if isinstance(rows, slice) else state.take(rows, axis=0))
    if isinstance(state, dict):
        return cast(State, {name: take(part, rows) for name, part in state.items()})
    assert is_dataclass(state)
    assert not isinstance(state, type)
    return replace(state, **{field.name: take(getattr(state, field.name), rows) for field in fields(state)})


def copy(state: State) -> State:
    """A state of its own memory, contiguous."""
    if isinstance(state, np.ndarray):
        return cast(State, np.array(state, order="C"))
    if isinstance(state, dict):
        return cast(State, {name: copy(part) for name, part in state.items()})
    assert is_dataclass(state)
    assert not isinstance(state, type)
    return replace(state, **{field.name: copy(getattr(state, field.name)) for field in fields(state)})


def put(state: State, rows: Rows, values: State) -> None:
    """Overwrite some rows in place; values: a state of as many rows, or of one."""
    if isinstance(state, np.ndarray):
        state[rows] = values
    elif isinstance(state, dict):
        for name, part in state.items():
            put(part, rows, cast(dict, values)[name])
    else:
        assert is_dataclass(state)
        for field in fields(state):
            put(getattr(state, field.name), rows, getattr(values, field.name))
