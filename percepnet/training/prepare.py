"""Decode speech, noise and room responses once into a cache that training maps into memory.

A cache is a folder of three pairs: `speech`, `noise` and `rooms`, each with samples one after another
(`.i16` or `.f32`, 48 kHz mono) and a table (`.csv`) with a row per recording.
"""

import argparse
import csv
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from scipy import signal
from tqdm import tqdm

from percepnet.constants import SAMPLE_RATE
from percepnet.errors import PercepNetError
from percepnet.training.rooms import DIRECT, simulate_rooms, trimmed

FORMAT = 1
FULL_SCALE = 32_000
"""Each recording's peak in the int16 files, so that quiet sources keep their resolution."""

EARLY = SAMPLE_RATE * 30 // 1000
"""Samples after the direct sound that count as early, for a response's level and clarity."""

VALID_SHARE = 0.06
"""Share of the speakers, kinds of noise and rooms that is held out for validation."""

PILLAR_SECONDS = 600.0
"""A speaker or kind of noise with more than this is too much to hold out: a share of its recordings is."""

_AUDIO = {".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".oga"}
_MIN_SECONDS = 0.2
_LONGEST_RESPONSE = 2 * SAMPLE_RATE
_HIGH_PASS = signal.butter(2, 40.0, "highpass", fs=SAMPLE_RATE, output="sos")

Table = dict[str, np.ndarray]


class PrepareError(PercepNetError):
    """A manifest, a folder or a cache that cannot be used."""


def prepare(
    cache: Path,
    *,
    speech: Sequence[Path],
    noise: Sequence[Path],
    rooms: Sequence[Path] = (),
    simulated_rooms: int = 350,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Decode, resample to 48 kHz mono, measure and split everything that training mixes.

    Parameters:
        cache: folder to write; made if missing.
        speech, noise, rooms: manifests (CSV with at least a column `file`, relative to the folder named
            like the manifest or to the manifest's own) or folders, searched for audio files. A folder's
            file belongs to the speaker, or kind of noise, that its own folder is named after. A manifest's
            column `split` (`train` or `valid`), where it has a value, stands; else a hash decides.
        simulated_rooms: how many rooms to simulate on top of the measured ones.
        seed: of the simulated rooms.
        progress: show progress bars.
    Errors: PrepareError for a manifest or folder without usable audio.
    """
    cache.mkdir(parents=True, exist_ok=True)
    (cache / "cache.json").unlink(missing_ok=True)
    _write_recordings(cache, "speech", _read_sources(speech, "speaker"), progress)
    _write_recordings(cache, "noise", _read_sources(noise, "category"), progress)
    _write_rooms(cache, _read_sources(rooms, "room"), simulated_rooms, seed, progress)
    description = {"format": FORMAT, "sample_rate": SAMPLE_RATE, "room_seed": seed}
    (cache / "cache.json").write_text(json.dumps(description) + "\n")


def load_cache(cache: Path, name: str) -> tuple[np.ndarray, Table]:
    """Map one part of a cache.

    Parameters:
        cache: folder that `prepare` has written.
        name: `speech`, `noise` or `rooms`.
    Returns: samples (n,), int16 or float32, read-only; the table as columns.
    Errors: PrepareError for a folder that holds no finished cache of this version.
    """
    try:
        version = json.loads((cache / "cache.json").read_text())["format"]
    except (OSError, ValueError, KeyError) as error:
        raise PrepareError(f"{cache} holds no finished cache: run `prepare` first") from error
    if version != FORMAT:
        raise PrepareError(f"{cache} has format {version}, this version reads {FORMAT}: prepare it again")
    dtype, suffix = (np.float32, "f32") if name == "rooms" else (np.int16, "i16")
    table = _read_table(cache / f"{name}.csv")
    if not table:
        return np.empty(0, dtype), table
    return np.memmap(cache / f"{name}.{suffix}", dtype=dtype, mode="r"), table


def summary(cache: Path) -> dict[str, Any]:
    """Describe a cache for a model card.

    Returns: per part hours, counts, and for each source its hours, kinds or speakers, and licences.
    """
    result: dict[str, Any] = {}
    for name, kind, plural in (
        ("speech", "speaker", "speakers"),
        ("noise", "category", "kinds"),
        ("rooms", "room", "rooms"),
    ):
        _, table = load_cache(cache, name)
        if not table:
            continue
        sources = {}
        for source in sorted(set(table["source"])):
            chosen = table["source"] == source
            sources[str(source)] = {
                "hours": round(float(table["length"][chosen].sum()) / SAMPLE_RATE / 3600, 3),
                plural: len(set(table[kind][chosen])),
                "licences": sorted({str(licence) for licence in table["licence"][chosen]}),
            }
        full_band = table["bandwidth_hz"] >= 16_000
        result[name] = {
            "hours": round(float(table["length"].sum()) / SAMPLE_RATE / 3600, 3),
            "full_band_hours": round(float(table["length"][full_band].sum()) / SAMPLE_RATE / 3600, 3),
            "recordings": len(table["length"]),
            plural: len(set(table[kind])),
            "sources": sources,
        }
    return result


def active_rms(samples: np.ndarray) -> float:
    """RMS over the 20 ms frames that are active, after ITU-T P.56's margin of 15.9 dB.

    Parameters:
        samples: (n,) float.
    Returns: RMS in the samples' unit; 0 for silence.
    """
    frame = SAMPLE_RATE // 50
    count = max(len(samples) // frame, 1)
    whole = samples[: count * frame]
    energies = np.square(whole, dtype=np.float64).reshape(count, -1).mean(axis=1)
    level = float(energies.mean())
    for _ in range(4):
        active = energies[energies > level * 10**-1.59]
        if not active.size:
            break
        level = float(active.mean())
    return level**0.5


def estimate_bandwidth(samples: np.ndarray, rate: int = SAMPLE_RATE) -> float:
    """Frequency in Hz above which a recording says nothing about its source.

    It is the lowest one (from 3 kHz on) above which the long-term spectrum stays 20 dB below the octave
    underneath, which no voice or noise falls by unless something cut it off.

    Parameters:
        samples: (n,) float at 48 kHz.
        rate: rate in Hz at which it was recorded; half of it is the most that is returned.
    """
    nyquist = min(rate, SAMPLE_RATE) / 2
    if len(samples) < 2048 or not np.any(samples):
        return nyquist
    frequencies, power = signal.welch(samples, SAMPLE_RATE, nperseg=2048)
    level_db = 10 * np.log10(power + power.max() * 1e-12)
    # The loudest 200 Hz of all that follows, less sensitive to a single tone than its maximum.
    rest_db = np.maximum.accumulate(signal.medfilt(level_db, 9)[::-1])[::-1]
    for bin_, frequency in enumerate(frequencies):
        if 3000 <= frequency < 0.95 * nyquist:
            below = np.median(level_db[bin_ // 2 : bin_ + 1])
            if rest_db[bin_] < below - 20:
                return float(frequency)
    return nyquist


def _read_sources(paths: Sequence[Path], kind: str) -> list[dict[str, str]]:
    """One row per recording: the manifest's columns, `path`, and `kind` filled in."""
    rows: list[dict[str, str]] = []
    for path in paths:
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _AUDIO)
            found = [
                {"path": str(file), kind: "/".join(file.relative_to(path.parent).parent.parts)}
                for file in files
            ]
            source = path.name
        elif path.is_file():
            with path.open(newline="") as stream:
                found = list(csv.DictReader(stream))
            for row in found:
                if not row.get("file"):
                    raise PrepareError(f"{path} needs a column `file` with a value in every row")
                folder = path.with_suffix("")
                row["path"] = str((folder if folder.is_dir() else path.parent) / row["file"])
            source = path.stem
        else:
            raise PrepareError(f"{path} is neither a manifest nor a folder")
        if not found:
            raise PrepareError(f"{path} names no audio")
        for row in found:
            row["source"] = row.get("source") or source
            row[kind] = row.get(kind) or Path(row["path"]).stem
        rows += found
    return rows


def _decode(path: str) -> tuple[np.ndarray, int]:
    """First channel at 48 kHz, float32, and the rate it came in."""
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (OSError, soundfile.LibsndfileError) as error:
        raise PrepareError(f"{path} cannot be decoded: {error}") from error
    mono = samples[:, 0]
    if rate != SAMPLE_RATE:
        ratio = Fraction(SAMPLE_RATE, rate)
        mono = signal.resample_poly(mono, ratio.numerator, ratio.denominator).astype(np.float32)
    return mono, rate


def _recordings(
    rows: list[dict[str, str]], description: str, progress: bool
) -> Iterator[tuple[dict[str, str], np.ndarray, int]]:
    """Each row with its samples at 48 kHz and the file's rate; every file is decoded once."""
    by_file = defaultdict(list)
    for row in rows:
        by_file[row["path"]].append(row)
    bar = tqdm(by_file.items(), desc=description, unit="file", disable=not progress)
    for path, members in bar:
        samples, rate = _decode(path)
        for row in members:
            start = round(float(row.get("start_s") or 0) * SAMPLE_RATE)
            length = round(float(row["dur_s"]) * SAMPLE_RATE) if row.get("dur_s") else len(samples)
            yield row, samples[start : start + length], rate


def _write_recordings(cache: Path, name: str, rows: list[dict[str, str]], progress: bool) -> None:
    """Write speech or noise: int16 samples and their table."""
    kind = "speaker" if name == "speech" else "category"
    table: list[dict[str, Any]] = []
    recordings: list[str] = []
    offset = 0
    with (cache / f"{name}.i16").open("wb") as output:
        for row, samples, rate in _recordings(rows, name, progress):
            if name == "speech":
                # What lies below a voice is rumble of the recording, not something to be kept.
                samples = signal.sosfilt(_HIGH_PASS, samples).astype(np.float32)
            peak = float(np.abs(samples).max(initial=0.0))
            if len(samples) < _MIN_SECONDS * SAMPLE_RATE or not np.isfinite(peak) or peak < 1e-4:
                continue
            samples = samples / peak
            output.write(np.round(samples * FULL_SCALE).astype("<i2").tobytes())
            bandwidth = float(row.get("bandwidth_hz") or 0) or estimate_bandwidth(samples, rate)
            table.append(
                {
                    "offset": offset,
                    "length": len(samples),
                    kind: row[kind],
                    "lang": row.get("lang", ""),
                    "source": row["source"],
                    "licence": row.get("licence", ""),
                    "bandwidth_hz": round(bandwidth),
                    "active_rms": f"{active_rms(samples):.6g}",
                    "floor_db": f"{_floor_db(samples):.1f}",
                    "split": row.get("split") or "",
                }
            )
            recordings.append(f"{Path(row['path']).name}@{float(row.get('start_s') or 0)}")
            offset += len(samples)
    if not table:
        raise PrepareError(f"no usable {name}")
    seconds: dict[str, float] = defaultdict(float)
    for entry in table:
        seconds[entry[kind]] += entry["length"] / SAMPLE_RATE
    alone = len(seconds) == 1
    names = [
        recording if alone or seconds[entry[kind]] > PILLAR_SECONDS else entry[kind]
        for entry, recording in zip(table, recordings, strict=True)
    ]
    held_out = _held_out({name for name, entry in zip(names, table, strict=True) if not entry["split"]})
    for entry, part in zip(table, names, strict=True):
        entry["split"] = entry["split"] or ("valid" if part in held_out else "train")
    _write_table(cache / f"{name}.csv", table)


def _write_rooms(cache: Path, rows: list[dict[str, str]], simulated: int, seed: int, progress: bool) -> None:
    """Write room responses: float32 samples of unit energy in the early part, and their table."""
    table: list[dict[str, Any]] = []
    offset = 0
    with (cache / "rooms.f32").open("wb") as output:

        def add(response: np.ndarray, **columns: Any) -> None:
            nonlocal offset
            energy = response.astype(np.float64) ** 2
            early, late = energy[: DIRECT + EARLY].sum(), energy[DIRECT + EARLY :].sum()
            response = response / np.sqrt(early)
            output.write(response.astype("<f4").tobytes())
            columns["clarity_db"] = f"{10 * np.log10(early / max(late, 1e-6 * early)):.1f}"
            split = "valid" if is_held_out(columns["room"]) else "train"
            table.append({"offset": offset, "length": len(response), **columns, "split": split})
            offset += len(response)

        for row, samples, rate in _recordings(rows, "measured rooms", progress):
            # One recording campaign is one room: NAME-0, NAME-1, ... are its places.
            room = Path(row["path"]).stem.rpartition("-")[0] or row["room"]
            wide = row.get("fullband", "yes") == "yes"
            add(
                trimmed(_aligned(samples)[:_LONGEST_RESPONSE]),
                room=room,
                measured=1,
                source=row["source"],
                licence=row.get("licence", ""),
                bandwidth_hz=rate // 2 if wide else round(estimate_bandwidth(samples, rate)),
                rt60_s=row.get("rt60_s") or "",
                distance_m="",
            )
        bar = tqdm(
            simulate_rooms(simulated, seed),
            total=simulated,
            desc="simulated rooms",
            unit="room",
            disable=not progress,
        )
        for index, room in enumerate(bar):
            for response, distance in zip(room.responses, room.distances_m, strict=True):
                add(
                    response,
                    room=f"simulated-{seed}-{index}",
                    measured=0,
                    source="simulated",
                    licence="",
                    bandwidth_hz=SAMPLE_RATE // 2,
                    rt60_s=f"{room.rt60_s:.3f}",
                    distance_m=f"{distance:.2f}",
                )
    _write_table(cache / "rooms.csv", table)


def _aligned(response: np.ndarray) -> np.ndarray:
    """Move the direct sound, the first peak within 10 dB of the highest, to DIRECT."""
    magnitude = np.abs(response)
    first = int(np.argmax(magnitude > magnitude.max() * 10**-0.5))
    peak = first + int(np.argmax(magnitude[first : first + 24]))
    return np.pad(response, (max(DIRECT - peak, 0), 0))[max(peak - DIRECT, 0) :]


def _floor_db(samples: np.ndarray) -> float:
    """Level of the quietest 3 % of the 20 ms frames against the active level, in dB.

    Even tightly cut utterances have so much of a pause between or within words.
    """
    frame = SAMPLE_RATE // 50
    count = len(samples) // frame
    energies = np.square(samples[: count * frame], dtype=np.float64).reshape(count, -1).mean(axis=1)
    quiet = np.quantile(energies, 0.03)
    return float(10 * np.log10(max(quiet, 1e-12) / max(active_rms(samples) ** 2, 1e-12)))


def _hash(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32


def is_held_out(name: str) -> bool:
    """Whether what has this name is for validation: a fixed hash decides, so that larger caches agree."""
    return _hash(name) < VALID_SHARE


def _held_out(names: set[str]) -> set[str]:
    """Of these names the ones for validation: of several at least one, but never all."""
    ordered = sorted(names, key=_hash)
    count = sum(map(is_held_out, names))
    return set(ordered[: min(max(count, 1), len(ordered) - 1)]) if ordered else set()


def _write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]) if rows else ["offset"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _read_table(path: Path) -> Table:
    """Columns of a table, numbers where they are numbers (empty: NaN); nothing for one without rows."""
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    integers = {"offset", "length", "measured"}
    reals = {"bandwidth_hz", "active_rms", "floor_db", "rt60_s", "distance_m", "clarity_db"}
    table = {}
    for name in rows[0] if rows else ():
        values = [row[name] for row in rows]
        if name in integers:
            table[name] = np.array(values, dtype=np.int64)
        elif name in reals:
            table[name] = np.array([value or "nan" for value in values], dtype=np.float64)
        else:
            table[name] = np.array(values)
    return table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `percepnet prepare`."""
    parser.add_argument("cache", type=Path, help="folder to write")
    sources = "manifests (CSV) or folders of audio"
    parser.add_argument("--speech", type=Path, nargs="+", required=True, metavar="PATH", help=sources)
    parser.add_argument("--noise", type=Path, nargs="+", required=True, metavar="PATH", help=sources)
    parser.add_argument(
        "--rooms", type=Path, nargs="*", default=[], metavar="PATH", help=f"{sources}: measured responses"
    )
    parser.add_argument("--simulated-rooms", type=int, default=350, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the simulated rooms (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Prepare a cache and print what it holds; returns the exit code."""
    prepare(
        arguments.cache,
        speech=arguments.speech,
        noise=arguments.noise,
        rooms=arguments.rooms,
        simulated_rooms=arguments.simulated_rooms,
        seed=arguments.seed,
    )
    for name, part in summary(arguments.cache).items():
        print(
            f"{name}: {part['hours']:.2f} h in {part['recordings']} recordings, "
            f"{part['full_band_hours']:.2f} h of it full band"
        )
    return 0
