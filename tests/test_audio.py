"""Files come in whole or are refused with one declared error, and go out as they came in."""

import io
import re
import signal
from contextlib import suppress

import numpy as np
import pytest
import soundfile

from percepnet import audio
from percepnet.audio import AudioReader, AudioWriter, Encoding, choose_encoding
from percepnet.errors import AudioError, ParameterError, UnsupportedAudioError


def noise(n_samples: int, channels: int = 1) -> np.ndarray:
    """(channels, n_samples) float32 within ±0.8."""
    return np.random.default_rng(0).uniform(-0.8, 0.8, (channels, n_samples)).astype(np.float32)


def chirp(n_samples: int, channels: int = 1) -> np.ndarray:
    """(channels, n_samples) float32 within ±0.5: what lossy encoders are made for."""
    phase = np.cumsum(np.linspace(0.02, 0.5, n_samples))
    return np.stack([0.5 * np.sin(phase + channel) for channel in range(channels)]).astype(np.float32)


def encoded(
    container: str, subtype: str, rate: int = 16_000, channels: int = 1, n_samples: int = 8_000
) -> bytes:
    """A file as another program would have written it."""
    file = io.BytesIO()
    soundfile.write(file, chirp(n_samples, channels).T, rate, subtype, format=container)
    return file.getvalue()


def read(source) -> np.ndarray:
    with AudioReader(source) as reader:
        return np.concatenate(list(reader.blocks(1_000)), axis=1)


def written(samples: np.ndarray, encoding: Encoding, rate: int = 16_000) -> tuple[io.BytesIO, AudioWriter]:
    file = io.BytesIO()
    with AudioWriter(file, encoding, rate, len(samples), samples.shape[1]) as writer:
        writer.write(samples)
    file.seek(0)
    return file, writer


@pytest.mark.parametrize(
    ("container", "subtype"),
    [
        *(("WAV", s) for s in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW")),
        *(("FLAC", s) for s in ("PCM_S8", "PCM_16", "PCM_24")),
        *(("OGG", s) for s in ("VORBIS", "OPUS")),
        ("WAVEX", "PCM_16"),
        ("RF64", "PCM_16"),
        ("MP3", "MPEG_LAYER_III"),
    ],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_every_accepted_format_is_read_in_full(container, subtype, channels, tmp_path):
    """From a path and from a binary file alike, and as libsndfile reads it in one go."""
    path = tmp_path / "in"
    path.write_bytes(encoded(container, subtype, channels=channels))
    with AudioReader(path) as reader:
        assert (reader.sample_rate, reader.channels, reader.n_samples) == (16_000, channels, 8_000)
    expected = soundfile.read(path, dtype="float32", always_2d=True)[0].T
    # The MP3 decoder itself differs by a rounding from run to run.
    tolerance = 1e-6 if container == "MP3" else 0
    with path.open("rb") as file:
        np.testing.assert_allclose(read(file), expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(read(path), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("container", "subtype", "bits"),
    [
        *(("WAV", "PCM_U8", 8), ("WAV", "PCM_16", 16), ("WAV", "PCM_24", 24), ("WAV", "PCM_32", 25)),
        *(("FLAC", "PCM_S8", 8), ("FLAC", "PCM_16", 16), ("FLAC", "PCM_24", 24)),
    ],
)
def test_pcm_is_rounded_to_the_nearest_step(container, subtype, bits):
    """32-bit PCM keeps what float32 holds. An offset of half a step would be a rounding down."""
    samples = noise(20_000, 2)
    file, writer = written(samples, Encoding(container, subtype))
    error = (read(file).astype(np.float64) - samples) * 2 ** (bits - 1)
    assert np.abs(error).max() <= 0.5
    assert abs(error.mean()) < 0.01
    assert writer.clipped_samples == 0


@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
def test_float_files_hold_every_sample_as_it_is(subtype):
    samples = 5 * noise(5_000, 3)
    file, writer = written(samples, Encoding("WAV", subtype))
    np.testing.assert_array_equal(read(file), samples)
    assert writer.clipped_samples == 0


@pytest.mark.parametrize(
    ("container", "subtype"),
    [("WAV", "PCM_U8"), ("WAV", "PCM_16"), ("WAV", "PCM_32"), ("WAV", "ULAW"), ("FLAC", "PCM_24")],
)
def test_what_is_beyond_full_scale_is_saturated_and_counted(container, subtype):
    samples = noise(1_000, 2)
    samples[0, 10:17] = 1.5
    samples[1, 20:25] = -3e30
    file, writer = written(samples, Encoding(container, subtype))
    assert writer.clipped_samples == 12
    result = read(file)
    assert result[0, 10:17].min() > 0.97
    assert result[1, 20:25].max() < -0.97


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
@pytest.mark.parametrize("n_samples", [1, 100, 48_000, 100_003])
def test_lossy_files_keep_the_length_and_the_place(subtype, n_samples):
    """Long blocks are written in pieces: libvorbis dies of one long write."""
    signal = chirp(n_samples)
    result = read(written(signal, Encoding("OGG", subtype), 48_000)[0])
    assert result.shape == signal.shape
    if n_samples > 1_000:
        assert np.mean((result - signal) ** 2) < 0.05 * np.mean(signal**2)


@pytest.mark.parametrize(
    ("source", "name", "expected"),
    [
        (("WAV", "PCM_U8"), "wav", ("WAV", "PCM_U8")),
        (("WAV", "PCM_24"), "wav", ("WAV", "PCM_24")),
        (("WAV", "FLOAT"), "wav", ("WAV", "FLOAT")),
        (("WAV", "IMA_ADPCM"), "wav", ("WAV", "PCM_16")),
        (("FLAC", "PCM_S8"), "wav", ("WAV", "PCM_U8")),
        (("MP3", "MPEG_LAYER_III"), "wav", ("WAV", "PCM_16")),
        (("OGG", "OPUS"), "wav", ("WAV", "PCM_16")),
        (("WAV", "PCM_U8"), "flac", ("FLAC", "PCM_S8")),
        (("WAV", "PCM_16"), "flac", ("FLAC", "PCM_16")),
        (("WAV", "DOUBLE"), "flac", ("FLAC", "PCM_24")),
        (("OGG", "VORBIS"), "ogg", ("OGG", "VORBIS")),
        (("OGG", "OPUS"), "ogg", ("OGG", "OPUS")),
        (("WAV", "PCM_16"), "ogg", ("OGG", "VORBIS")),
        (("WAV", "PCM_16"), "opus", ("OGG", "OPUS")),
    ],
)
def test_the_output_keeps_the_input_s_depth_as_far_as_its_format_can(source, name, expected):
    with AudioReader(io.BytesIO(encoded(*source))) as reader:
        assert choose_encoding(io.BytesIO(), name, reader) == Encoding(*expected)
        assert choose_encoding(f"folder/file.{name.upper()}", None, reader) == Encoding(*expected)


@pytest.mark.parametrize(
    ("rate", "channels", "target", "name", "message"),
    [
        (16_000, 1, "out.mp3", None, "suffix is '.mp3'; accepted are .wav"),
        (16_000, 1, "out", None, "suffix is ''"),
        (16_000, 1, "out.wav", "aiff", "accepted are wav, flac, ogg, opus"),
        (44_100, 1, "out.opus", None, "44100 Hz, only 8000, 12000"),
        (16_000, 9, "out.flac", None, "at most 8 channels"),
        (16_000, 256, "out.ogg", None, "at most 255 channels"),
    ],
)
def test_what_cannot_be_written_is_refused_by_what_is_accepted(rate, channels, target, name, message):
    with (
        AudioReader(io.BytesIO(encoded("WAV", "PCM_16", rate, channels, 10))) as reader,
        pytest.raises(ParameterError, match=re.escape(message)),
    ):
        choose_encoding(target, name, reader)


@pytest.mark.parametrize(
    ("channels", "limit", "container"),
    [(1, None, "WAV"), (2, None, "WAV"), (6, None, "WAVEX"), (40, None, "WAVEX"), (2, 1_000, "RF64")],
)
def test_wav_s_header_fits_the_channels_and_the_size(channels, limit, container, monkeypatch):
    if limit is not None:
        monkeypatch.setattr(audio, "MAX_WAV_BYTES", limit)
    samples = noise(1_000, channels)
    file, _ = written(samples, Encoding("WAV", "FLOAT"))
    assert soundfile.info(file).format == container
    np.testing.assert_array_equal(read(file), samples)


def patched(data: bytes, position: int, new: bytes) -> bytes:
    return data[:position] + new + data[position + len(new) :]


def with_value(value: float, sample: int, channel: int) -> bytes:
    samples = noise(3_000, 2)
    samples[channel, sample] = value
    file = io.BytesIO()
    soundfile.write(file, samples.T, 16_000, "FLOAT", format="WAV")
    return file.getvalue()


WAV = encoded("WAV", "PCM_16")
MP3 = encoded("MP3", "MPEG_LAYER_III", n_samples=64_000)
# A WAV's header: channels at byte 22, rate at 24, length of the data at 40.
NOT_AUDIO = {
    "text": b"hello, this is not audio at all " * 100,
    "zeros": bytes(10_000),
    "one byte": b"R",
    "an image": b"\x89PNG\r\n\x1a\n" + bytes(1_000),
    "AIFF": encoded("AIFF", "PCM_16"),
    "AAC": b"\xff\xf1\x50\x80" + bytes(1_000),
}
UNUSABLE = {
    "empty": (b"", "empty"),
    "no samples": (encoded("WAV", "PCM_16", n_samples=0), "no samples"),
    "cut in the header": (WAV[:30], "truncated"),
    "cut before the data": (WAV[:44], "promises 16000 bytes of audio, it holds 0"),
    "cut in the data": (WAV[:9_044], "promises 16000 bytes of audio, it holds 9000"),
    "cut RF64": (encoded("RF64", "PCM_16")[:9_000], "truncated"),
    "cut FLAC": (encoded("FLAC", "PCM_16")[:-2_000], "damaged or truncated"),
    "cut FLAC header": (encoded("FLAC", "PCM_16")[:60], "damaged or truncated"),
    "cut Vorbis": (encoded("OGG", "VORBIS", n_samples=60_000)[:-2_000], "last Ogg page"),
    "cut Vorbis header": (encoded("OGG", "VORBIS")[:60], "last Ogg page"),
    "Vorbis without its last byte": (encoded("OGG", "VORBIS")[:-1], "last Ogg page"),
    "cut Opus": (encoded("OGG", "OPUS", n_samples=60_000)[:-2_000], "last Ogg page"),
    "two Vorbis in one": (encoded("OGG", "VORBIS") + encoded("OGG", "VORBIS"), "several Ogg streams"),
    "two Opus in one": (encoded("OGG", "OPUS") + encoded("OGG", "OPUS"), "several Ogg streams"),
    "two MP3 in one": (MP3 + MP3, "the MP3 goes on after the 64000 samples that its start promises"),
    "0 channels": (patched(WAV, 22, b"\0\0"), "damaged"),
    "rate 0": (patched(WAV, 24, bytes(4)), "a sample rate of 0 Hz; accepted are 8000 to 192000 Hz"),
    "rate 2 GHz": (patched(WAV, 24, b"\xff\xff\xff\x7f"), "2147483647 Hz; accepted are 8000 to 192000"),
    "rate 7999": (encoded("WAV", "PCM_16", 7_999), "7999 Hz"),
    "rate 192001": (encoded("WAV", "PCM_16", 192_001), "192001 Hz"),
    "unknown codec": (patched(WAV, 20, b"\x99\x99"), "damaged"),
    "endless chunks": (WAV[:12] + b"junk\0\0\0\0" * 5_000, "truncated"),
    "NaN": (with_value(np.nan, 2_345, 1), "sample 2345 (0.147 s) of channel 2 is nan"),
    "infinity": (with_value(-np.inf, 0, 0), "sample 0 (0.000 s) of channel 1 is -inf"),
}


@pytest.mark.parametrize("kind", NOT_AUDIO)
def test_what_is_not_audio_is_told_what_is_accepted(kind, tmp_path):
    path = tmp_path / "in.wav"
    path.write_bytes(NOT_AUDIO[kind])
    for source in (path, io.BytesIO(NOT_AUDIO[kind])):
        with pytest.raises(UnsupportedAudioError, match="WAV, FLAC, Ogg"):
            read(source)


@pytest.mark.parametrize("kind", UNUSABLE)
def test_unusable_audio_is_refused_with_the_reason(kind, tmp_path):
    data, message = UNUSABLE[kind]
    path = tmp_path / "in.wav"
    path.write_bytes(data)
    for source in (path, io.BytesIO(data)):
        with pytest.raises(AudioError, match=re.escape(message)):
            read(source)


def test_a_cut_mp3_is_refused(capfd):
    """Its first frame promises the length. (The decoder complains on stderr, too.)"""
    with pytest.raises(AudioError, match="truncated: its header promises 64000 samples"):
        read(io.BytesIO(MP3[:-3_000]))


def variable_mp3(louder: slice) -> tuple[bytes, bytes]:
    """An MP3 of variable bit rate, and the same without its length."""
    samples = np.zeros(160_000, np.float32)
    samples[louder] = noise(160_000)[0, louder]
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", 16_000, 1, format="MP3", bitrate_mode="VARIABLE") as writer:
        writer.write(samples)
    data = file.getvalue()
    return data, data[data.index(b"\xff\xf3", 4) :]  # the header takes the place of the first frame


@pytest.mark.parametrize("kind", ["no Xing header", "behind an ID3 tag", "a Xing header without a count"])
def test_an_mp3_of_unknown_length_is_read_to_its_end(kind, capfd):
    """libsndfile guesses its length from the first frame, here too long: it is quiet."""
    data, without = variable_mp3(slice(20_000, None))
    if kind == "behind an ID3 tag":
        without = b"ID3\x04\0\0\0\0\x01\0" + bytes(128) + without
    if kind == "a Xing header without a count":  # as programs write it into a pipe
        without = patched(data, data.index(b"Xing") + 8, bytes(4))
    with AudioReader(io.BytesIO(without)) as reader:
        assert reader.n_samples == 0
        samples = np.concatenate(list(reader.blocks(1_000)), axis=1)
    delay = 576 + 529  # of LAME's encoder and of the decoder
    np.testing.assert_allclose(samples[:, delay:][:, :160_000], read(io.BytesIO(data)), atol=1e-5)


@pytest.mark.parametrize(
    ("louder", "after"),
    [(slice(0, 20_000), b""), (slice(20_000, None), encoded("MP3", "MPEG_LAYER_III", 8_000, 1, 64_000))],
)
def test_an_mp3_of_unknown_length_of_which_a_part_would_be_read_is_refused(louder, after, capfd):
    """Its start is louder than the rest, so the guess is too short; or audio of another rate follows."""
    with pytest.raises(AudioError, match="goes on after"):
        read(io.BytesIO(variable_mp3(louder)[1] + after))


def test_a_flac_from_a_pipe_promises_no_length_and_is_read_in_full():
    flac = encoded("FLAC", "PCM_16")
    piped = patched(flac, 21, bytes([flac[21] & 0xF0, 0, 0, 0, 0]))  # STREAMINFO's count of samples
    with AudioReader(io.BytesIO(piped)) as reader:
        assert reader.n_samples == 0
    np.testing.assert_array_equal(read(io.BytesIO(piped)), read(io.BytesIO(flac)))


@pytest.mark.parametrize("length", [b"\xff\xff\xff\xff", b"\x00\xf0\xff\x7f"])
def test_a_wav_from_a_pipe_promises_no_length_and_is_read_in_full(length):
    piped = patched(patched(WAV, 4, length), 40, length)
    np.testing.assert_array_equal(read(io.BytesIO(piped)), read(io.BytesIO(WAV)))


@pytest.mark.parametrize(
    "start", [b"RIFF\0\0\0\0WAVE", b"fLaC", b"OggS", b"ID3", b"\xff\xfb\x90\x64", b"RF64\0\0\0\0WAVE"]
)
@pytest.mark.parametrize("seed", range(5))
def test_garbage_gives_a_declared_error_never_another(start, seed, capfd):
    garbage = start + np.random.default_rng(seed).bytes(5_000)
    with pytest.raises(AudioError):
        read(io.BytesIO(garbage))


@pytest.mark.parametrize(
    "container", [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS")]
)
@pytest.mark.parametrize("seed", range(8))
def test_damaged_bytes_give_a_result_or_a_declared_error(container, seed):
    rng = np.random.default_rng(seed)
    data = bytearray(encoded(*container))
    for position in rng.integers(0, [60, len(data)][seed % 2], 5):
        data[position] = rng.integers(256)
    with suppress(AudioError):
        assert np.isfinite(read(io.BytesIO(data))).all()


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        AudioReader(tmp_path / "none.wav")
    with pytest.raises(FileNotFoundError):
        AudioWriter(tmp_path / "none" / "out.wav", Encoding("WAV", "PCM_16"), 16_000, 1, 1)


class FailingFile(io.BytesIO):
    """A binary file whose read from a position on fails, or gives less than there is."""

    def __init__(self, data: bytes, failing_from: int, error: OSError | None) -> None:
        super().__init__(data)
        self._failing_from = failing_from
        self._error = error

    def read(self, size=-1):
        if self.tell() < self._failing_from:
            return super().read(size)
        self._failing_from = len(self.getvalue())
        if self._error is not None:
            raise self._error
        return super().read(size // 2)


@pytest.mark.parametrize(
    "container", [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III")]
)
def test_an_error_of_a_binary_file_is_raised_though_libsndfile_goes_on(container):
    data = encoded(*container, n_samples=100_000)
    with pytest.raises(OSError, match="the disk is worn"):
        read(FailingFile(data, len(data) // 2, OSError(5, "the disk is worn")))


def test_a_file_is_refused_if_a_piece_was_not_read():
    """That is no shorter file: more comes after the piece."""
    data = encoded("WAV", "PCM_16", n_samples=100_000)
    with pytest.raises(AudioError, match="damaged after 3"):
        read(FailingFile(data, 100_000, None))


def test_a_signal_is_never_lost_while_a_file_is_read(tmp_path):
    """An exception that its handler raises, as that of Ctrl-C does, ends the reading at any moment."""
    soundfile.write(tmp_path / "in.wav", np.zeros(2_000_000), 16_000)
    came = []

    def interrupt(*_: object) -> None:
        came.append(True)
        raise KeyboardInterrupt

    def read_on(reader, delay):
        came.clear()
        signal.setitimer(signal.ITIMER_REAL, delay)
        for _ in reader.blocks(50):
            assert not came

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for delay in np.linspace(0.0005, 0.005, 60):
            with AudioReader(tmp_path / "in.wav") as reader, pytest.raises(KeyboardInterrupt):
                read_on(reader, delay)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_failure_leaves_the_folder_as_it_was(tmp_path):
    path = tmp_path / "out.wav"
    path.write_bytes(b"before")
    writer = AudioWriter(path, Encoding("WAV", "PCM_16"), 16_000, 1, 100)
    with suppress(RuntimeError), writer:
        writer.write(noise(100))
        raise RuntimeError("the caller fails")
    assert [p.name for p in tmp_path.iterdir()] == ["out.wav"]
    assert path.read_bytes() == b"before"


@pytest.mark.parametrize("n_samples", [10, 10_000])
@pytest.mark.parametrize("container", ["WAV", "FLAC"])
def test_a_full_disk_is_an_os_error(container, n_samples):
    """FLAC writes a few samples only at its end."""
    with (
        pytest.raises(OSError, match="No space left on device"),
        open("/dev/full", "r+b", buffering=0) as full,
        AudioWriter(full, Encoding(container, "PCM_16"), 16_000, 1, n_samples) as writer,
    ):
        writer.write(noise(n_samples))


def test_a_target_that_is_no_file_is_refused(tmp_path):
    with pytest.raises(ParameterError, match="is not a file"):
        AudioWriter(tmp_path, Encoding("WAV", "PCM_16"), 16_000, 1, 1)
