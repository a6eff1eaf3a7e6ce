"""Score a model on pairs of noisy and clean recordings, through the path that serves. Needs no torch."""

import argparse
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from percepnet import metrics
from percepnet.enhancer import Enhancer
from percepnet.metrics import Scores
from percepnet.model import Model
from percepnet.recordings import add_control_arguments, add_model_argument, controls_of
from percepnet.report import Pair, count, each, make_folder, markdown, pairs, read_together
from percepnet.stream import enhance_file
from percepnet.synthesis import Controls


def conditions(name: str) -> list[str]:
    """The groups that a clip counts in, told from its name: `_clean`, `_rev` for reverberation, `_snr-5`."""
    if "_clean" in name:
        return ["clean"]
    if "_rev" in name:
        return ["noise+reverb"]
    snr = re.search(r"_snr(-?\d+)", name)
    return ["noise", f"noise, {int(snr[1])} dB"] if snr else ["noise"]


@dataclass(frozen=True)
class Evaluation:
    """Enhances a clip and scores it before and after; runs in a process of its own."""

    model: Path | None
    """A model.onnx or its folder; None for the bundled model."""
    controls: Controls
    output: Path
    """Folder for the enhanced files, WAV of the same names."""

    def __call__(self, pair: Pair) -> tuple[Scores, Scores]:
        """Scores of the noisy and of the enhanced clip."""
        target = self.output / f"{pair.name}.wav"
        enhance_file(pair.noisy, target, controls=self.controls, enhancer=_enhancer(self.model))
        (clean, noisy, enhanced), rate = read_together(pair.clean, pair.noisy, target)
        return metrics.score(clean, noisy, rate), metrics.score(clean, enhanced, rate)


@lru_cache(maxsize=1)
def _enhancer(model: Path | None) -> Enhancer:
    return Enhancer(Model.load(model))


def table(names: Sequence[str], scores: Sequence[tuple[Scores, Scores]]) -> str:
    """Mean scores before and after in each condition, as a Markdown table."""
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        for condition in conditions(name):
            groups.setdefault(condition, []).append(index)
    rows = []
    for condition in sorted(groups, key=_order):
        clips = groups[condition]
        for column, signal in enumerate(("noisy", "enhanced")):
            mean = metrics.mean([scores[clip][column] for clip in clips])
            rows.append([f"{condition}: {signal}", str(len(clips)), *mean.cells()])
    return markdown(["condition", "clips", *metrics.HEADINGS], rows)


def _order(condition: str) -> tuple[int, int]:
    """Whole conditions first, then the parts of the noise by rising SNR."""
    kind, _, snr = condition.partition(", ")
    return (1, int(snr.removesuffix(" dB"))) if snr else (0, ("noise", "noise+reverb", "clean").index(kind))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe `percepnet evaluate`."""
    parser.description = (
        "Enhance a folder of mono recordings as a stream would be, and compare them with their clean "
        "references of the same names. Names may tell the condition: _snr-5, _rev, _clean."
    )
    parser.add_argument("--clean", type=Path, required=True, metavar="DIR", help="the references")
    parser.add_argument("--noisy", type=Path, required=True, metavar="DIR", help="the recordings")
    parser.add_argument(
        "--enhanced-out", type=Path, metavar="DIR", help="keep the enhanced recordings here, as WAV"
    )
    add_model_argument(parser)
    add_control_arguments(parser)
    parser.add_argument("--jobs", type=count, default=1, help="processes (default: 1)")


def run(arguments: argparse.Namespace) -> int:
    """Enhance, score and print the table; returns the exit status."""
    clips = pairs(arguments.clean, arguments.noisy)
    controls = controls_of(arguments)
    model = Model.load(arguments.model)
    with tempfile.TemporaryDirectory() as temporary:
        output = arguments.enhanced_out or Path(temporary)
        make_folder(output, apart_from=[path.parent for path in (clips[0].clean, clips[0].noisy)])
        evaluation = Evaluation(arguments.model, controls, output)
        scores = list(each(evaluation, clips, arguments.jobs))
    print(f"{model.manifest.name} {model.manifest.version}, {model.precision}\n")
    print(table([pair.name for pair in clips], scores))
    return 0
