"""What the commands that measure share: their optional modules, their pairs of files, their tables."""

import argparse
import importlib
import multiprocessing
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from percepnet.audio import READABLE_SUFFIXES, AudioReader
from percepnet.errors import AudioError, ParameterError, PercepNetError

_BLOCK = 1 << 16

Item = TypeVar("Item")
Result = TypeVar("Result")


def need(name: str) -> Any:
    """Import a module of the `measure` extra; raises PercepNetError that says how to install it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise PercepNetError(
            f"measuring needs the module {error.name!r}: pip install -e '.[measure]' in this project's folder"
        ) from error


def count(text: str) -> int:
    """A command-line argument that is a whole number from 1 up."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; accepted are whole numbers from 1 up")
    return int(text)


class Pair(NamedTuple):
    """A recording and its clean reference."""

    name: str
    """The file name without its suffix."""
    clean: Path
    noisy: Path


def pairs(clean: Path, noisy: Path) -> list[Pair]:
    """Pair two files, or the files of two folders that have the same names but for the suffix.

    Returns a pair for each noisy file, sorted by name. Raises ParameterError where a partner is missing.
    """
    if not (clean.is_dir() and noisy.is_dir()):
        for path in (clean, noisy):
            if not path.is_file():
                raise ParameterError(f"{path} is no file; give two files or two folders")
        return [Pair(noisy.stem, clean, noisy)]
    references, recordings = _audio_files(clean), _audio_files(noisy)
    if missing := sorted(recordings.keys() - references.keys()):
        raise ParameterError(
            f"{len(missing)} of {len(recordings)} files of {noisy} are not in {clean}, {missing[0]} for one"
        )
    return [Pair(name, references[name], path) for name, path in sorted(recordings.items())]


def _audio_files(folder: Path) -> dict[str, Path]:
    files = {path.stem: path for path in folder.iterdir() if path.suffix.lower() in READABLE_SUFFIXES}
    if not files:
        raise ParameterError(f"{folder} holds no audio files ({', '.join(READABLE_SUFFIXES)})")
    return files


def make_folder(folder: Path, *, apart_from: Sequence[Path]) -> None:
    """Make a folder for what is written; raises ParameterError if it is one of those that are read."""
    if folder.resolve() in {path.resolve() for path in apart_from}:
        raise ParameterError(f"{folder} holds recordings that would be written over; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)


def read_together(*paths: Path) -> tuple[list[np.ndarray], int]:
    """Read mono files that belong together: their samples, float32 (n,) each, and their common rate in Hz.

    Raises ParameterError for more than one channel, different rates or different lengths; AudioError.
    """
    signals, rates = zip(*(_read_mono(path) for path in paths), strict=True)
    shapes = {(len(signal), rate) for signal, rate in zip(signals, rates, strict=True)}
    if len(shapes) > 1:
        found = "; ".join(
            f"{path}: {len(signal)} samples at {rate} Hz"
            for path, signal, rate in zip(paths, signals, rates, strict=True)
        )
        raise ParameterError(f"these must have the same length and sample rate: {found}")
    return list(signals), rates[0]


def _read_mono(path: Path) -> tuple[np.ndarray, int]:
    try:
        with AudioReader(path) as reader:
            if reader.channels != 1:
                raise ParameterError(f"{path} has {reader.channels} channels; measured are mono files")
            return np.concatenate(list(reader.blocks(_BLOCK)), axis=1)[0], reader.sample_rate
    except AudioError as error:
        raise AudioError(f"{path}: {error}") from error


def each(work: Callable[[Item], Result], items: Sequence[Item], jobs: int) -> Iterator[Result]:
    """Do a piece of work for every item, in order, in so many processes, with a progress bar."""
    if jobs == 1:
        yield from _bar(map(work, items), len(items))
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        yield from _bar(pool.map(work, items), len(items))


def _bar(results: Iterable[Result], total: int) -> Iterable[Result]:
    return tqdm(results, total=total, unit="clip", disable=None, delay=1.0)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def machine() -> str:
    """The CPU and the versions that decide a measurement."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    libraries = ", ".join(f"{library} {version(library)}" for library in ("numpy", "scipy", "onnxruntime"))
    return f"{name}, {os.cpu_count()} cores; Python {platform.python_version()}, {libraries}"
