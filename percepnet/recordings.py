"""`percepnet enhance`: recordings in files, folders and patterns; and what other commands share with it."""

import argparse
import glob
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from percepnet.audio import ACCEPTED, FORMAT_OF_SUFFIX, FORMATS, READABLE_SUFFIXES
from percepnet.enhancer import Enhancer
from percepnet.errors import ParameterError, PercepNetError, reason
from percepnet.model import Model
from percepnet.stream import Summary, enhance_file
from percepnet.synthesis import MAX_ATTENUATION_LIMIT_DB, Controls

EXIT_FAILED = 1
EXIT_TERMINATED = 143

BAR_DELAY_SECONDS = 1.0
"""Shorter work shows no progress bar."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe `percepnet enhance`."""
    parser.description = (
        "Enhance speech recordings. Each output has its input's sample rate, channels, length and, for PCM, "
        "bit depth, and no delay against it. Files that are cut short or hold NaN are refused."
    )
    add_file_arguments(parser)
    add_output_arguments(parser)
    add_model_argument(parser)


def add_file_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what to read and where to write."""
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="IN",
        help=f"a file, a folder (with all below it) or a quoted pattern: {ACCEPTED}, 8 to 192 kHz",
    )
    parser.add_argument(
        "output",
        type=str,
        metavar="OUT",
        help="for one file, a file or a folder with / at its end; for a folder, a pattern or several files, "
        "another folder, made if need be, where names stay (MP3 becomes .wav)",
    )


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """Add the choice of a model."""
    parser.add_argument(
        "--model", type=Path, help="a model.onnx with its model.json beside it (default: the bundled model)"
    )


def add_control_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the choices of how to enhance."""
    parser.add_argument(
        "--attenuation-limit-db",
        type=float,
        default=Controls.attenuation_limit_db,
        metavar="DB",
        help=f"lower noise by at most this much, 0 to {MAX_ATTENUATION_LIMIT_DB:g} dB, which is as good as "
        "no limit (default: %(default)g)",
    )
    parser.add_argument(
        "--mix",
        type=float,
        default=Controls.mix,
        help="0 gives the input, 1 the enhanced signal (default: %(default)g)",
    )
    parser.add_argument(
        "--postfilter",
        type=float,
        default=Controls.postfilter,
        metavar="STRENGTH",
        help="0 keeps more residual noise, 1 sharpens the gains in full (default: %(default)g)",
    )


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the choices of how to enhance and how to write."""
    add_control_arguments(parser)
    parser.add_argument("--force", action="store_true", help="replace files that exist")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="format of the outputs (default: by OUT's suffix, or as the input); ogg is Vorbis unless the "
        "input is Opus",
    )


def controls_of(arguments: argparse.Namespace) -> Controls:
    """The controls chosen on the command line."""
    return Controls(arguments.attenuation_limit_db, arguments.mix, arguments.postfilter)


def _check_target(source: Path, target: Path, arguments: argparse.Namespace) -> None:
    """Raise ParameterError if a file is there that may not be replaced; the recording itself never may."""
    if not target.exists():
        return
    if source.exists() and target.samefile(source):
        raise ParameterError(f"{target} is the recording itself, which would be lost; choose another OUT")
    if not arguments.force:
        raise ParameterError(f"{target} exists; --force replaces it")


def run(arguments: argparse.Namespace) -> int:
    """Enhance every file with a model."""
    controls = controls_of(arguments)
    jobs = jobs_of(arguments)
    enhancer = Enhancer(Model.load(arguments.model))

    def work(source: Path, target: Path) -> str:
        return in_words(_enhance_with_bar(source, target, controls, enhancer, arguments.format))

    return enhance_all(jobs, work, arguments)


def enhance_all(
    jobs: list[tuple[Path, Path]], work: Callable[[Path, Path], str], arguments: argparse.Namespace
) -> int:
    """Enhance every file, tell what was done to each, and go on after one that fails.

    work: writes one file, whose folder is there, and says what was done. Returns the exit status.
    """
    n_failed = 0
    files = tqdm(jobs, unit="file", disable=None if len(jobs) > 1 else True, delay=BAR_DELAY_SECONDS)
    with _orderly_end():
        for source, target in files:
            try:
                _check_target(source, target, arguments)
                target.parent.mkdir(parents=True, exist_ok=True)
                tqdm.write(f"{source} → {target}: {work(source, target)}", file=sys.stdout)
            except (PercepNetError, OSError) as error:
                n_failed += 1
                told = reason(error).removeprefix(f"{source}: ")
                tqdm.write(f"percepnet: {source}: {told}", file=sys.stderr)
    return EXIT_FAILED if n_failed else 0


@contextmanager
def _orderly_end() -> Iterator[None]:
    """Let SIGTERM, too, end the `with` blocks inside, so that no partial file stays behind."""

    def end(*_: object) -> None:
        sys.exit(EXIT_TERMINATED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _enhance_with_bar(
    source: Path, target: Path, controls: Controls, enhancer: Enhancer, format: str | None
) -> Summary:
    with progress_bar(source) as show:
        return enhance_file(
            source, target, controls=controls, enhancer=enhancer, format=format, progress=show
        )


@contextmanager
def progress_bar(source: Path) -> Iterator[Callable[[int, int], None]]:
    """A bar for one file, on a terminal; it is told the samples done and the samples expected."""
    with tqdm(
        desc=source.name, unit="sample", unit_scale=True, leave=False, disable=None, delay=BAR_DELAY_SECONDS
    ) as bar:

        def show(done: int, total: int) -> None:
            bar.total = max(done, total)
            bar.update(done - bar.n)

        yield show


def in_words(summary: Summary) -> str:
    """What was done to a file."""
    channels = "1 channel" if summary.channels == 1 else f"{summary.channels} channels"
    words = (
        f"{summary.seconds:.1f} s, {channels}, {summary.sample_rate} Hz, enhanced in "
        f"{summary.processing_seconds:.2f} s ({1 / summary.real_time_factor:.0f} × real time)"
    )
    if summary.clipped_samples:
        words += f", {summary.clipped_samples} samples clipped"
    return words


def jobs_of(arguments: argparse.Namespace) -> list[tuple[Path, Path]]:
    """Pairs of a file to read and a file to write; raises ParameterError if they cannot be meant."""
    if not all([*arguments.inputs, arguments.output]):
        raise ParameterError("IN or OUT is empty; both need a name")
    return list(_jobs(arguments.inputs, arguments.output, arguments.format))


def _jobs(inputs: list[str], output: str, format: str | None) -> Iterator[tuple[Path, Path]]:
    folder = Path(output)
    sources = [pair for text in inputs for pair in _sources(text, folder)]
    to_folder = folder.is_dir() or output.endswith(os.sep)
    if len(sources) == 1 and sources[0][0] == Path(inputs[0]) and not to_folder:
        yield sources[0][0], folder
        return
    if folder.is_file() or (not to_folder and folder.suffix.lower() in READABLE_SUFFIXES):
        raise ParameterError(f"{output} is a file's name; a folder or several files need a folder as OUT")
    taken: dict[Path, Path] = {}
    for source, relative in sources:
        suffix = f".{format}" if format else source.suffix
        target = folder / relative.with_suffix(suffix if suffix.lower() in FORMAT_OF_SUFFIX else ".wav")
        if target in taken:
            raise ParameterError(f"{taken[target]} and {source} would both be written to {target}")
        taken[target] = source
        yield source, target


def _sources(text: str, output: Path) -> Iterator[tuple[Path, Path]]:
    """The files that one IN stands for, each with its place below an output folder."""
    path = Path(text)
    if path.is_dir():
        if path.resolve() == output.resolve():
            raise ParameterError(f"{text} is both IN and OUT; choose another folder as OUT")
        below = (p for p in sorted(path.rglob("*")) if p.suffix.lower() in READABLE_SUFFIXES and p.is_file())
        # An output folder inside the input folder keeps what an earlier run wrote.
        inside = output.resolve().is_relative_to(path.resolve())
        found = [p for p in below if not (inside and p.resolve().is_relative_to(output.resolve()))]
        if not found:
            raise ParameterError(f"{text} holds no audio files ({', '.join(READABLE_SUFFIXES)})")
        yield from ((p, p.relative_to(path)) for p in found)
    elif not path.exists() and glob.has_magic(text):
        matches = sorted(glob.glob(text, recursive=True))
        if not matches:
            raise ParameterError(f"nothing matches {text}")
        for match in matches:
            yield from _sources(match, output)
    else:
        yield path, Path(path.name)
