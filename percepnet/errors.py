"""What can go wrong, by whose fault: every error raised on purpose derives from `PercepNetError`."""


class PercepNetError(Exception):
    """Base of all declared errors; the message says what came and what is accepted."""


class ParameterError(PercepNetError):
    """The caller's parameter is outside what is accepted: a type, a shape, a range, a name."""


class AudioError(PercepNetError):
    """The caller's audio cannot be enhanced: damaged, truncated, empty, not finite, a rate out of range."""


class UnsupportedAudioError(AudioError):
    """The caller's file is not audio, or none of the accepted formats."""


def reason(error: Exception) -> str:
    """An error in one line, for who called a command."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return str(error)


class SnapshotError(PercepNetError):
    """Bytes that are no snapshot of a stream, or one of another version, model, or kind of stream."""
