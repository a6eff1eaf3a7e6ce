"""The engine of live streams, without a network: the same samples as offline, whatever shares a round."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from percepnet.constants import HOP
from percepnet.enhancer import Enhancer
from percepnet.errors import ParameterError
from percepnet.stream import Stream, enhance
from percepnet.synthesis import Controls, FrameControls
from service import pcm
from service.board import Board, shared_file
from service.engine import (
    DEADLINE_SECONDS,
    LATE_SECONDS,
    LEAD_SECONDS,
    ROUND_FRAMES,
    Answer,
    Engine,
    Options,
    Session,
    prefill,
)
from service.errors import BusyError
from service.metrics import Metrics


@pytest.fixture
def engine(enhancer: Enhancer) -> Engine:
    return Engine(enhancer, 4, Metrics(enhancer.model))


def noise(n_samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(n_samples)).astype(np.float32)


def opened(engine: Engine, rate: int = 48_000, **options: object) -> Session:
    return engine.open(Options(rate, encoding=pcm.F32LE, **options), lambda: None)  # type: ignore[arg-type]


def drain(engine: Engine) -> None:
    while engine.has_work:
        engine.run_round(0.0)


def taken(session: Session) -> list[Answer]:
    answers = list(session.answers)
    session.answers.clear()
    return answers


def audio(answers: list[Answer]) -> np.ndarray:
    return np.frombuffer(b"".join(answer.audio for answer in answers), "<f4")


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
@settings(deadline=None, max_examples=5)
@given(sizes=st.lists(st.integers(0, 700), min_size=1, max_size=6))
def test_every_message_is_answered_at_once_by_as_many_samples_so_late_as_stated(enhancer, rate, sizes):
    engine = Engine(enhancer, 1, Metrics(enhancer.model))
    session = opened(engine, rate)
    samples = noise(sum(sizes))
    answers = []
    start = 0
    for size in sizes:
        session.push(samples[start : start + size], 0.0)
        drain(engine)
        (answer,) = taken(session)
        assert (answer.n_samples, answer.position) == (size, start - session.delay_samples)
        assert len(answer.audio) == 4 * size
        answers.append(answer)
        start += size
    session.flush(0.0)
    drain(engine)
    (tail,) = taken(session)
    assert tail.flushed
    assert tail.n_samples == session.delay_samples
    np.testing.assert_array_equal(
        audio([*answers, tail])[session.delay_samples :], enhance(samples, rate, enhancer=enhancer)
    )


@pytest.mark.parametrize(
    ("rate", "message", "expected"),
    [(48_000, 480, 1440), (48_000, 960, 1440), (48_000, 240, 1680), (48_000, 0, 1919), (48_000, 7, 1919)],
)
def test_messages_of_one_length_make_the_delay_as_short_as_they_allow(engine, rate, message, expected):
    session = opened(engine, rate, message_samples=message)
    assert session.delay_samples == expected
    assert prefill(16_000, 160) == prefill(22_050, 441) == 0
    for _ in range(12):
        session.push(noise(message or 77), 0.0)
        drain(engine)
        assert len(taken(session)) == 1


def test_a_compensated_stream_is_the_offline_result(engine, enhancer):
    session = opened(engine, 16_000, compensate_delay=True)
    samples = noise(4_000)
    for chunk in np.split(samples, range(170, 4_000, 170)):
        session.push(chunk, 0.0)
        drain(engine)
    session.flush(0.0)
    drain(engine)
    answers = taken(session)
    positions = np.cumsum([0, *(answer.n_samples for answer in answers)])
    assert [answer.position for answer in answers] == positions[:-1].tolist()
    np.testing.assert_array_equal(audio(answers), enhance(samples, 16_000, enhancer=enhancer))


def test_streams_that_share_rounds_do_not_influence_each_other(engine, enhancer):
    """Different rates, parameters, phases and loudness; one of them leaves and another takes its row."""
    chosen = [(48_000, Controls()), (16_000, Controls(mix=0.5)), (48_000, Controls(6.0, postfilter=0.25))]
    sessions = [opened(engine, rate, controls=controls) for rate, controls in chosen]
    signals = [noise(14_400, seed) * 10.0**seed for seed in range(3)]
    passing = opened(engine)
    for i in range(40):
        for session, signal, step in zip(sessions, signals, (360, 120, 300), strict=True):
            session.push(signal[i * step : (i + 1) * step], 0.0)
        if i == 10:
            engine.close(passing)
            passing = opened(engine, 32_000)
        passing.push(noise(333, i), 0.0)
        if i % 3:
            engine.run_round(0.0)
    for session, signal, step, (rate, controls) in zip(
        sessions, signals, (360, 120, 300), chosen, strict=True
    ):
        session.flush(0.0)
        drain(engine)
        alone = enhance(signal[: 40 * step], rate, controls=controls, enhancer=enhancer)
        np.testing.assert_array_equal(audio(taken(session))[session.delay_samples :], alone)


def test_a_passage_after_a_flush_starts_from_nothing(engine, enhancer):
    session = opened(engine)
    samples = noise(2_000)
    passages = []
    for _ in range(2):
        session.push(samples, 0.0)
        session.flush(0.0)
        drain(engine)
        passages.append(taken(session))
    assert [answer.position for answer in passages[1]] == [answer.position for answer in passages[0]]
    np.testing.assert_array_equal(audio(passages[0]), audio(passages[1]))
    np.testing.assert_array_equal(
        audio(passages[1])[session.delay_samples :], enhance(samples, 48_000, enhancer=enhancer)
    )


def test_a_passage_without_samples_can_be_flushed(engine):
    for compensate in (False, True):
        session = opened(engine, compensate_delay=compensate)
        session.flush(0.0)
        drain(engine)
        (answer,) = taken(session)
        assert answer.flushed
        assert answer.n_samples == (0 if compensate else session.delay_samples)
        engine.close(session)


def test_new_parameters_ramp_without_a_click(engine, enhancer):
    """A steady tone that is switched from all removed (mix 1, a model that mutes) to dry has no jump."""
    session = opened(engine, message_samples=HOP)
    tone = (0.5 * np.sin(2 * np.pi * 200 * np.arange(HOP * 60) / 48_000)).astype(np.float32)
    for i, chunk in enumerate(np.split(tone, 60)):
        if i == 30:
            session.update(Controls(mix=0), 0.0)
        session.push(chunk, 0.0)
        drain(engine)
    answers = taken(session)
    (updated,) = (answer for answer in answers if answer.controls is not None)
    assert updated.position == 30 * HOP - 1440
    output = audio(answers)
    before = enhance(tone, 48_000, enhancer=enhancer)
    np.testing.assert_array_equal(output[1440 : 30 * HOP], before[: 30 * HOP - 1440])
    start = 36 * HOP
    np.testing.assert_allclose(output[start:], tone[start - 1440 : -1440], atol=1e-5)
    steepest = max(np.abs(np.diff(before, 2)).max(), np.abs(np.diff(tone, 2)).max())
    assert np.abs(np.diff(output[20 * HOP :], 2)).max() < 1.5 * steepest


def test_a_ramp_is_the_same_in_rounds_of_any_length(engine):
    outputs = []
    for n_frames in (1, 2, 10):
        session = opened(engine)
        for i, message in enumerate(np.split(noise(40 * HOP), 40 // n_frames)):
            if i * n_frames == 20:
                session.update(Controls(mix=0.25, postfilter=0.3, attenuation_limit_db=7), 0.0)
            session.push(message, 0.0)
            drain(engine)
        outputs.append(audio(taken(session)))
        engine.close(session)
    for output in outputs[1:]:
        np.testing.assert_array_equal(output, outputs[0])


@pytest.mark.parametrize("n_waiting", [0, 1, 3])
def test_the_position_of_new_parameters_is_that_of_the_first_changed_sample(engine, n_waiting):
    """Also while frames wait: the parameters count for those already."""
    changed, same = (opened(engine, message_samples=HOP) for _ in range(2))
    for i, chunk in enumerate(np.split(noise(30 * HOP), 30)):
        if i == 20:
            changed.update(Controls(mix=0), 0.0)
        for session in (changed, same):
            session.push(chunk, 0.0)
        if not 20 - n_waiting <= i < 20:
            drain(engine)
    answers = taken(changed)
    (updated,) = (answer for answer in answers if answer.controls is not None)
    first = np.flatnonzero(audio(answers) != audio(taken(same)))[0]
    assert updated.position == (20 - n_waiting) * HOP - 1440
    assert 0 <= first - 1440 - updated.position < 10


def test_per_stream_controls_give_the_same_samples_as_one_for_all(enhancer):
    samples = np.stack([noise(HOP * 6, seed) for seed in range(5)])
    choices = [
        Controls(),
        Controls(mix=0.3),
        Controls(mix=0.0),
        Controls(12.0, 0.9, 0.0),
        Controls(100.0, 1.0, 0.5),
    ]
    wet = np.repeat(np.float32([[c.wet] for c in choices]), 6, axis=1)
    sharpening = np.repeat(np.float32([[c.postfilter] for c in choices]), 6, axis=1)
    together, _ = enhancer.process(samples, enhancer.initial_state(5), FrameControls(wet, sharpening))
    for row, controls in enumerate(choices):
        alone, _ = enhancer.process(samples[row : row + 1], enhancer.initial_state(1), controls)
        assert together[row].tobytes() == alone[0].tobytes()


def test_a_stream_that_sends_ahead_does_not_hold_a_round_for_long(engine):
    bulk, live = opened(engine), opened(engine)
    bulk.push(noise(100 * HOP), 0.0)
    engine.run_round(0.0)
    assert bulk.n_frames == 100 - ROUND_FRAMES
    live.push(noise(HOP), 0.0)
    engine.run_round(0.0)
    assert len(live.answers) == 1
    drain(engine)
    assert len(taken(bulk)) == 1


def test_reports_are_means_of_the_frames_since_the_last_one(engine):
    session, silent = opened(engine, report=True), opened(engine)
    session.push(noise(10), 0.0)
    silent.push(noise(2 * HOP), 0.0)
    session.push(noise(2 * HOP), 0.0)
    drain(engine)
    first, second = taken(session)
    assert first.report is None
    assert second.report is not None
    assert 0 <= second.report.speech_probability <= 1
    assert 0 < second.report.mean_gain <= 1
    assert second.report.pitch_hz == 0 or 62.5 <= second.report.pitch_hz <= 500
    assert taken(silent)[0].report is None


def test_the_reported_pitch_is_that_of_the_voiced_frames(engine):
    each, together = opened(engine, message_samples=HOP, report=True), opened(engine, report=True)
    voice = 0.1 * np.sign(np.sin(2 * np.pi * 200 * np.arange(10 * HOP) / 48_000))
    samples = np.concatenate([np.zeros(20 * HOP), voice]).astype(np.float32)
    for frame in np.split(samples, 30):
        each.push(frame, 0.0)
    together.push(samples, 0.0)
    drain(engine)
    reports = [answer.report for answer in taken(each) if answer.report is not None]
    voiced = [report.pitch_hz for report in reports if report.pitch_hz]
    assert 0 < len(voiced) < len(reports)
    (answer,) = taken(together)
    assert answer.report is not None
    assert answer.report.pitch_hz == pytest.approx(np.mean(voiced))
    assert 62.5 <= answer.report.pitch_hz <= 500


def test_streams_beyond_the_capacity_are_refused_and_places_are_given_back(engine):
    sessions = [opened(engine) for _ in range(4)]
    with pytest.raises(BusyError, match="all 4 live streams"):
        opened(engine)
    engine.close(sessions[2])
    assert engine.active == 3
    opened(engine)


def test_a_refusal_counts_the_streams_of_all_workers(enhancer):
    file = shared_file(2)
    for mine, n_streams in enumerate((2, 3)):
        board = Board(2, mine, file)
        board.mine.ready = 1
        engine = Engine(enhancer, n_streams, Metrics(enhancer.model, board))
        for _ in range(n_streams):
            opened(engine)
    with pytest.raises(BusyError, match="all 5 live streams of this server are taken"):
        opened(engine)


def test_a_rate_out_of_range_takes_no_place(engine):
    with pytest.raises(ParameterError, match="sample rate"):
        opened(engine, 1)
    assert engine.active == 0


def test_what_is_done_with_answers_is_no_part_of_the_signal_path(engine):
    """It happens after the round's CPU time went into the books, and so counts as transport."""
    spent = []
    session = engine.open(Options(48_000, pcm.F32LE), lambda: spent.append(engine.cpu.dsp))
    session.push(noise(480), 0.0)
    engine.run_round(0.0)
    assert spent == [engine.cpu.dsp]
    assert engine.cpu.dsp > 0


def test_files_wait_only_while_frames_wait(engine):
    session = opened(engine)
    assert engine.quiet.is_set()
    session.push(noise(HOP), 0.0)
    assert not engine.quiet.is_set()
    drain(engine)
    assert engine.quiet.is_set()
    session.push(noise(HOP), 0.0)
    engine.close(session)
    assert engine.quiet.is_set()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_round_that_fails_ends_its_streams_and_no_others(engine, monkeypatch, caplog):
    broken, later = opened(engine), opened(engine)
    with monkeypatch.context() as patch:
        patch.setattr(Enhancer, "advance", lambda *_: 1 / 0)
        broken.push(noise(HOP), 0.0)
        engine.run_round(0.0)
    assert isinstance(broken.error, ZeroDivisionError)
    assert "a round of 1 streams failed" in caplog.text
    later.push(noise(HOP), 0.0)
    engine.run_round(0.0)
    assert later.error is None
    assert len(taken(later)) == 1


@pytest.mark.parametrize("encoding", [pcm.S16LE, pcm.F32LE])
def test_samples_pass_through_the_wire_and_back(encoding):
    samples = np.float32([0, 0.5, -1, 0.25])
    assert pcm.decode(pcm.encode(samples, encoding).tobytes(), encoding).tolist() == samples.tolist()


def test_integers_saturate_and_what_is_not_finite_or_too_soft_is_silent():
    assert pcm.encode(np.float32([2, -2, 1]), pcm.S16LE).tolist() == [32_767, -32_768, 32_767]
    data = np.float32([np.nan, np.inf, 1e9, -1e9, 1e-11, -1e-39]).tobytes()
    assert pcm.decode(data, pcm.F32LE).tolist() == [0, 0, 32_768, -32_768, 0, 0]


def test_a_stream_of_the_library_and_of_the_engine_are_one(engine, enhancer):
    samples = noise(3_000)
    stream = Stream(24_000, enhancer=enhancer)
    expected = np.concatenate([stream.push(samples), stream.flush()])
    session = opened(engine, 24_000)
    session.push(samples, 0.0)
    session.flush(0.0)
    drain(engine)
    output = audio(taken(session))
    np.testing.assert_array_equal(output[session.delay_samples - stream.latency_samples :], expected)


def test_a_stream_that_is_too_late_catches_up_with_frames_sent_dry(engine, enhancer):
    """Dry from the first frame that is too late to the last that misses its deadline, faded and flagged."""
    session, other = (opened(engine, message_samples=HOP) for _ in range(2))
    samples = noise(20 * HOP)
    stalled = 0.01 * 11 + LATE_SECONDS + 0.0101  # the round at which frame 10 is too late
    for i, frame in enumerate(np.split(samples, 20)):
        now = 0.01 * (i + 1)
        session.push(frame, now)
        if not 10 <= i < 15:
            other.push(frame, now)
            engine.run_round(stalled if i == 15 else now)
    drain(engine)
    answers = taken(session)
    assert [i for i, answer in enumerate(answers) if answer.dry] == [10, 11, 12, 13, 14]
    assert [answer.position for answer in answers] == [i * HOP - 1440 for i in range(20)]
    assert (session.n_dry, other.n_dry) == (5, 0)
    assert not any(answer.dry for answer in taken(other))
    assert engine._metrics.dry_frames._value.get() == 5
    output = audio(answers)
    np.testing.assert_array_equal(output[11 * HOP : 15 * HOP], samples[11 * HOP - 1440 : 15 * HOP - 1440])
    alone, state = enhancer.process(samples[None, : 10 * HOP], enhancer.initial_state(1))
    dry, state = enhancer.bypass(samples[None, 10 * HOP : 15 * HOP], state)
    rest, _ = enhancer.process(samples[None, 15 * HOP :], state)
    np.testing.assert_array_equal(output, np.concatenate([alone, dry, rest], axis=1)[0])


def test_a_frame_that_is_late_but_not_too_late_is_enhanced(engine, enhancer):
    session = opened(engine)
    samples = noise(2_000)
    session.push(samples, 1.0)
    engine.run_round(1.0 + DEADLINE_SECONDS + LATE_SECONDS)
    session.flush(1.1)
    drain(engine)
    answers = taken(session)
    assert not any(answer.dry for answer in answers)
    np.testing.assert_array_equal(
        audio(answers)[session.delay_samples :], enhance(samples, 48_000, enhancer=enhancer)
    )


@pytest.mark.parametrize("seconds", [0.3, LEAD_SECONDS + 0.1])
def test_the_queue_of_somebody_who_sends_faster_than_speech_is_not_late(engine, seconds):
    """At the pace of speech or better no frame is dry; and from some lead on, none at any pace."""
    session = opened(engine)
    n_frames = round(100 * seconds)
    session.push(noise(n_frames * HOP), 0.0)
    now = 0.0
    while engine.has_work:
        n_done = n_frames - session.n_frames
        now = 0.01 * n_done if seconds < LEAD_SECONDS else now + 10
        engine.run_round(now)
    assert session.n_dry == 0


def test_who_was_ahead_and_speaks_on_is_late_like_anybody(engine):
    session = opened(engine)
    session.push(noise(100 * HOP), 0.0)
    drain(engine)
    for i in range(2):
        session.push(noise(HOP), 100.0 + i)
        engine.run_round(100.5 + i)
    assert session.n_dry == 2


@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000])
def test_dry_frames_keep_their_place_at_any_rate(engine, rate):
    """All dry, a stream is its input, as late as stated."""
    session = opened(engine, rate)
    step = rate // 100
    time_s = np.arange(30 * step) / rate
    tone = (0.5 * np.sin(2 * np.pi * 300 * time_s)).astype(np.float32)
    for i, chunk in enumerate(np.split(tone, 30)):
        session.push(chunk, float(i))
        engine.run_round(i + 0.5)
    output = audio(taken(session))
    delay = session.delay_samples
    np.testing.assert_allclose(output[delay + step :], tone[step : len(output) - delay], atol=2e-3)
