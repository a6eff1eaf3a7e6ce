"""Mixtures are a pure function of seed and index and are what their fields say."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from scipy import signal

from percepnet.errors import ParameterError
from percepnet.training.mixing import Mixer, MixingConfig
from percepnet.training.prepare import active_rms, prepare

RATE = 48_000
PLAIN = replace(
    MixingConfig(),
    clean_share=0.0,
    absent_share=0.0,
    full_band_share=1.0,
    reverb_share=0.0,
    band_limit_share=0.0,
    microphone_share=0.0,
    offset_share=0.0,
    clip_share=0.0,
    speed_share=0.0,
    level_range_db=(-35.0, -25.0),
)


def test_a_mixture_depends_on_seed_split_and_index_alone(training_cache: Path) -> None:
    """Any order, any mixer: the same samples; another seed or split: others."""
    first = Mixer(training_cache, seed=3)
    forwards = first.mixtures(5, 4, 1.0)
    backwards = [Mixer(training_cache, seed=3).mixture(index, 1.0) for index in (8, 7, 6, 5)][::-1]
    for one, other in zip(forwards, backwards, strict=True):
        assert np.array_equal(one.noisy, other.noisy)
        assert np.array_equal(one.clean, other.clean)
        assert (one.bandwidth_hz, one.snr_db, one.noises) == (other.bandwidth_hz, other.snr_db, other.noises)
    assert not np.array_equal(forwards[0].noisy, Mixer(training_cache, seed=4).mixture(5, 1.0).noisy)
    assert not np.array_equal(forwards[0].noisy, Mixer(training_cache, "valid", seed=3).mixture(5, 1.0).noisy)


def test_splits_share_no_kind_of_noise(training_cache: Path) -> None:
    """What validates was never trained on."""
    kinds = {}
    config = replace(PLAIN, synthetic_share=0.0, babble_share=0.0)
    for split in ("train", "valid"):
        mixtures = Mixer(training_cache, split, config=config).mixtures(0, 60, 0.1)
        kinds[split] = {kind for mixture in mixtures for kind in mixture.noises}
    assert kinds["train"]
    assert kinds["valid"]
    assert not kinds["train"] & kinds["valid"]
    with pytest.raises(ParameterError, match="test"):
        Mixer(training_cache, "test")


def test_every_mixture_is_finite_float32_within_full_scale(training_cache: Path) -> None:
    """Whatever is drawn, with the default distribution."""
    for mixture in Mixer(training_cache).mixtures(0, 80, 0.7):
        for samples in (mixture.noisy, mixture.clean):
            assert samples.dtype == np.float32
            assert samples.shape == (33_600,)
            assert np.isfinite(samples).all()
            assert np.abs(samples).max() <= 1


def test_snr_and_level_are_as_stated(training_cache: Path) -> None:
    """Active levels of the target and of what was added differ by the stated SNR."""
    for mixture in Mixer(training_cache, config=PLAIN).mixtures(0, 25, 2.0):
        noise = mixture.noisy - mixture.clean
        snr_db = 20 * np.log10(active_rms(mixture.clean) / active_rms(noise))
        assert snr_db == pytest.approx(mixture.snr_db, abs=0.2)
        assert 20 * np.log10(active_rms(mixture.clean)) == pytest.approx(mixture.level_db, abs=0.1)


def test_snr_spans_the_range_with_most_where_calls_are(training_cache: Path) -> None:
    """A clipped normal distribution around 7 dB, and never babble louder than the talker."""
    mixtures = Mixer(training_cache).mixtures(0, 300, 0.1)
    snrs = np.array([mixture.snr_db for mixture in mixtures if np.isfinite(mixture.snr_db)])
    assert snrs.min() >= -10
    assert snrs.max() <= 40
    assert 4 < np.median(snrs) < 10
    assert np.mean((snrs > -5) & (snrs < 20)) > 0.75
    assert all(m.snr_db >= 0 for m in mixtures if "babble" in m.noises and np.isfinite(m.snr_db))


def test_clean_and_absent_speech(training_cache: Path) -> None:
    """Nothing added: the target is the input. Nobody speaks: the target is silence."""
    pure = Mixer(training_cache, config=replace(PLAIN, clean_share=1.0, band_limit_share=0.5)).mixtures(
        0, 8, 0.5
    )
    assert all(np.array_equal(m.noisy, m.clean) and np.any(m.clean) and m.snr_db == np.inf for m in pure)
    absent = Mixer(training_cache, config=replace(PLAIN, absent_share=1.0, reverb_share=0.5)).mixtures(
        0, 8, 0.5
    )
    assert all(not np.any(m.clean) and np.any(m.noisy) and m.snr_db == -np.inf for m in absent)


def test_noise_without_speech_is_as_faint_as_hiss_and_as_loud_as_a_street(training_cache: Path) -> None:
    """Active levels from −65 to −12 dB below full scale, none more often than others."""
    config = replace(PLAIN, absent_share=1.0, absent_band_limit_share=0.0, switch_share=0.0)
    mixtures = Mixer(training_cache, config=config).mixtures(0, 100, 0.3)
    levels_db = np.sort([20 * np.log10(active_rms(mixture.noisy)) for mixture in mixtures])
    assert levels_db[[0, -1]] == pytest.approx([-65, -12], abs=6)
    assert levels_db[[25, 50, 75]] == pytest.approx([-52, -38, -25], abs=8)


def test_reverberation_stays_in_sync_and_leaves_the_early_part(training_cache: Path) -> None:
    """The target is the dry voice and its first reflections: what is missing comes later."""
    config = replace(
        PLAIN,
        reverb_share=1.0,
        snr_range_db=(90.0, 90.0),
        babble_share=0.0,
        synthetic_share=0.0,
        switch_share=0.0,
    )
    dry = Mixer(training_cache, config=replace(config, colour_share=0.0, early_ms=5.2))
    wet = Mixer(training_cache, config=replace(config, colour_share=0.0))
    for index in range(6):
        target, reference = wet.mixture(index, 2.0), dry.mixture(index, 2.0)
        assert target.reverberant
        for samples in (target.noisy, target.clean):
            correlation = signal.correlate(samples, reference.clean, method="fft")
            assert np.argmax(correlation) == len(samples) - 1
        late = target.noisy - target.clean
        assert 0.01 < np.sum(late**2) / np.sum(target.noisy**2) < 0.9


def test_band_limits_leave_nothing_above(training_cache: Path) -> None:
    """Both signals are empty above the stated bandwidth."""
    config = replace(PLAIN, band_limit_share=1.0)
    for mixture in Mixer(training_cache, config=config).mixtures(0, 12, 1.0):
        assert mixture.bandwidth_hz <= 20_000
        window = np.hanning(RATE)
        for samples in (mixture.noisy, mixture.clean):
            power = np.abs(np.fft.rfft(samples * window)) ** 2
            assert power[int(mixture.bandwidth_hz * 1.02) + 20 :].sum() < 1e-6 * power.sum()


def test_bandwidth_is_the_narrowest_of_what_was_joined(training_cache: Path) -> None:
    """16 kHz recordings say nothing above 8 kHz; a change of speed moves that limit."""
    narrow = Mixer(training_cache, config=replace(PLAIN, full_band_share=0.0)).mixtures(0, 5, 0.5)
    assert {m.bandwidth_hz for m in narrow} == {8000}
    wide = Mixer(training_cache, config=PLAIN).mixtures(0, 5, 0.5)
    assert {m.bandwidth_hz for m in wide} == {24_000}
    sped = Mixer(training_cache, config=replace(PLAIN, full_band_share=0.0, speed_share=1.0)).mixtures(
        0, 30, 0.5
    )
    limits = {m.bandwidth_hz for m in sped}
    assert len(limits) > 5
    assert all(8000 * 0.88 <= limit <= 8000 * 1.12 for limit in limits)


def test_clipping_hits_the_mixture_and_spares_the_target(training_cache: Path) -> None:
    """A run of samples sits at the limit of the mixture, and the target goes beyond or stays free."""
    mixtures = Mixer(training_cache, config=replace(PLAIN, clip_share=1.0)).mixtures(0, 8, 1.0)
    for mixture in mixtures:
        assert mixture.clipped
        limit = np.abs(mixture.noisy).max()
        assert np.count_nonzero(np.abs(mixture.noisy) >= limit * (1 - 1e-6)) > 3
    free = Mixer(training_cache, config=PLAIN).mixtures(0, 8, 1.0)
    assert [np.array_equal(a.clean, b.clean) for a, b in zip(mixtures, free, strict=True)] == [True] * 8


def test_noisy_recordings_are_no_targets(
    tmp_path: Path, voice: Callable[[np.random.Generator, int], np.ndarray]
) -> None:
    """Speech whose pauses are loud is left out."""
    rng = np.random.default_rng(5)
    for name, floor in (("quiet", 0.0), ("loud", 0.3)):
        for index in range(12):
            (tmp_path / "s" / f"{name}-{index}").mkdir(parents=True)
            samples = voice(rng, RATE) + rng.normal(0, floor, 3 * RATE)
            soundfile.write(tmp_path / "s" / f"{name}-{index}" / "a.wav", samples / 4, RATE)
    prepare(
        tmp_path / "cache", speech=[tmp_path / "s"], noise=[tmp_path / "s"], simulated_rooms=0, progress=False
    )
    config = replace(PLAIN, synthetic_share=1.0, snr_range_db=(40.0, 40.0), switch_share=0.0)
    for mixture in Mixer(tmp_path / "cache", config=config).mixtures(0, 10, 2.0):
        energies = np.square(mixture.clean).reshape(-1, 960).mean(axis=1)
        assert np.quantile(energies, 0.1) < 1e-4 * energies.max()
