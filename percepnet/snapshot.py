"""Snapshots: the memory of streams as bytes, from which another process goes on without a difference.

A snapshot is a line of JSON, which names the arrays with their types and shapes, and then their samples,
little endian. It holds no code, and is read only by the model and the version that wrote it.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import TypeVar, cast

import numpy as np

from percepnet.errors import SnapshotError

FORMAT = "percepnet-snapshot-1"
"""Names what the arrays mean; to be changed whenever the signal path keeps another memory."""

Arrays = dict[str, np.ndarray]
"""By name; parts of parts have names with dots."""

State = TypeVar("State")

_TYPES = ("<f4", "<f8", "<c8", "|u1", "<i2", "<i8")
_HEADER_BYTES = 16 * 1024  # a stream has some 30 arrays


def pack(arrays: Mapping[str, np.ndarray], model: str) -> bytes:
    """Make a snapshot of arrays. model: sha256 of the one whose memory they are."""
    layout = {name: [array.dtype.str, array.shape] for name, array in arrays.items()}
    header = {"format": FORMAT, "model": model, "arrays": layout}
    line = json.dumps(header, separators=(",", ":")).encode()
    return b"\n".join([line, b"".join(array.tobytes() for array in arrays.values())])


def unpack(data: bytes, model: str) -> Arrays:
    """The arrays of a snapshot, read-only; raises SnapshotError if it is none of this version and model."""
    line, _, content = data.partition(b"\n")
    try:
        header = json.loads(line) if len(line) <= _HEADER_BYTES else None
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise SnapshotError(f"not a snapshot of the format {FORMAT}")
    if header.get("model") != model:
        raise SnapshotError(f"a snapshot of another model; this one's sha256 is {model}")
    arrays: Arrays = {}
    place = 0
    for name, kind, shape in _layout(header.get("arrays")):
        n_bytes = math.prod(shape) * np.dtype(kind).itemsize
        if n_bytes > len(content) - place:
            raise SnapshotError(f"a snapshot that ends within {name}")
        arrays[name] = np.frombuffer(content[place : place + n_bytes], kind).reshape(shape)
        place += n_bytes
    if place != len(content):
        raise SnapshotError(f"a snapshot with {len(content) - place} bytes too many")
    return arrays


def flatten(state: object, name: str) -> Arrays:
    """The arrays of a state (an array, or a dataclass or a dictionary of states) by their full names."""
    if isinstance(state, np.ndarray):
        return {name: state}
    parts = _parts(state)
    return {full: array for part in parts for full, array in flatten(parts[part], f"{name}.{part}").items()}


def take(arrays: Arrays, name: str, kind: type[np.generic] | np.dtype, *shape: int | None) -> np.ndarray:
    """Take out one array, a copy; None stands for any size. Raises SnapshotError if it is none such."""
    array = arrays.pop(name, None)
    if array is None:
        raise SnapshotError(f"a snapshot without {name}")
    fits = len(shape) == array.ndim and all(
        size in (None, found) for size, found in zip(shape, array.shape, strict=True)
    )
    if array.dtype != kind or not fits:
        accepted = f"{np.dtype(kind)} {shape}".replace("None", "any")
        raise SnapshotError(f"{name} is {array.dtype} {array.shape}; accepted is {accepted}")
    return array.copy()


def take_state(arrays: Arrays, name: str, like: State) -> State:
    """Take out a state with the names, types and shapes of another one; raises SnapshotError."""
    if isinstance(like, np.ndarray):
        return cast(State, take(arrays, name, like.dtype, *like.shape))
    parts = {part: take_state(arrays, f"{name}.{part}", value) for part, value in _parts(like).items()}
    if isinstance(like, dict):
        return cast(State, parts)
    assert is_dataclass(like)
    assert not isinstance(like, type)
    return replace(like, **parts)


def finish(arrays: Arrays) -> None:
    """Raise SnapshotError if something was not taken out."""
    if arrays:
        raise SnapshotError(f"a snapshot with unknown arrays: {', '.join(sorted(arrays))}")


def _layout(arrays: object) -> list[tuple[str, str, list[int]]]:
    """Names, types and shapes, checked."""
    if not isinstance(arrays, dict):
        raise SnapshotError("a snapshot without arrays")
    layout = []
    for name, description in arrays.items():
        match description:
            case [str(kind), [*shape]] if kind in _TYPES and all(_is_size(size) for size in shape):
                layout.append((name, kind, shape))
            case _:
                raise SnapshotError(f"{name} has no type and shape that are known")
    return layout


def _is_size(size: object) -> bool:
    return type(size) is int and 0 <= size < 1 << 31


def _parts(state: object) -> dict[str, object]:
    if isinstance(state, dict):
        return state
    assert is_dataclass(state)
    return {field.name: getattr(state, field.name) for field in fields(state)}
