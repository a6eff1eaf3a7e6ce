"""API keys: who may use the service, by a name that logs may tell."""

import hashlib
import hmac
import re
from collections.abc import Mapping
from pathlib import Path

from service.errors import UnauthenticatedError
from service.watched import Watched

Entries = tuple[tuple[str, bytes], ...]
"""Names and digests of keys. A name may have two keys while its callers change over from one to the other."""

_ENTRY = re.compile(r"(?P<name>[\w.-]{1,64}) *: *(?P<key>[A-Za-z0-9._~+-]{16,256})", re.ASCII)
"""A key's characters may stand in every header, in a WebSocket's subprotocols too."""

_FORMAT = "NAME:KEY, keys of 16 to 256 letters, digits and ._~+-, names of up to 64 letters, digits and ._-"


def parse(text: str) -> Entries:
    """Read `NAME:KEY` entries, one a line or with commas between; # begins a comment line.

    Raises:
        ValueError: an entry is none, or there is none; the message holds no key.
    """
    lines = ("" if line.lstrip().startswith("#") else line for line in text.splitlines())
    entries = []
    for number, line in enumerate(lines, 1):
        for entry in filter(None, map(str.strip, line.split(","))):
            match = _ENTRY.fullmatch(entry)
            if match is None:
                raise ValueError(f"{_FORMAT}; not so in line {number}")
            entries.append((match["name"], _digest(match["key"])))
    if not entries:
        raise ValueError(f"at least one {_FORMAT}")
    return tuple(entries)


class Keys:
    """The keys of a deployment; none at all lets everybody in.

    given: from the environment. file: read again when it changes. Raises FilesError if it cannot be used.
    """

    def __init__(self, given: Entries, file: Path | None) -> None:
        self._given = given
        self._file = None if file is None else Watched([file], lambda: parse(file.read_text()))

    def name_for(self, headers: Mapping[str, str]) -> str | None:
        """The name of the key in some headers (names in lower case); None if no keys are wanted.

        Raises:
            UnauthenticatedError: no known key is there.
        """
        entries = self._given + (() if self._file is None else self._file.value)
        if not entries:
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            key = headers.get("x-api-key", "")
        if not key:
            raise UnauthenticatedError("no API key came; send authorization: Bearer KEY, or x-api-key: KEY")
        digest = _digest(key.strip())
        # All are compared, in constant time: how long it takes tells nothing about any of them.
        matches = [name for name, known in entries if hmac.compare_digest(digest, known)]
        if not matches:
            raise UnauthenticatedError("the API key is not known here")
        return matches[0]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
