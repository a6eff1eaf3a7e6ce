"""Live hand-over: the states of streams, signed by one server for a single stream of another one.

All servers of a service share keys. A state travels with the caller, who could change it, keep it or send it
twice; so it is signed, tells when it was made, and names the challenge of the stream that it is for.
"""

import hmac
import re
import secrets
import struct
import time

from percepnet.errors import ParameterError, SnapshotError
from service.settings import Settings
from service.watched import Watched

LIFETIME_SECONDS = 60.0
"""Age up to which a state is accepted: callers need some milliseconds, the rest is for clocks that differ."""

MAX_STATE_BYTES = 64_000

CHALLENGE_BYTES = 16

_PURPOSE = b"percepnet-handover-1"  # what else is signed with the same keys, now or later, is no state
_DIGEST = "sha256"
_DIGEST_BYTES = 32
_HEAD = struct.Struct(f"> {CHALLENGE_BYTES}s d")  # the challenge, and when the state was made (Unix time)
_KEY = re.compile(r"[!-~]{32,256}")


def parse_keys(text: str) -> list[bytes]:
    """Read keys, one a line; # begins a comment line. The first one signs, all are accepted.

    Raises:
        ValueError: a line is no key, or there is none; the message holds no key.
    """
    keys = []
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if not line or line.startswith("#"):
            continue
        if not _KEY.fullmatch(line):
            raise ValueError(f"keys of 32 to 256 visible characters; not so in line {number}")
        keys.append(line.encode())
    if not keys:
        raise ValueError("at least one key of 32 to 256 visible characters")
    return keys


class Seals:
    """Signs states and checks them, with the keys that all servers of a service share.

    Raises FilesError if the file of keys cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        file = settings.handover_keys_file
        self._file = None if file is None else Watched([file], lambda: parse_keys(file.read_text()))

    def challenge(self) -> bytes:
        """For a new stream; empty if there are no keys."""
        return secrets.token_bytes(CHALLENGE_BYTES) if self._keys else b""

    def seal(self, snapshot: bytes, challenge: bytes) -> bytes:
        """Make a state for the stream with a challenge; raises ParameterError if that cannot be."""
        if not self._keys:
            raise ParameterError("hand_over: this server has no key, and hands no stream over")
        if len(challenge) != CHALLENGE_BYTES:
            raise ParameterError(
                f"hand_over.challenge: {len(challenge)} bytes; a challenge has {CHALLENGE_BYTES}"
            )
        body = _HEAD.pack(challenge, time.time()) + snapshot
        assert _DIGEST_BYTES + len(body) <= MAX_STATE_BYTES
        return _sign(self._keys[0], body) + body

    def open(self, state: bytes, challenge: bytes) -> bytes:
        """The snapshot in a state for the stream with a challenge; raises SnapshotError."""
        signature, body = state[:_DIGEST_BYTES], state[_DIGEST_BYTES:]
        known = [hmac.compare_digest(signature, _sign(key, body)) for key in self._keys]
        if not any(known) or len(body) < _HEAD.size:
            raise SnapshotError("resume.state: not signed with a key of this service")
        made_for, made_at = _HEAD.unpack_from(body)
        if not hmac.compare_digest(made_for, challenge):
            raise SnapshotError("resume.state: made for another stream")
        age_seconds = time.time() - made_at
        if abs(age_seconds) > LIFETIME_SECONDS:
            raise SnapshotError(
                f"resume.state: made {age_seconds:.0f} s ago; accepted are {LIFETIME_SECONDS:.0f} s"
            )
        return body[_HEAD.size :]

    @property
    def _keys(self) -> list[bytes]:
        return [] if self._file is None else self._file.value


def _sign(key: bytes, body: bytes) -> bytes:
    return hmac.digest(key, _PURPOSE + body, _DIGEST)
