"""Audio files in and out, block by block: WAV, FLAC, Ogg (Vorbis, Opus), and MP3 in."""

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, TypeVar

import numpy as np
import soundfile

from percepnet.errors import AudioError, ParameterError, UnsupportedAudioError
from percepnet.resample import MAX_RATE, MIN_RATE

ACCEPTED = "WAV, FLAC, Ogg (Vorbis, Opus) and MP3"

FORMATS = ("wav", "flac", "ogg", "opus")
"""What can be written."""

FORMAT_OF_SUFFIX = {
    ".wav": "wav",
    ".wave": "wav",
    ".flac": "flac",
    ".ogg": "ogg",
    ".oga": "ogg",
    ".opus": "opus",
}
READABLE_SUFFIXES = (*FORMAT_OF_SUFFIX, ".mp3")

OPUS_RATES = (8_000, 12_000, 16_000, 24_000, 48_000)

MAX_CHANNELS = {"FLAC": 8, "OGG": 255}
"""What the containers hold; libsndfile crashes on more in Ogg. WAV has the 1024 of libsndfile."""

MAX_WAV_BYTES = (1 << 32) - (1 << 16)
"""Longer data does not fit a WAV header's 32 bits and is written as RF64."""

UNKNOWN_LENGTH = 0x7FFF_0000
"""Programs that write WAV into a pipe leave a length from here up in its header: it promises nothing."""

MAX_CHUNKS = 1000
"""Chunks of a WAV looked at before its audio; more are an attack, not a recording."""

WRITE_PIECE = 4096
"""Samples per channel handed to libsndfile at once: libvorbis dies of a long write, kept on its stack."""

UNKNOWN_FRAMES = (1 << 63) - 1
"""What libsndfile says of a FLAC that was written into a pipe."""

MP3_LEFTOVER = 4096
"""Bytes of frames at most that hold nothing but an MP3 encoder's padding."""

PROMISE_TOLERANCE_SECONDS = 0.1
"""MP3 headers miscount by a few frames; what is missing beyond this was cut off."""

_Result = TypeVar("_Result")

PCM_BITS = {"PCM_U8": 8, "PCM_S8": 8, "PCM_16": 16, "PCM_24": 24, "PCM_32": 32}


@dataclass(frozen=True)
class Encoding:
    """How a file is written, in libsndfile's names."""

    container: str
    subtype: str


class _CallersFile:
    """A binary file that libsndfile calls back. What the file raises would be lost there, so it is kept."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._error: BaseException | None = None

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._call(0, self._file.seek, offset, whence)

    def tell(self) -> int:
        return self._call(0, self._file.tell)

    def read(self, size: int) -> bytes:
        return self._call(b"", self._file.read, size)

    def write(self, data: bytes) -> int:
        return self._call(0, self._file.write, data)

    def raise_error(self) -> None:
        """Raise what the file raised since it was last asked."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _call(self, nothing: _Result, method: Callable[..., _Result], *arguments: Any) -> _Result:
        try:
            return method(*arguments)
        except BaseException as error:
            self._error = self._error or error
            return nothing


class _SequentialFile(soundfile.SoundFile):
    """A file that is read or written from start to end.

    file: a path or a file descriptor, which stays open and which libsndfile reads by itself, so that no
    signal can get lost in a callback; or a binary file.

    soundfile seeks after each block of a seekable file. An MP3 then loses the data that its frames borrow
    from earlier ones, audibly.
    """

    def __init__(self, file: int | Path | BinaryIO, *arguments: Any, **options: Any) -> None:
        self._called: _CallersFile | None = None
        to_open: Any = file
        if isinstance(file, Path):
            to_open = os.fsencode(file)  # soundfile knows no names beyond the locale's letters
        elif not isinstance(file, int):
            to_open = self._called = _CallersFile(file)
        try:
            super().__init__(to_open, *arguments, closefd=False, **options)
        except soundfile.LibsndfileError:
            with self._raising():
                raise

    def seekable(self) -> bool:
        return False

    def read(self, *arguments: Any, **options: Any) -> Any:
        with self._raising():
            return super().read(*arguments, **options)

    def write(self, data: Any) -> None:
        with self._raising():
            super().write(data)

    def close(self) -> None:
        with self._raising():
            super().close()

    @contextmanager
    def _raising(self) -> Iterator[None]:
        try:
            yield
        finally:
            if self._called is not None:
                self._called.raise_error()


class AudioReader:
    """An audio file open for reading, whose header was checked.

    source: a path or a seekable binary file, which is read from its start and stays open.
    Raises UnsupportedAudioError for what is none of the accepted formats, AudioError for a damaged, truncated
    or empty file and for a sample rate outside 8–192 kHz, OSError for a path that cannot be read.
    """

    def __init__(self, source: str | Path | BinaryIO) -> None:
        with ExitStack() as opened:
            file: BinaryIO
            to_read: int | BinaryIO
            if isinstance(source, str | Path):
                file = opened.enter_context(open(source, "rb", buffering=0))
                to_read = file.fileno()
            else:
                file = to_read = source
            _check_start(file)
            _check_end(file)
            self._guessed = _is_mp3_of_unknown_length(file)
            file.seek(0)
            try:
                self._sound = opened.enter_context(_SequentialFile(to_read))
            except soundfile.LibsndfileError as error:
                raise AudioError(f"the file is damaged or truncated: {error.error_string}") from error
            self._check_header()
            self._file = file
            self._opened = opened.pop_all()

    def _check_header(self) -> None:
        self.sample_rate: int = self._sound.samplerate
        self.channels: int = self._sound.channels
        self.subtype: str = self._sound.subtype
        frames: int = self._sound.frames
        self.n_samples = 0 if frames == UNKNOWN_FRAMES or self._guessed else frames
        """Per channel, as the header promises; 0 if it does not say."""
        _check_rate(self.sample_rate)
        if frames <= 0:
            raise AudioError("the file holds no samples")

    def blocks(self, size: int) -> Iterator[np.ndarray]:
        """Read on in blocks of (channels, size) float32, full scale ±1; the last one may be shorter.

        Raises AudioError where the data is damaged, ends before what the header promises, or is not finite.
        """
        done = 0
        while len(block := self._read(size, done)):
            if done % size:  # only the last block may be shorter
                raise AudioError(f"the file is damaged after {done / self.sample_rate:.1f} s")
            finite = np.isfinite(block)
            if not finite.all():
                sample, channel = np.argwhere(~finite)[0]
                raise AudioError(
                    f"sample {done + sample} ({(done + sample) / self.sample_rate:.3f} s) of channel "
                    f"{channel + 1} is {block[sample, channel]}; all samples must be finite numbers"
                )
            done += len(block)
            yield block.T
        tolerance = PROMISE_TOLERANCE_SECONDS * self.sample_rate if self._sound.format == "MP3" else 0
        if self.n_samples - done > tolerance or not done:
            raise AudioError(
                f"the file is truncated: its header promises {self.n_samples} samples, it holds {done}"
            )
        if self._sound.format == "MP3":
            self._check_mp3_end(done)

    def _check_mp3_end(self, done: int) -> None:
        """libsndfile stops where its guess of the length is too short, or where another file begins."""
        rest = self._file.read(MP3_LEFTOVER + 1)
        if len(rest) > MP3_LEFTOVER and (self._guessed or _is_mpeg_frame(rest)):
            raise AudioError(
                f"the MP3 goes on after the {done} samples that its start promises: it has a variable bit "
                "rate and no Xing header, or is several files in one; convert it to FLAC or WAV"
            )

    def _read(self, size: int, done: int) -> np.ndarray:
        try:
            return self._sound.read(size, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            seconds = done / self.sample_rate
            raise AudioError(
                f"the file is damaged or truncated after {seconds:.1f} s: {error.error_string}"
            ) from error

    def close(self) -> None:
        """Close what this reader opened."""
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class AudioWriter:
    """An audio file open for writing.

    target: a path, or a seekable binary file, which stays open. A path comes into being (or is replaced) when
    the `with` block ends well; when it ends in an exception, nothing is left behind.
    n_samples: samples per channel expected; decides between WAV and RF64.
    """

    def __init__(
        self,
        target: str | Path | BinaryIO,
        encoding: Encoding,
        sample_rate: int,
        channels: int,
        n_samples: int,
    ) -> None:
        self.n_samples = 0
        """Samples per channel written so far."""
        self.clipped_samples = 0
        """Samples, over all channels, saturated at full scale; a float file holds them as they are."""
        self._subtype = encoding.subtype
        container = encoding.container
        if container == "WAV" and n_samples * channels * _bytes(encoding.subtype) > MAX_WAV_BYTES:
            container = "RF64"
        elif container == "WAV" and channels > 2:
            container = "WAVEX"
        self._path: Path | None = None
        file: BinaryIO | Path
        if isinstance(target, str | Path):
            self._path = Path(target).resolve()
            file = self._partial = self._path.with_name(f".{os.getpid()}-{id(self):x}.part")
            if self._path.exists() and not self._path.is_file():
                raise ParameterError(f"{target} is there and is not a file")
            self._partial.touch()  # An unwritable folder is an OSError that names it.
        else:
            file = target
        try:
            self._sound = _SequentialFile(
                file, "w", sample_rate, channels, encoding.subtype, format=container
            )
        except soundfile.LibsndfileError as error:
            self._discard()
            raise ParameterError(
                f"{encoding.container} cannot hold {channels} channels of {encoding.subtype} at "
                f"{sample_rate} Hz: {error.error_string}"
            ) from error

    def write(self, samples: np.ndarray) -> None:
        """Append (channels, n) float32 samples, saturated at full scale where the encoding ends there."""
        for first in range(0, samples.shape[1], WRITE_PIECE):
            piece = samples[:, first : first + WRITE_PIECE].T
            encoded, clipped = _encodable(piece, self._subtype)
            try:
                self._sound.write(encoded)
            except (AssertionError, soundfile.LibsndfileError) as error:
                # soundfile only asserts that all was written.
                raise OSError(f"writing failed after {self.n_samples} samples; is the disk full?") from error
            self.n_samples += len(piece)
            self.clipped_samples += clipped

    def _discard(self) -> None:
        if self._path is not None:
            self._partial.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._sound.close()
            if kind is None and self._path is not None:
                self._partial.replace(self._path)
        finally:
            self._discard()


def choose_encoding(target: str | Path | BinaryIO, name: str | None, source: AudioReader) -> Encoding:
    """Choose how the enhanced source is written: its own PCM bit depth, or the nearest that the format has.

    name: one of FORMATS; None goes by the target's suffix, or is "wav" for a binary file. "ogg" is Vorbis
    unless the source is Opus. Raises ParameterError for what cannot be written.
    """
    if name is None:
        suffix = Path(target).suffix.lower() if isinstance(target, str | Path) else ".wav"
        if suffix not in FORMAT_OF_SUFFIX:
            raise ParameterError(
                f"the target's suffix is {suffix!r}; accepted are {', '.join(FORMAT_OF_SUFFIX)}"
            )
        name = FORMAT_OF_SUFFIX[suffix]
    if name not in FORMATS:
        raise ParameterError(f"the format {name!r}; accepted are {', '.join(FORMATS)}")
    if name == "ogg" and source.subtype == "OPUS":
        name = "opus"
    encoding = {
        "wav": Encoding("WAV", _wav_subtype(source.subtype)),
        "flac": Encoding("FLAC", _flac_subtype(source.subtype)),
        "ogg": Encoding("OGG", "VORBIS"),
        "opus": Encoding("OGG", "OPUS"),
    }[name]
    if name == "opus" and source.sample_rate not in OPUS_RATES:
        raise ParameterError(
            f"Opus cannot hold {source.sample_rate} Hz, only {', '.join(map(str, OPUS_RATES))} Hz; "
            "choose wav, flac or ogg (Vorbis)"
        )
    if source.channels > MAX_CHANNELS.get(encoding.container, source.channels):
        raise ParameterError(
            f"{encoding.container} holds at most {MAX_CHANNELS[encoding.container]} channels, "
            f"the audio has {source.channels}; choose wav"
        )
    return encoding


def _wav_subtype(subtype: str) -> str:
    if subtype == "PCM_S8":
        return "PCM_U8"
    kept = ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW")
    return subtype if subtype in kept else "PCM_16"


def _flac_subtype(subtype: str) -> str:
    finest = ("PCM_24", "PCM_32", "FLOAT", "DOUBLE")
    return "PCM_S8" if PCM_BITS.get(subtype) == 8 else "PCM_24" if subtype in finest else "PCM_16"


def _bytes(subtype: str) -> int:
    """Bytes of a sample, at most."""
    return {"FLOAT": 4, "DOUBLE": 8}.get(subtype, PCM_BITS.get(subtype, 8) // 8)


def _encodable(samples: np.ndarray, subtype: str) -> tuple[np.ndarray, int]:
    """What libsndfile is given, and how many samples were saturated.

    PCM is rounded here, because libsndfile rounds down where it clips; it takes the high bits of int32.
    """
    if subtype in ("FLOAT", "DOUBLE"):
        return samples, 0
    if subtype not in PCM_BITS:
        return np.clip(samples, -1, 1), int(np.count_nonzero(np.abs(samples) > 1))
    bits = PCM_BITS[subtype]
    full_scale = 1 << (bits - 1)
    steps = np.rint(samples.astype(np.float64) * full_scale)
    saturated = np.clip(steps, -full_scale, full_scale - 1)
    return saturated.astype(np.int32) << (32 - bits), int(np.count_nonzero(steps != saturated))


def _check_start(file: BinaryIO) -> None:
    """Refuse what is empty or does not begin like an accepted format."""
    file.seek(0)
    start = file.read(12)
    if not start:
        raise AudioError("the file is empty")
    is_wav = start[:4] in (b"RIFF", b"RF64") and start[8:12] == b"WAVE"
    if not (is_wav or _is_mpeg_frame(start) or start[:4] in (b"fLaC", b"OggS") or start[:3] == b"ID3"):
        raise UnsupportedAudioError(f"the file is not audio that is accepted here: {ACCEPTED}")


def _is_mpeg_frame(data: bytes) -> bool:
    """Eleven set bits, then a version and a layer that is not the reserved 0 (AAC has that)."""
    return len(data) > 1 and data[0] == 0xFF and data[1] & 0xE0 == 0xE0 and data[1] & 0x06 != 0


def _is_mp3_of_unknown_length(file: BinaryIO) -> bool:
    """Whether the first frame is no Xing header with a count: libsndfile then guesses from its bit rate."""
    file.seek(0)
    tag = file.read(10)
    tag_length = sum(byte << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=False))
    file.seek(10 + tag_length if tag[:3] == b"ID3" else 0)
    frame = file.read(64)
    at = max(frame.find(b"Xing"), frame.find(b"Info"))
    flags, n_frames = (int.from_bytes(frame[i : i + 4], "big") for i in (at + 4, at + 8))
    return _is_mpeg_frame(frame) and not (at > 0 and flags & 1 and n_frames)


def _check_end(file: BinaryIO) -> None:
    """Refuse a WAV with less data than its header promises, an Ogg whose last page is missing or another's.

    libsndfile reads such files as if they were shorter. FLAC and MP3 show while they are read.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(18)
    if start[:4] in (b"RIFF", b"RF64"):
        promised, present = _wav_data(file, size)
        if present < promised:
            raise AudioError(
                f"the file is truncated: its header promises {promised} bytes of audio, it holds {present}"
            )
    if start[:4] == b"OggS":
        file.seek(max(0, size - 65_307))  # The longest page.
        tail = file.read()
        page = tail[tail.rfind(b"OggS") :]
        if not _ends_ogg(page):
            raise AudioError("the file is truncated: its last Ogg page is missing or incomplete")
        if page[14:18] != start[14:18]:
            raise AudioError("the file holds several Ogg streams, which would be read as one; split it")


def _check_rate(sample_rate: int) -> None:
    if not MIN_RATE <= sample_rate <= MAX_RATE:
        raise AudioError(
            f"the file has a sample rate of {sample_rate} Hz; accepted are {MIN_RATE} to {MAX_RATE} Hz"
        )


def _wav_data(file: BinaryIO, size: int) -> tuple[int, int]:
    """Bytes of audio that a WAV or RF64 header promises (0: it does not say), and those present.

    The rate is checked on the way: libsndfile calls one of 0 Hz an internal error.
    """
    file.seek(12)
    long_size = 0
    for _ in range(MAX_CHUNKS):
        if len(header := file.read(8)) < 8:
            break
        name, length = struct.unpack("<4sI", header)
        begin = file.tell()
        if name == b"data":
            return length if length < UNKNOWN_LENGTH else long_size, size - begin
        if name == b"ds64" and len(sizes := file.read(16)) == 16:
            long_size = struct.unpack("<8xQ", sizes)[0]
        if name == b"fmt " and len(format := file.read(8)) == 8:
            _check_rate(struct.unpack("<4xI", format)[0])
        file.seek(begin + length + length % 2)
    raise AudioError("the file is truncated: it ends before its audio begins")


def _ends_ogg(page: bytes) -> bool:
    """Whether a page is whole and marked as the end of its stream (RFC 3533, section 6)."""
    if len(page) < 27 or not page[5] & 4:
        return False
    lengths = page[27 : 27 + page[26]]
    return len(page) >= 27 + page[26] + sum(lengths)
