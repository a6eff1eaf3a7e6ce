"""Streams are saved and go on elsewhere without a difference.

Invariant: bytes are a snapshot of this model and version, or refused with a SnapshotError.
"""

from pathlib import Path

import numpy as np
import pytest
from conftest import export_random_model
from hypothesis import given, settings
from hypothesis import strategies as st

from percepnet import snapshot
from percepnet.enhancer import Enhancer
from percepnet.errors import ParameterError, SnapshotError
from percepnet.model import Model
from percepnet.stream import Stream
from percepnet.synthesis import Controls

MODEL = "0" * 64


def noise(n_samples: int) -> np.ndarray:
    return (0.1 * np.random.default_rng(0).standard_normal(n_samples)).astype(np.float32)


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100, 48_000, 96_000])
@settings(deadline=None, max_examples=6)
@given(place=st.integers(0, 4_000), controls=st.sampled_from([Controls(), Controls(12, 0.9, 0.5)]))
def test_a_stream_is_saved_and_resumed_without_a_difference(enhancer, rate, place, controls):
    samples = noise(4_800)
    unbroken = Stream(rate, controls=controls, enhancer=enhancer)
    expected = np.concatenate([unbroken.push(samples), unbroken.flush()])
    first = Stream(rate, controls=controls, enhancer=enhancer)
    outputs = [first.push(samples[:place])]
    saved = first.save()
    first.push(samples)  # what becomes of it does not matter
    second = Stream.restore(saved, controls=controls, enhancer=enhancer)
    assert second.latency_samples == unbroken.latency_samples
    outputs += [second.push(samples[place:]), second.flush()]
    np.testing.assert_array_equal(np.concatenate(outputs), expected)


def test_a_snapshot_of_the_bundled_model_is_small() -> None:
    for rate in (8_000, 22_050, 48_000):
        stream = Stream(rate)
        stream.push(noise(rate))
        assert len(stream.save()) < 50_000


def test_an_ended_stream_has_nothing_to_save(enhancer: Enhancer) -> None:
    stream = Stream(enhancer=enhancer)
    stream.flush()
    with pytest.raises(ParameterError, match="ended"):
        stream.save()


def test_other_models_versions_and_streams_are_refused(
    enhancer: Enhancer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = Stream(16_000, enhancer=enhancer).save()
    other = Enhancer(Model.load(export_random_model(tmp_path, seed=1, fc=32, conv=64, gru=64)))
    with pytest.raises(SnapshotError, match="another model"):
        Stream.restore(saved, enhancer=other)
    arrays = snapshot.unpack(saved, enhancer.model.manifest.sha256)
    for change, message in (
        ({"path.overlap": None}, "without path.overlap"),
        ({"path.overlap": np.zeros((1, 481), np.float32)}, r"path.overlap is float32 \(1, 481\)"),
        ({"path.overlap": np.zeros((1, 480))}, "path.overlap is float64"),
        ({"adapter.to_48k.buffer": np.zeros((2, 9), np.float32)}, r"accepted is float32 \(1, any\)"),
        ({"more": np.zeros(1)}, "unknown arrays: more"),
    ):
        changed = {name: array for name, array in (arrays | change).items() if array is not None}
        with pytest.raises(SnapshotError, match=message):
            Stream.restore(snapshot.pack(changed, enhancer.model.manifest.sha256), enhancer=enhancer)
    monkeypatch.setattr(snapshot, "FORMAT", "percepnet-snapshot-2")
    with pytest.raises(SnapshotError, match="not a snapshot of the format percepnet-snapshot-2"):
        Stream.restore(saved, enhancer=enhancer)


def test_arrays_come_back_as_they_were() -> None:
    arrays = {"a": np.arange(6, dtype="<i2").reshape(2, 3), "b.c": np.zeros((1, 0), "<c8"), "d": np.array(7)}
    found = snapshot.unpack(snapshot.pack(arrays, MODEL), MODEL)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


HEADER = b'{"format":"percepnet-snapshot-1","model":"%s","arrays":' % MODEL.encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[" * 10_000 + b"\n",
        HEADER + b'{"a":["<f4",[2]]}}\n1234567',
        HEADER + b'{"a":["<f4",[2]]}}\n123456789',
        HEADER + b'{"a":["|O",[1]]}}\n12345678',
        HEADER + b'{"a":["<f4",[-1]]}}\n',
        HEADER + b'{"a":["<f4",[true]]}}\n1234',
        HEADER + b'{"a":["<f4",[2147483647,2147483647,2147483647]]}}\n1234',
        HEADER + b'{"a":7}}\n',
        HEADER + b"null}\n",
    ],
)
def test_broken_snapshots_are_refused(data: bytes) -> None:
    with pytest.raises(SnapshotError):
        snapshot.unpack(data, MODEL)


@settings(max_examples=50)
@given(place=st.integers(0, 200), value=st.integers(0, 255))
def test_a_changed_byte_gives_arrays_or_a_refusal(place, value):
    data = bytearray(snapshot.pack({"a": np.zeros((3, 4), np.float32), "b": np.array(1)}, MODEL))
    data[place % len(data)] = value
    try:
        arrays = snapshot.unpack(bytes(data), MODEL)
    except SnapshotError:
        return
    assert sum(array.nbytes for array in arrays.values()) == 56
