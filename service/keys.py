"""API keys: who may use the service, by a name that logs may tell."""

import hashlib
import hmac
import re

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


def find(entries: Entries, key: str) -> str | None:
    """The name of a key, or None; all are compared, in constant time, so that the time tells nothing."""
    digest = _digest(key)
    names = [name for name, known in entries if hmac.compare_digest(digest, known)]
    return names[0] if names else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="replace")).digest()
