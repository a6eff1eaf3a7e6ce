"""How far the signal path can climb with perfect knowledge of the clean signal in place of the network.

Each rung of the ladder is a way to enhance: nothing, 481 ideal magnitudes with the noisy phase, 34 ideal band
gains, these with the pitch comb filter, and with the postfilter. Comb-filtered bands about reach the 481
magnitudes with fourteen times fewer parameters, which is the argument for this design.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np

from percepnet import metrics, stft
from percepnet.analysis import AnalysisState, analyze
from percepnet.audio import AudioWriter, Encoding
from percepnet.bands import band_energy, power
from percepnet.constants import HOP, LATENCY_SAMPLES, N_BANDS, SAMPLE_RATE, WINDOW
from percepnet.report import Pair, count, each, make_folder, markdown, need, pairs, read_together
from percepnet.synthesis import MAX_ATTENUATION_LIMIT_DB, Controls, synthesize
from percepnet.targets import band_gains, clean_spectra, ideal

RUNGS = {
    "noisy": "noisy",
    "magnitude": "481-bin magnitude oracle, noisy phase",
    "gains": "34 band gains",
    "comb": "34 band gains + comb",
    "postfilter": "34 band gains + comb + postfilter",
}
"""Name of each rung's folder, and what it is."""

_TINY = np.float32(1e-9)


def climb(clean: np.ndarray, noisy: np.ndarray) -> dict[str, np.ndarray]:
    """Enhance a recording once per rung.

    clean, noisy: (n,) float32 at 48 kHz, full scale ±1. Returns signals (n,) float32 without delay, named as
    in `RUNGS`.
    """
    reference, recording = _frames(clean), _frames(noisy)
    analysis, _ = analyze(recording, AnalysisState.initial(1))
    spectrum, comb_spectrum = clean_spectra(reference, analysis.period)
    coherences = analysis.features[..., N_BANDS : 2 * N_BANDS]
    targets = ideal(spectrum, comb_spectrum, analysis.energy, coherences, analysis.period)
    plain_gains = band_gains(band_energy(spectrum), analysis.energy)
    no_comb = np.zeros_like(plain_gains)
    magnitudes = np.minimum(1, np.abs(spectrum) / (np.abs(analysis.noisy) + _TINY))

    silence = np.zeros((1, HOP), np.float32)
    plain, sharpened = (Controls(MAX_ATTENUATION_LIMIT_DB, postfilter=strength) for strength in (0, 1))
    outputs = {
        "magnitude": stft.inverse(analysis.noisy * magnitudes, silence),
        "gains": synthesize(analysis, plain_gains, no_comb, silence, plain),
        "comb": synthesize(analysis, targets.gains, targets.strengths, silence, plain),
        "postfilter": synthesize(analysis, targets.gains, targets.strengths, silence, sharpened),
    }
    end = LATENCY_SAMPLES + len(noisy)
    return {"noisy": noisy} | {rung: late[0, LATENCY_SAMPLES:end] for rung, (late, _) in outputs.items()}


def _frames(samples: np.ndarray) -> np.ndarray:
    """One stream of whole frames, long enough for the last sample to come out."""
    return np.pad(samples, (0, LATENCY_SAMPLES + -len(samples) % HOP))[np.newaxis]


def draw(signals: dict[str, np.ndarray], path: Path) -> None:
    """Draw the spectrograms of signals (n,) at 48 kHz below one another, under their titles."""
    need("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2 * len(signals)), layout="constrained")
    rows = figure.subplots(len(signals), squeeze=False)[:, 0]
    for axes, (title, samples) in zip(rows, signals.items(), strict=True):
        energy = power(stft.forward(stft.windows(np.pad(samples, (HOP, WINDOW))[np.newaxis], WINDOW)))[0]
        axes.imshow(
            10 * np.log10(energy.T / WINDOW + 1e-12),
            origin="lower",
            aspect="auto",
            extent=(0, len(energy) * HOP / SAMPLE_RATE, 0, SAMPLE_RATE / 2000),
            vmin=-90,
            vmax=0,
            cmap="magma",
        )
        axes.set_title(title, fontsize="medium", loc="left")
        axes.set_ylabel("kHz")
        axes.label_outer()
    rows[-1].set_xlabel("seconds")
    figure.savefig(path, dpi=100)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe `percepnet oracle`."""
    parser.description = (
        "Enhance recordings with gains and comb strengths computed from their clean references. Writes a "
        "folder of WAV files per rung, table.md with the scores (means over the clips), and spectrograms.png "
        "of the first clip."
    )
    parser.add_argument("clean", type=Path, metavar="CLEAN", help="a clean mono file, or a folder of them")
    parser.add_argument(
        "noisy", type=Path, metavar="NOISY", help="the noisy file, or a folder with the same names"
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR", required=True, help="folder for what is written"
    )
    parser.add_argument("--jobs", type=count, default=1, help="processes (default: 1)")


def run(arguments: argparse.Namespace) -> int:
    """Climb the ladder with every clip; returns the exit status."""
    clips = pairs(arguments.clean, arguments.noisy)
    sources = [path.parent for path in (clips[0].clean, clips[0].noisy)]
    for rung in RUNGS:
        make_folder(arguments.output / rung, apart_from=sources)
    _show(clips[0], arguments.output)
    scores = list(each(partial(_write_and_score, output=arguments.output), clips, arguments.jobs))
    rows = [[title, *metrics.mean([clip[rung] for clip in scores]).cells()] for rung, title in RUNGS.items()]
    of_clips = "1 clip" if len(clips) == 1 else f"{len(clips)} clips"
    table = markdown([of_clips, *metrics.HEADINGS], rows)
    (arguments.output / "table.md").write_text(table + "\n", encoding="utf-8")
    print(table)
    return 0


def _show(pair: Pair, output: Path) -> None:
    """Draw one clip's rungs below its clean reference."""
    clean, noisy = _read(pair)
    signals = {RUNGS[rung]: samples for rung, samples in climb(clean, noisy).items()}
    draw({f"{pair.name}, clean": clean} | signals, output / "spectrograms.png")


def _read(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    (clean, noisy), rate = read_together(pair.clean, pair.noisy)
    return metrics.resampled(clean, rate, SAMPLE_RATE), metrics.resampled(noisy, rate, SAMPLE_RATE)


def _write_and_score(pair: Pair, output: Path) -> dict[str, metrics.Scores]:
    """Write one clip's rungs and score them."""
    clean, noisy = _read(pair)
    signals = climb(clean, noisy)
    for rung, samples in signals.items():
        path = output / rung / f"{pair.name}.wav"
        with AudioWriter(path, Encoding("WAV", "PCM_16"), SAMPLE_RATE, 1, len(samples)) as writer:
            writer.write(samples[np.newaxis])
    return {rung: metrics.score(clean, samples, SAMPLE_RATE) for rung, samples in signals.items()}
