"""`prepare` turns manifests and folders into a cache that says what it holds."""

import csv
from pathlib import Path

import numpy as np
import pytest
import soundfile
from scipy import signal

from percepnet import cli
from percepnet.training import prepare as preparation
from percepnet.training.mixing import Mixer
from percepnet.training.prepare import (
    FULL_SCALE,
    PrepareError,
    active_rms,
    estimate_bandwidth,
    is_held_out,
    load_cache,
    prepare,
    summary,
)
from percepnet.training.rooms import DIRECT


def tone(frequency_hz: float, seconds: float, rate: int = 48_000) -> np.ndarray:
    return 0.3 * np.sin(2 * np.pi * frequency_hz * np.arange(round(seconds * rate)) / rate)


def write_csv(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    folder = tmp_path / "noise"
    folder.mkdir()
    samples = np.random.default_rng(0).normal(0, 0.1, 48_000)
    soundfile.write(folder / "hiss.wav", samples, 48_000)
    return folder


def test_a_folder_of_any_format_and_rate_becomes_48_khz_mono(tmp_path: Path, noise: Path) -> None:
    """A tone keeps its frequency and its length in seconds; the speaker is the folder's name."""
    for name, rate, kind in (
        ("a.wav", 44_100, "anna"),
        ("b.flac", 16_000, "anna"),
        ("c.ogg", 48_000, "bert"),
    ):
        (tmp_path / "voices" / kind).mkdir(parents=True, exist_ok=True)
        stereo = np.stack([tone(1000, 1.5, rate), np.zeros(round(1.5 * rate))], axis=1)
        soundfile.write(tmp_path / "voices" / kind / name, stereo, rate)
    cache = tmp_path / "cache"
    prepare(cache, speech=[tmp_path / "voices"], noise=[noise], simulated_rooms=0, progress=False)
    samples, table = load_cache(cache, "speech")
    assert samples.dtype == np.int16
    assert list(table["speaker"]) == ["voices/anna", "voices/anna", "voices/bert"]
    assert np.allclose(table["length"], 72_000, atol=2)
    for offset, length in zip(table["offset"], table["length"], strict=True):
        stored = samples[offset : offset + length].astype(float)
        spectrum = np.abs(np.fft.rfft(stored[:48_000]))
        assert np.argmax(spectrum) == 1000
        assert np.abs(stored).max() == FULL_SCALE


def test_a_manifest_cuts_its_file_and_states_bandwidth_and_split(tmp_path: Path, noise: Path) -> None:
    """Rows name stretches of one file, found beside the manifest in the folder of its name."""
    (tmp_path / "list").mkdir()
    both = np.concatenate([tone(500, 1), tone(2000, 2)])
    soundfile.write(tmp_path / "list" / "two.wav", both, 48_000)
    row = {"file": "two.wav", "source": "here", "speaker": "anna", "lang": "en", "licence": "CC0"}
    rows = [
        row | {"start_s": 0, "dur_s": 1, "bandwidth_hz": 7500, "split": "valid"},
        row | {"start_s": 1, "dur_s": 2, "bandwidth_hz": 20_000, "split": "train"},
    ]
    manifest = write_csv(tmp_path / "list.csv", rows)
    prepare(tmp_path / "cache", speech=[manifest], noise=[noise], simulated_rooms=0, progress=False)
    samples, table = load_cache(tmp_path / "cache", "speech")
    assert list(table["length"]) == [48_000, 96_000]
    assert list(table["bandwidth_hz"]) == [7500, 20_000]
    assert list(table["split"]) == ["valid", "train"]
    second = samples[table["offset"][1] :][:48_000].astype(float)
    assert np.argmax(np.abs(np.fft.rfft(second))) == 2000
    described = summary(tmp_path / "cache")["speech"]
    assert described["hours"] == round(3 / 3600, 3)
    assert described["sources"]["here"] == {"hours": 0.001, "speakers": 1, "licences": ["CC0"]}


def test_speech_loses_its_rumble_and_noise_keeps_it(tmp_path: Path) -> None:
    """What lies below a voice is not worth keeping, but a truck is worth removing."""
    for name in ("speech", "noise"):
        (tmp_path / name).mkdir()
        soundfile.write(tmp_path / name / "x.wav", tone(10, 2) + 0.5 * tone(1000, 2), 48_000)
    cache = tmp_path / "cache"
    prepare(
        cache, speech=[tmp_path / "speech"], noise=[tmp_path / "noise"], simulated_rooms=0, progress=False
    )

    def rumble_db(name: str) -> float:
        spectrum = np.abs(np.fft.rfft(load_cache(cache, name)[0][48_000:96_000].astype(float)))
        return 20 * np.log10(spectrum[10] / spectrum[1000])

    assert rumble_db("noise") == pytest.approx(6, abs=0.5)
    assert rumble_db("speech") < -15


def test_measured_rooms_are_brought_to_one_delay_and_level(tmp_path: Path, noise: Path) -> None:
    """The direct sound lies at DIRECT and the early part has unit energy."""
    (tmp_path / "rooms").mkdir()
    response = np.random.default_rng(1).normal(0, 0.02, 24_000) * np.exp(-np.arange(24_000) / 4000)
    response[:300] = 0
    response[300] = 0.8
    soundfile.write(tmp_path / "rooms" / "hall-0.wav", response, 48_000, subtype="FLOAT")
    prepare(
        tmp_path / "cache",
        speech=[noise],
        noise=[noise],
        rooms=[tmp_path / "rooms"],
        simulated_rooms=0,
        progress=False,
    )
    samples, table = load_cache(tmp_path / "cache", "rooms")
    assert list(table["room"]) == ["hall"]
    assert np.argmax(np.abs(samples)) == DIRECT
    early, late = np.sum(samples[: DIRECT + 1440] ** 2), np.sum(samples[DIRECT + 1440 :] ** 2)
    assert early == pytest.approx(1, rel=1e-3)
    assert table["clarity_db"][0] == pytest.approx(10 * np.log10(early / late), abs=0.1)


def test_bandwidth_is_where_the_recording_ends() -> None:
    """A file's rate or a cut in its spectrum limits it; a smooth decay does not."""
    rng = np.random.default_rng(2)
    white = rng.normal(0, 0.1, 96_000)
    assert estimate_bandwidth(white) == 24_000
    assert estimate_bandwidth(white, rate=16_000) == 8000
    cut = signal.oaconvolve(white, signal.firwin(501, 7500, window=("kaiser", 9.0), fs=48_000))
    assert estimate_bandwidth(cut) == pytest.approx(7500, rel=0.05)
    pink = np.fft.irfft(np.fft.rfft(white) / np.sqrt(np.arange(1, 48_002)))
    assert estimate_bandwidth(pink) == 24_000


def test_active_level_ignores_pauses() -> None:
    """Silence around speech does not lower its level."""
    voice = tone(200, 1).astype(np.float32)
    padded = np.concatenate([np.zeros(96_000), voice, np.zeros(96_000)]).astype(np.float32)
    assert active_rms(padded) == pytest.approx(0.3 / np.sqrt(2), rel=0.02)
    assert active_rms(np.zeros(48_000, np.float32)) == 0


def test_a_fixed_share_of_names_is_held_out() -> None:
    """About VALID_SHARE of many names, always the same ones."""
    held_out = [is_held_out(f"speaker {i}") for i in range(4000)]
    assert np.mean(held_out) == pytest.approx(preparation.VALID_SHARE, abs=0.015)
    assert held_out == [is_held_out(f"speaker {i}") for i in range(4000)]


def test_speakers_belong_to_one_split_unless_they_are_pillars(
    tmp_path: Path, noise: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A speaker is held out whole; of one with much of the data only some recordings are."""
    (tmp_path / "list").mkdir()
    soundfile.write(tmp_path / "list" / "all.wav", tone(300, 90), 48_000)
    rows = [
        {"file": "all.wav", "start_s": 0.3 * i, "dur_s": 0.3, "speaker": "many" if i % 2 else f"few-{i // 4}"}
        for i in range(300)
    ]
    manifest = write_csv(tmp_path / "list.csv", rows)
    monkeypatch.setattr(preparation, "PILLAR_SECONDS", 10.0)
    prepare(tmp_path / "cache", speech=[manifest], noise=[noise], simulated_rooms=0, progress=False)
    _, table = load_cache(tmp_path / "cache", "speech")
    splits = {name: set(table["split"][table["speaker"] == name]) for name in set(table["speaker"])}
    assert splits.pop("many") == {"train", "valid"}
    assert all(len(split) == 1 for split in splits.values())
    assert {"train"} in splits.values()
    assert {"valid"} in splits.values()


def test_few_recordings_leave_some_for_validation(tmp_path: Path, noise: Path) -> None:
    """Whatever the hash says of their names; what is in a single recording can't be divided."""
    for i in range(3):
        (tmp_path / f"speaker {i}").mkdir()
        soundfile.write(tmp_path / f"speaker {i}" / "a.wav", tone(300 + i, 2), 48_000)
    folders = [tmp_path / f"speaker {i}" for i in range(3)]
    prepare(tmp_path / "cache", speech=folders, noise=[noise], simulated_rooms=0, progress=False)
    assert sorted(load_cache(tmp_path / "cache", "speech")[1]["split"]) == ["train", "train", "valid"]
    with pytest.raises(PrepareError, match="no usable speech for the split 'valid'"):
        Mixer(tmp_path / "cache", split="valid")  # pure tones: no pauses, and so a loud floor


@pytest.mark.parametrize("damage", ["missing", "empty folder", "not audio", "no file column"])
def test_unusable_sources_are_refused(tmp_path: Path, noise: Path, damage: str) -> None:
    """One declared error, that names the source."""
    source = tmp_path / "source"
    if damage == "empty folder":
        source.mkdir()
    elif damage == "not audio":
        source.mkdir()
        (source / "a.wav").write_bytes(b"nothing of the kind")
    elif damage == "no file column":
        source.write_text("name\nx.wav\n")
    with pytest.raises(PrepareError, match="source"):
        prepare(tmp_path / "cache", speech=[source], noise=[noise], simulated_rooms=0, progress=False)
    with pytest.raises(PrepareError, match="no finished cache"):
        load_cache(tmp_path / "cache", "speech")


def test_the_command_says_what_it_wrote_or_why_not(
    tmp_path: Path, noise: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line for each part, or exit status 1 and one line that names the source."""
    arguments = [
        "prepare",
        str(tmp_path / "cache"),
        "--noise",
        str(noise),
        "--simulated-rooms",
        "0",
        "--speech",
    ]
    assert cli.main([*arguments, str(noise)]) == 0
    assert load_cache(tmp_path / "cache", "noise")[1]["category"][0] == "noise"
    assert "noise: 0.00 h in 1 recordings" in capsys.readouterr().out
    assert cli.main([*arguments, str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err


def test_simulated_rooms_repeat_and_decay() -> None:
    """Seed and index determine a room; the direct sound comes first and what follows dies away."""
    pytest.importorskip("pyroomacoustics")
    from percepnet.training.rooms import simulate_rooms

    rooms = list(simulate_rooms(3, seed=4, positions=2))
    again = list(simulate_rooms(2, seed=4, positions=2))
    assert np.array_equal(rooms[1].responses[0], again[1].responses[0])
    for room in rooms:
        talker = room.responses[0].astype(np.float64)
        assert np.argmax(np.abs(talker[: DIRECT + 20])) == DIRECT
        assert np.abs(talker[: DIRECT - 41]).max() < 1e-2 * np.abs(talker).max()
        remaining_db = 10 * np.log10(np.cumsum(talker[::-1] ** 2)[::-1] / np.sum(talker**2))
        fall_s = (np.argmax(remaining_db < -35) - np.argmax(remaining_db < -15)) / 48_000
        assert fall_s * 3 == pytest.approx(room.rt60_s, rel=0.5)
