"""Rows of a state: the memories of single streams inside the arrays of many.

A state is an array with one row per stream, or a dataclass or a dictionary of states.
"""

from dataclasses import fields, is_dataclass, replace
from typing import TypeVar, cast

import numpy as np

State = TypeVar("State")


def take(state: State, rows: np.ndarray) -> State:
    """A copy of some rows; rows: int (n,)."""
    if isinstance(state, np.ndarray):
        return cast(State, state.take(rows, axis=0))
    if isinstance(state, dict):
        return cast(State, {name: take(part, rows) for name, part in state.items()})
    assert is_dataclass(state)
    assert not isinstance(state, type)
    return replace(state, **{field.name: take(getattr(state, field.name), rows) for field in fields(state)})


def put(state: State, rows: np.ndarray, values: State) -> None:
    """Overwrite some rows in place; rows: int (n,), each once; values: a state of n rows, or of one."""
    if isinstance(state, np.ndarray):
        state[rows] = values
    elif isinstance(state, dict):
        for name, part in state.items():
            put(part, rows, cast(dict, values)[name])
    else:
        assert is_dataclass(state)
        for field in fields(state):
            put(getattr(state, field.name), rows, getattr(values, field.name))
