"""Simulated rooms: image sources for the early part, decaying band noise for the late part."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import fft

from percepnet.constants import SAMPLE_RATE

DIRECT = 48
"""Sample at which the direct sound of every stored response lies."""

SPEED_OF_SOUND = 343.0
_BANDS_HZ = np.array([125.0, 250.0, 500.0, 1000.0, 2000.0, 4000.0, 8000.0, 16000.0])
# Energy that air takes per metre at 20 °C and 50 % humidity in these bands (ISO 9613-1).
_AIR_PER_METRE = np.array([1e-4, 3e-4, 6e-4, 1.1e-3, 2.3e-3, 7e-3, 2.4e-2, 7e-2])
_IMAGE_ORDER = 12
_MATCH_SAMPLES = SAMPLE_RATE // 50


@dataclass(frozen=True)
class Room:
    """One simulated room: its responses share the microphone, the first is meant for the talker."""

    responses: list[np.ndarray]  # each (samples,) float32, direct sound at DIRECT
    distances_m: list[float]
    rt60_s: float  # at 1 kHz


def simulate_rooms(count: int, seed: int, *, positions: int = 4) -> Iterator[Room]:
    """Simulate shoebox rooms of varied size, absorption and source distance.

    Parameters:
        count: number of rooms.
        seed: room i depends on (seed, i) alone.
        positions: sources per room; the first is 0.3–3 m from the microphone, the others anywhere.
    Yields: Room.
    """
    for index in range(count):
        yield _simulate(np.random.default_rng([seed, index]), positions)


def _simulate(rng: np.random.Generator, positions: int) -> Room:
    import pyroomacoustics as pra

    # From a phone booth to a hall; rooms are mostly longer than wide and wider than high.
    size = np.array([np.exp(rng.uniform(np.log(2.0), np.log(12.0))), 0.0, rng.uniform(2.2, 4.0)])
    size[1] = size[0] * rng.uniform(0.6, 1.0)
    volume, surface = np.prod(size), 2 * (size[0] * size[1] + size[1] * size[2] + size[0] * size[2])
    target_rt60 = np.exp(rng.uniform(np.log(0.15), np.log(1.3)))
    mean_absorption = 1 - np.exp(-0.161 * volume / (surface * target_rt60))
    # Furnished rooms absorb highs more than lows; bare ones the other way round.
    tilt = rng.uniform(-0.1, 0.25) * np.linspace(-1, 1, 7) + rng.normal(0, 0.08, 7)
    walls = {}
    per_wall = []
    for name in ("east", "west", "north", "south", "ceiling", "floor"):
        absorption = np.clip(mean_absorption * (1 + tilt) * np.exp(rng.normal(0, 0.35)), 0.02, 0.95)
        per_wall.append(absorption)
        walls[name] = pra.Material(
            {"description": name, "coeffs": list(absorption), "center_freqs": list(_BANDS_HZ[:7])},
            rng.uniform(0.05, 0.3),
        )
    room = pra.ShoeBox(size, fs=SAMPLE_RATE, materials=walls, max_order=_IMAGE_ORDER, air_absorption=True)
    microphone = _inside(rng, size)
    sources = [_near(rng, size, microphone)] + [_inside(rng, size) for _ in range(positions - 1)]
    room.add_microphone(microphone)
    for source in sources:
        room.add_source(source)
    room.compute_rir()

    area = np.array([size[1] * size[2]] * 2 + [size[0] * size[2]] * 2 + [size[0] * size[1]] * 2)
    absorption = (area[:, None] * np.array(per_wall)).sum(0) / area.sum()
    absorption = np.append(absorption, absorption[-1])
    # Eyring's formula with the absorption of air.
    rt60 = 0.161 * volume / (-surface * np.log1p(-absorption) + 4 * _AIR_PER_METRE * volume)

    # Every reflection path shorter than this is among the images.
    complete_s = _IMAGE_ORDER * size.min() / SPEED_OF_SOUND
    distances = [float(np.linalg.norm(source - microphone)) for source in sources]
    responses = []
    for rir, distance in zip(room.rir[0], distances, strict=True):
        early = np.asarray(rir, dtype=np.float64)
        # The fractional-delay filters of the images put the direct sound half their length late.
        direct = round(distance / SPEED_OF_SOUND * SAMPLE_RATE) + pra.constants.get("frac_delay_length") // 2
        early = np.pad(early, (DIRECT, 0))[direct:]
        mixing = min(int(0.8 * complete_s * SAMPLE_RATE), len(early) - 1)
        responses.append(_with_late_part(rng, early, mixing, rt60))
    return Room(responses, distances, float(rt60[3]))


def _inside(rng: np.random.Generator, size: np.ndarray) -> np.ndarray:
    return np.append(rng.uniform(0.3, size[:2] - 0.3), rng.uniform(0.6, min(2.0, size[2] - 0.3)))


def _near(rng: np.random.Generator, size: np.ndarray, microphone: np.ndarray) -> np.ndarray:
    """A talker's place, most often within arm's reach of the microphone."""
    while True:
        distance, azimuth = np.exp(rng.uniform(np.log(0.3), np.log(3.0))), rng.uniform(0, 2 * np.pi)
        place = microphone + distance * np.array([np.cos(azimuth), np.sin(azimuth), rng.uniform(-0.3, 0.3)])
        if (place > 0.2).all() and (place < size - 0.2).all():
            return place


def _with_late_part(rng: np.random.Generator, early: np.ndarray, mixing: int, rt60: np.ndarray) -> np.ndarray:
    """Replace what follows the mixing time by noise that decays with each band's RT60."""
    mixing = max(mixing, DIRECT + _MATCH_SAMPLES)
    n = fft.next_fast_len(mixing + int(1.1 * rt60.max() * SAMPLE_RATE) + SAMPLE_RATE // 50, real=True)
    time = (np.arange(n) - mixing) / SAMPLE_RATE
    bins = fft.rfftfreq(n, 1 / SAMPLE_RATE)
    position = np.interp(np.log2(np.maximum(bins, 20.0)), np.log2(_BANDS_HZ), np.arange(len(_BANDS_HZ)))
    noise = fft.rfft(rng.standard_normal(n))
    spectrum = fft.rfft(early[:n], n)
    window = slice(mixing - _MATCH_SAMPLES, mixing)
    late = np.zeros(n)
    for band, decay in enumerate(rt60):
        weight = np.clip(1 - np.abs(position - band), 0, None)
        tail = fft.irfft(weight * noise, n) * 10 ** (-3 * np.maximum(time, -0.1) / decay)
        reference = fft.irfft(weight * spectrum, n)
        # Past the mixing time the image sources have thinned out: match the last stretch that is complete.
        late += tail * np.sqrt(np.sum(reference[window] ** 2) / np.sum(tail[window] ** 2))
    fade = np.clip((np.arange(n) - window.start) / _MATCH_SAMPLES, 0, 1)
    head = np.zeros(n)
    head[: min(n, len(early))] = early[:n]
    response = np.sqrt(1 - fade) * head + np.sqrt(fade) * late
    end = mixing + int(rt60.max() * SAMPLE_RATE)
    response[end:] = 0
    response[end - 480 : end] *= np.linspace(1, 0, 480)
    return trimmed(response)


def trimmed(response: np.ndarray, floor_db: float = -60.0) -> np.ndarray:
    """Cut a response (samples,) where the energy still to come falls below `floor_db` of the whole."""
    remaining = np.cumsum(np.square(response[::-1], dtype=np.float64))[::-1]
    length = int(np.count_nonzero(remaining > remaining[0] * 10 ** (floor_db / 10)))
    return response[: max(length, DIRECT + 1)].astype(np.float32)
