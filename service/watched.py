"""What is read from files, and read again when they change: keys, certificates."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from service.logs import logger

Value = TypeVar("Value")


class FilesError(ValueError):
    """Files of a deployment cannot be used; the message names them."""


class Watched(Generic[Value]):
    """A value made from files.

    It is looked after when it is asked for: there is no task that could die unnoticed. Files that are missing
    or wrong for a while leave the last good value in force, and the log tells.

    files: watched. read: makes the value, or raises OSError or ValueError: at first that is a FilesError.
    """

    def __init__(self, files: Sequence[Path], read: Callable[[], Value]) -> None:
        self._files = files
        self._read = read
        self._names = ", ".join(map(str, files))
        self._stamps = self._stamp()  # before reading: a change meanwhile is then noticed next time
        try:
            self._value = read()
        except (OSError, ValueError) as error:
            raise FilesError(f"{self._names}: {error}") from error

    @property
    def value(self) -> Value:
        """Made from the files as they are now."""
        stamps = self._stamp()
        if stamps != self._stamps:
            self._stamps = stamps
            try:
                self._value = self._read()
            except (OSError, ValueError) as error:
                logger.error(
                    "%s: cannot be used any more, what was read before stays: %s", self._names, error
                )
            else:
                logger.info("%s: changed, and read again", self._names)
        return self._value

    def _stamp(self) -> list[tuple[int, int, int] | None]:
        return [_stamp(file) for file in self._files]


def _stamp(file: Path) -> tuple[int, int, int] | None:
    """Changes when a file does, or what its link points to; None if it is missing."""
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
