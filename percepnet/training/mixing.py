"""Noisy speech and its clean target, drawn on the fly from a cache: a pure function of seed and index."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import fft, signal

from percepnet.constants import SAMPLE_RATE
from percepnet.errors import ParameterError
from percepnet.training.prepare import FULL_SCALE, PrepareError, active_rms, load_cache
from percepnet.training.rooms import DIRECT

_SPEED_STEPS = 50
"""Speed changes are multiples of one in this, which keeps the resampling filters few and short."""

_FADE = SAMPLE_RATE // 100


@dataclass(frozen=True)
class MixingConfig:
    """What mixtures look like. Shares are probabilities; ranges are (lowest, highest)."""

    # Speech active level against noise active level, a clipped normal distribution.
    snr_mean_db: float = 7.0
    snr_std_db: float = 9.0
    snr_range_db: tuple[float, float] = (-10.0, 40.0)
    # Speech active level, dB below full scale.
    level_mean_db: float = -26.0
    level_std_db: float = 8.0
    level_range_db: tuple[float, float] = (-48.0, -8.0)
    clean_share: float = 0.1  # nothing added at all: the target is the input
    absent_share: float = 0.15  # nobody speaks: the target is silence
    absent_level_range_db: tuple[float, float] = (-65.0, -12.0)  # of the noise then, below full scale
    late_share: float = 0.2  # speech starts within the first 60 % of the segment, not before it
    full_band_share: float = 0.5  # speech recorded with at least 16 kHz of bandwidth
    # Recordings whose pauses are louder than this against the speech would teach to keep noise.
    floor_max_db: float = -33.0
    # Speakers and kinds of noise are drawn with a probability ∝ duration^exponent: 0 is one share for each.
    speaker_exponent: float = 0.7
    kind_exponent: float = 0.5
    speed_share: float = 0.5
    speed_range: float = 0.12  # as a fraction of the speed; pitch follows
    colour_share: float = 0.6  # random equalization, of speech and of each noise
    noises: tuple[float, ...] = (0.55, 0.3, 0.15)  # probabilities of 1, 2, 3 noises at once
    noise_spread_db: float = 10.0  # further noises are up to this much weaker than the first
    synthetic_share: float = 0.13  # of noises…
    absent_synthetic_share: float = 0.6  # …and where nobody speaks
    babble_share: float = 0.08  # of noises
    babble_talkers: tuple[int, int] = (3, 8)
    babble_snr_min_db: float = 0.0  # below it nobody can tell who is meant
    # Recordings of noise are few beside what callers hear: play them faster, slower, backwards.
    noise_speed_share: float = 0.5
    noise_speed_range: float = 0.4  # as a fraction of the speed
    noise_reverse_share: float = 0.2
    switch_share: float = 0.15  # noises that come or go within the segment
    reverb_share: float = 0.5
    simulated_room_share: float = 0.65
    clarity_min_db: float = -5.0  # early against late energy; below it lies a church's far end
    noise_in_room_share: float = 0.5  # noises heard through the talker's simulated room
    early_ms: float = 30.0  # of the room's response, after the direct sound, that the target keeps
    band_limit_share: float = 0.2
    # Most recordings of speech end at 8 kHz: without such noise, that alone would be taken for speech.
    absent_band_limit_share: float = 0.7
    microphone_share: float = 0.5  # low stationary noise of the microphone itself
    microphone_range_db: tuple[float, float] = (-90.0, -45.0)  # below full scale
    offset_share: float = 0.03  # a constant offset, as of a bad sound card
    clip_share: float = 0.05
    clip_range: tuple[float, float] = (0.3, 0.85)  # of the mixture's peak


@dataclass(frozen=True)
class Mixture:
    """A training example."""

    noisy: np.ndarray  # (samples,) float32, full scale ±1
    clean: np.ndarray  # (samples,) float32, in sync with `noisy`
    bandwidth_hz: float  # the target says nothing above
    snr_db: float  # infinite where nothing was added, minus infinite where nobody speaks
    level_db: float  # active level of the target against full scale
    reverberant: bool
    clipped: bool
    noises: tuple[str, ...]  # kinds


class Mixer:
    """Draws mixtures from a cache that `prepare` has written; safe to share between processes."""

    def __init__(
        self, cache: Path, split: str = "train", seed: int = 0, config: MixingConfig | None = None
    ) -> None:
        """Map the cache.

        Parameters:
            cache: folder that `prepare` has written.
            split: `train` or `valid`: disjoint speakers, kinds of noise and rooms.
            seed: with a mixture's index it determines the mixture.
        Errors: PrepareError for an unusable cache; ParameterError for another split.
        """
        if split not in ("train", "valid"):
            raise ParameterError(f"split is {split!r}, must be 'train' or 'valid'")
        self.config = config or MixingConfig()
        self._seed = (seed, int(split == "valid"))
        self._speech_samples, speech = load_cache(cache, "speech")
        usable = (speech["split"] == split) & (speech["floor_db"] <= self.config.floor_max_db)
        self._speech = {name: column[usable] for name, column in speech.items()}
        self._noise_samples, noise = load_cache(cache, "noise")
        self._noise = {name: column[noise["split"] == split] for name, column in noise.items()}
        for name, table in (("speech", self._speech), ("noise", self._noise)):
            if not len(table["length"]):
                raise PrepareError(f"the cache {cache} holds no usable {name} for the split {split!r}")
        self._response_samples, rooms = load_cache(cache, "rooms")
        if rooms:
            usable = (rooms["split"] == split) & (rooms["clarity_db"] >= self.config.clarity_min_db)
        self._responses = {name: column[usable] for name, column in rooms.items()}

        wide = self._speech["bandwidth_hz"] >= 16_000
        self._speakers = {
            band: _Groups(
                self._speech["speaker"], self._speech["length"], chosen, self.config.speaker_exponent
            )
            for band, chosen in (("wide", wide), ("narrow", ~wide))
            if chosen.any()
        }
        everything = np.ones(len(self._noise["length"]), dtype=bool)
        self._kinds = _Groups(
            self._noise["category"], self._noise["length"], everything, self.config.kind_exponent
        )
        self._rooms = {
            measured: _Groups(self._responses["room"], self._responses["length"], chosen, 0.0)
            for measured in (False, True)
            if self._responses and (chosen := self._responses["measured"] == measured).any()
        }

    def mixtures(self, first_index: int, count: int, seconds: float) -> list[Mixture]:
        """Mixtures of consecutive indices, see `mixture`."""
        return [self.mixture(first_index + i, seconds) for i in range(count)]

    def mixture(self, index: int, seconds: float) -> Mixture:
        """Draw one mixture.

        Parameters:
            index: any number ≥ 0.
            seconds: length of the segment.
        Returns: the same mixture for the same cache, seed, index and length.
        """
        config = self.config
        rng = np.random.default_rng([*self._seed, index])
        n = round(seconds * SAMPLE_RATE)
        kind = rng.random()
        pure, absent = kind < config.clean_share, kind > 1 - config.absent_share
        snr_db = float(np.clip(rng.normal(config.snr_mean_db, config.snr_std_db), *config.snr_range_db))
        level_db = float(
            np.clip(rng.normal(config.level_mean_db, config.level_std_db), *config.level_range_db)
        )

        room = self._draw_room(rng) if not pure and rng.random() < config.reverb_share else None
        if absent:
            level_db, snr_db = float(rng.uniform(*config.absent_level_range_db)), 0.0
            speech = clean = np.zeros(n, dtype=np.float32)
            bandwidth = SAMPLE_RATE / 2
        else:
            speech, bandwidth = self._passage(rng, n, allow_late=True)
            if rng.random() < config.colour_share:
                speech = _coloured(rng, speech)
            clean = speech
            if room is not None:
                early, _ = np.split(room.talker, [DIRECT + round(config.early_ms * SAMPLE_RATE / 1000)])
                fade = np.sin(np.linspace(np.pi / 2, 0, _FADE // 2, dtype=np.float32)) ** 2
                early[-len(fade) :] *= fade[-len(early) :]
                speech, clean = _convolved(speech, [room.talker, early])
                bandwidth = min(bandwidth, room.bandwidth_hz)
            gain = 10 ** (level_db / 20) / max(active_rms(clean), 1e-6)
            speech, clean = speech * np.float32(gain), clean * np.float32(gain)

        noisy: np.ndarray = speech
        noises: tuple[str, ...] = ()
        clipped = False
        if not pure:
            noise, noises = self._noise_mixture(rng, n, room, absent=absent)
            if "babble" in noises:
                snr_db = max(snr_db, config.babble_snr_min_db)
            noisy = speech + noise * np.float32(10 ** ((level_db - snr_db) / 20))
            if rng.random() < config.microphone_share:
                noisy += _microphone_noise(rng, n, 10 ** (rng.uniform(*config.microphone_range_db) / 20))
            if rng.random() < config.offset_share:
                noisy = noisy + np.float32(rng.choice([-1, 1]) * 10 ** rng.uniform(-4, -2))
            clipped = bool(rng.random() < config.clip_share)
            if clipped:
                limit = np.abs(noisy).max() * rng.uniform(*config.clip_range)
                noisy = np.clip(noisy, -limit, limit)
        if rng.random() < (config.absent_band_limit_share if absent else config.band_limit_share):
            low, high = _draw_band(rng)
            noisy, clean = _band_limited(noisy, low, high), clean if pure else _band_limited(clean, low, high)
            bandwidth = min(bandwidth, high)
        if pure:
            clean = noisy
        peak = float(np.abs(noisy).max())
        peak = max(peak, float(np.abs(clean).max()))
        if peak > 0.98:
            noisy, clean = noisy * np.float32(0.98 / peak), clean * np.float32(0.98 / peak)
            level_db += 20 * np.log10(0.98 / peak)
        return Mixture(
            noisy=np.ascontiguousarray(noisy, dtype=np.float32),
            clean=np.ascontiguousarray(clean, dtype=np.float32),
            bandwidth_hz=float(bandwidth),
            snr_db=np.inf if pure else -np.inf if absent else snr_db,
            level_db=-np.inf if absent else level_db,
            reverberant=room is not None and not absent,
            clipped=clipped,
            noises=noises,
        )

    def _passage(self, rng: np.random.Generator, n: int, *, allow_late: bool) -> tuple[np.ndarray, float]:
        """n samples of one talker at an active level of about one, and their bandwidth in Hz."""
        wide = rng.random() < self.config.full_band_share
        band = ("wide" if wide else "narrow") if len(self._speakers) == 2 else next(iter(self._speakers))
        rows = self._speakers[band].draw(rng)
        speed = _SPEED_STEPS
        if rng.random() < self.config.speed_share:
            widest = round(self.config.speed_range * _SPEED_STEPS)
            speed += int(rng.integers(-widest, widest + 1))
        passage = np.zeros(n, dtype=np.float32)
        bandwidth = SAMPLE_RATE / 2
        late = allow_late and rng.random() < self.config.late_share
        position = int(rng.uniform(0, 0.6) * n) if late else 0
        start_inside = not late
        while position < n - _FADE:
            row = rows[rng.integers(len(rows))]
            offset, length = int(self._speech["offset"][row]), int(self._speech["length"][row])
            skip = int(rng.uniform(0, 0.7) * length) if start_inside else 0
            start_inside = False
            wanted = min(length - skip, (n - position) * speed // _SPEED_STEPS + _FADE)
            stored = self._speech_samples[offset + skip : offset + skip + wanted]
            utterance = stored * np.float32(1 / (FULL_SCALE * self._speech["active_rms"][row]))
            if speed != _SPEED_STEPS:
                utterance = _sped_up(utterance, speed)
            _fade_ends(utterance)
            utterance = utterance[: n - position]
            passage[position : position + len(utterance)] = utterance * np.float32(
                10 ** (rng.normal(0, 1.5) / 20)
            )
            bandwidth = min(bandwidth, float(self._speech["bandwidth_hz"][row]) * speed / _SPEED_STEPS)
            pause = rng.uniform(0.03, 0.3) if rng.random() < 0.7 else rng.uniform(0.3, 1.5)
            position += len(utterance) + round(pause * SAMPLE_RATE)
        return passage, bandwidth

    def _noise_mixture(
        self, rng: np.random.Generator, n: int, room: "_DrawnRoom | None", *, absent: bool
    ) -> tuple[np.ndarray, tuple[str, ...]]:
        """One to three noises with an active level of one together, and their kinds."""
        config = self.config
        total = np.zeros(n, dtype=np.float32)
        kinds = []
        synthetic = config.absent_synthetic_share if absent else config.synthetic_share
        count = 1 + int(np.searchsorted(np.cumsum(config.noises), rng.random() * sum(config.noises)))
        for source in range(count):
            draw = rng.random()
            if draw < synthetic:
                kind, noise = _synthetic(rng, n)
            elif draw < synthetic + config.babble_share:
                kind, noise = "babble", self._babble(rng, n)
            else:
                kind, noise = self._recorded(rng, n)
                if rng.random() < config.noise_reverse_share:
                    noise = noise[::-1]
            if rng.random() < config.colour_share:
                noise = _coloured(rng, noise)
            if room is not None and room.others and rng.random() < config.noise_in_room_share:
                (noise,) = _convolved(noise, [room.others[rng.integers(len(room.others))]])
            weight = 10 ** (-rng.uniform(0, config.noise_spread_db if source else 0) / 20)
            noise = noise * np.float32(weight / max(active_rms(noise), 1e-6))
            if rng.random() < config.switch_share:
                noise *= _switch(rng, n)
            total += noise
            kinds.append(kind)
        level = active_rms(total)
        return total * np.float32(1 / level if level > 1e-3 else 0.0), tuple(kinds)

    def _recorded(self, rng: np.random.Generator, n: int) -> tuple[str, np.ndarray]:
        """n samples of one kind of noise at a speed of its own."""
        rows = self._kinds.draw(rng)
        kind = str(self._noise["category"][rows[0]])
        if rng.random() >= self.config.noise_speed_share:
            return kind, self._looped(rng, rows, n)
        widest = round(self.config.noise_speed_range * _SPEED_STEPS)
        speed = _SPEED_STEPS + int(rng.integers(-widest, widest + 1))
        return kind, _sped_up(self._looped(rng, rows, n * speed // _SPEED_STEPS + 1), speed)[:n]

    def _looped(self, rng: np.random.Generator, rows: np.ndarray, n: int) -> np.ndarray:
        """n samples of one kind of noise, its recordings crossfaded or repeated where they are short."""
        noise = np.zeros(n, dtype=np.float32)
        fade = np.sin(np.linspace(0, np.pi / 2, 2 * _FADE, dtype=np.float32))
        gaps = rng.random() < 0.5
        position = 0
        while position < n:
            row = rows[rng.integers(len(rows))]
            offset, length = int(self._noise["offset"][row]), int(self._noise["length"][row])
            begin = int(rng.integers(0, max(length - (n - position), 0) + 1))
            begin += int(rng.integers(0, length // 2)) if position == 0 and length <= n else 0
            clip = self._noise_samples[offset + begin : offset + length][: n - position]
            # Brought to one level, or the parts of a looped kind would jump in loudness.
            clip = clip * np.float32(1 / (FULL_SCALE * max(self._noise["active_rms"][row], 1e-3)))
            overlap = min(len(fade), len(clip))
            clip[:overlap] *= fade[:overlap]
            clip[-overlap:] *= fade[:overlap][::-1]
            noise[position : position + len(clip)] += clip
            # Single events are not repeated in a row as a loop would.
            short = length < 3 * SAMPLE_RATE
            gap = int(rng.exponential(0.7) * SAMPLE_RATE) if short and gaps else 0
            position += max(len(clip) - overlap, _FADE) + gap
        return noise

    def _babble(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Several talkers at once, none of them close."""
        low, high = self.config.babble_talkers
        babble = np.zeros(n, dtype=np.float32)
        for _ in range(int(rng.integers(low, high + 1))):
            voice, _ = self._passage(rng, n, allow_late=False)
            babble += voice * np.float32(10 ** (rng.uniform(-6, 6) / 20))
        return babble

    def _draw_room(self, rng: np.random.Generator) -> "_DrawnRoom | None":
        """A talker's response and those of other places in the same room."""
        if not self._rooms:
            return None
        measured = rng.random() >= self.config.simulated_room_share
        measured = measured if measured in self._rooms else not measured
        rows = self._rooms[measured].draw(rng)
        # In a simulated room the first place is the talker's; of a measured one any may be.
        talker = rows[rng.integers(len(rows))] if measured else rows[0]
        others = [row for row in rows if row != talker]
        return _DrawnRoom(
            self._response(talker),
            [self._response(row) for row in others],
            float(self._responses["bandwidth_hz"][talker]),
        )

    def _response(self, row: int) -> np.ndarray:
        offset, length = self._responses["offset"][row], self._responses["length"][row]
        return np.array(self._response_samples[offset : offset + length])


@dataclass(frozen=True)
class _DrawnRoom:
    talker: np.ndarray
    others: list[np.ndarray]
    bandwidth_hz: float


class _Groups:
    """Rows that belong together, drawn with a probability ∝ (total length)^exponent."""

    def __init__(self, names: np.ndarray, lengths: np.ndarray, chosen: np.ndarray, exponent: float) -> None:
        rows = np.flatnonzero(chosen)
        order = rows[np.argsort(names[rows], kind="stable")]
        boundaries = np.flatnonzero(names[order][1:] != names[order][:-1]) + 1
        self._rows = np.split(order, boundaries)
        weights = np.array([float(lengths[group].sum()) ** exponent for group in self._rows])
        self._cumulative = np.cumsum(weights / weights.sum())

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Row numbers of one group."""
        group = min(int(np.searchsorted(self._cumulative, rng.random())), len(self._rows) - 1)
        return self._rows[group]


@functools.cache
def _speed_filter(speed: int) -> np.ndarray:
    widest = max(speed, _SPEED_STEPS)
    return signal.firwin(20 * widest + 1, 1 / widest, window=("kaiser", 5.0)).astype(np.float32)


def _sped_up(samples: np.ndarray, speed: int) -> np.ndarray:
    """Speed and pitch times speed / _SPEED_STEPS."""
    window: Any = _speed_filter(speed)
    return np.asarray(signal.resample_poly(samples, _SPEED_STEPS, speed, window=window), dtype=np.float32)


def _fade_ends(samples: np.ndarray) -> None:
    """Fade the first and the last 10 ms, or what there is, in place."""
    length = min(_FADE, len(samples))
    fade = np.linspace(0, 1, length, dtype=np.float32)
    samples[:length] *= fade
    samples[len(samples) - length :] *= fade[::-1]


def _coloured(rng: np.random.Generator, samples: np.ndarray) -> np.ndarray:
    """Random equalization: a filter over the whole band ([R], section 4), a peak or dip in the voice band."""
    b1, b2, a1, a2 = rng.uniform(-3 / 8, 3 / 8, 4)
    frequency, q = np.exp(rng.uniform(np.log(80), np.log(8000))), rng.uniform(0.4, 1.5)
    omega = 2 * np.pi * frequency / SAMPLE_RATE
    alpha, middle = np.sin(omega) / (2 * q), -2 * np.cos(omega)
    up, down = alpha * (amplitude := 10 ** (rng.uniform(-8, 8) / 40)), alpha / amplitude
    # Peaking filter of the Audio EQ Cookbook (R. Bristow-Johnson).
    peak = np.array([1 + up, middle, 1 - up, 1 + down, middle, 1 - down]) / (1 + down)
    return _filtered(np.array([[1, b1, b2, 1, a1, a2], peak]), samples)


def _filtered(sections: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Second-order sections (sections, 6) in float32, which halves their cost."""
    return np.asarray(signal.sosfilt(sections.astype(np.float32), samples))


def _convolved(samples: np.ndarray, responses: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Samples through each response, the direct sound in sync with the input."""
    n = len(samples)
    size = fft.next_fast_len(n + max(map(len, responses)) - 1, real=True)
    spectrum = fft.rfft(samples, size)
    return [
        fft.irfft(spectrum * fft.rfft(response, size), size)[DIRECT : DIRECT + n] for response in responses
    ]


def _draw_band(rng: np.random.Generator) -> tuple[float, float]:
    """Lowest and highest frequency in Hz that a caller's equipment lets through."""
    if rng.random() < 0.7:
        rate = rng.choice([8_000, 16_000, 24_000, 32_000], p=[0.3, 0.4, 0.2, 0.1])
        high = rate / 2 * rng.uniform(0.88, 1.1)  # converting a rate leaves some of the mirror image
        # Telephone sets cut the lows too.
        low = rng.uniform(150, 300) if rate == 8_000 and rng.random() < 0.4 else 0.0
        return low, float(high)
    return 0.0, float(rng.uniform(5_000, 20_000))


def _band_limited(samples: np.ndarray, low_hz: float, high_hz: float) -> np.ndarray:
    """Keep a band as a resampler or a codec does: flat inside, nothing outside, no delay."""
    n = len(samples)
    size = fft.next_fast_len(n + _FADE, real=True)
    spectrum = fft.rfft(samples, size)
    resolution = SAMPLE_RATE / size
    high, width = int(high_hz / resolution), max(int(0.04 * high_hz / resolution), 1)
    spectrum[high:] = 0
    spectrum[high - width : high] *= np.cos(np.linspace(0, np.pi / 2, width, dtype=np.float32)) ** 2
    if low_hz:
        low = int(low_hz / resolution)
        spectrum[:low] *= np.sin(np.linspace(0, np.pi / 2, low, dtype=np.float32)) ** 2
    return fft.irfft(spectrum, size)[:n]


def _switch(rng: np.random.Generator, n: int) -> np.ndarray:
    """An envelope that goes on or off once or twice, within 10–300 ms each time."""
    times = np.sort(rng.uniform(0.05, 0.95, int(rng.integers(1, 3))))
    on = rng.random() < 0.5
    points, values = [0.0], [float(on)]
    for time in times:
        points += [time, time + rng.uniform(0.01, 0.3) * SAMPLE_RATE / n]
        values += [float(on), float(not on)]
        on = not on
    return np.interp(np.arange(n) / n, np.maximum.accumulate(points), values).astype(np.float32)


def _microphone_noise(rng: np.random.Generator, n: int, rms: float) -> np.ndarray:
    """Nearly white noise of a microphone and its amplifier."""
    noise = rng.standard_normal(n, dtype=np.float32)
    return _filtered(np.array([[rms, 0, 0, 1, rng.uniform(-0.6, 0.3), 0]]), noise)


def _synthetic(rng: np.random.Generator, n: int) -> tuple[str, np.ndarray]:
    """A generated noise and its kind."""
    draw = rng.random()
    if draw < 0.65:
        return "synthetic coloured", _coloured_noise(rng, n)
    if draw < 0.85:
        return "synthetic hum", _hum(rng, n)
    return "synthetic clicks", _clicks(rng, n)


def _coloured_noise(rng: np.random.Generator, n: int) -> np.ndarray:
    """White, pink or brown noise, anything between, or noise of a random smooth spectrum."""
    size = fft.next_fast_len(n, real=True)
    bins = size // 2 + 1
    spectrum = rng.standard_normal(2 * bins, dtype=np.float32).view(np.complex64)
    octaves = np.log2(np.maximum(np.arange(bins, dtype=np.float32) * (SAMPLE_RATE / size), 20.0))
    if rng.random() < 0.6:
        slope = rng.choice([0.0, 3.0, 6.0, rng.uniform(-2.0, 8.0)])  # dB per octave
        level_db = -slope * octaves
    else:
        knots = np.linspace(octaves[0], octaves[-1], int(rng.integers(4, 10)))
        level_db = np.interp(octaves, knots, rng.uniform(-20, 20, len(knots)) - 1.5 * knots)
    spectrum *= np.power(10, level_db / 20, dtype=np.float32)
    noise = fft.irfft(spectrum, size)[:n]
    return noise / np.float32(np.sqrt(np.mean(noise**2)) + 1e-20)


def _hum(rng: np.random.Generator, n: int) -> np.ndarray:
    """Mains hum: harmonics of 50 or 60 Hz, with a little of the hiss that comes with it."""
    mains = rng.choice([50.0, 60.0]) * rng.uniform(0.998, 1.002)
    harmonics = np.arange(1, int(rng.integers(4, 40)))
    amplitudes = harmonics ** -rng.uniform(0.5, 1.5) * rng.uniform(0.1, 1, len(harmonics))
    phases = rng.uniform(0, 2 * np.pi, len(harmonics))
    # One period in a table fine enough that reading its nearest entry is 70 dB below the hum.
    cycle = np.arange(16_384) / 16_384
    table = (amplitudes[:, None] * np.sin(2 * np.pi * harmonics[:, None] * cycle + phases[:, None])).sum(0)
    phase = (np.arange(n) * (mains / SAMPLE_RATE) * len(table)).astype(np.int64) % len(table)
    hum = (table / np.sqrt(np.mean(table**2))).astype(np.float32)[phase]
    return hum + _microphone_noise(rng, n, 10 ** (rng.uniform(-50, -25) / 20))


def _clicks(rng: np.random.Generator, n: int) -> np.ndarray:
    """Clicks and crackle: random impulses through one short resonance."""
    rate = np.exp(rng.uniform(np.log(1), np.log(60)))
    impulses = np.zeros(n, dtype=np.float32)
    places = rng.integers(0, n, max(1, rng.poisson(rate * n / SAMPLE_RATE)))
    impulses[places] = rng.normal(0, 1, len(places)) * np.exp(rng.normal(0, 0.7, len(places)))
    radius = np.exp(-1 / (SAMPLE_RATE * np.exp(rng.uniform(np.log(1e-4), np.log(5e-3)))))
    omega = 2 * np.pi * np.exp(rng.uniform(np.log(300), np.log(10_000))) / SAMPLE_RATE
    return _filtered(np.array([[1, 0, -1, 1, -2 * radius * np.cos(omega), radius**2]]), impulses)
