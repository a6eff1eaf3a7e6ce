"""What the service takes: for itself, and for clients that tell their callers before they send it."""

MIN_RATE_HZ, MAX_RATE_HZ = 8_000, 48_000

MAX_MESSAGE_SECONDS = 1
"""Of audio of a live stream."""

MAX_GRPC_MESSAGE_BYTES = 4 * 1024 * 1024
"""Of any message, both ways: what gRPC's clients take by default."""

MAX_CLIP_SECONDS = 60

MAX_CLIP_BYTES = MAX_GRPC_MESSAGE_BYTES - 1024
"""Of a clip's samples: its message and the answer hold a little more."""


def longest_clip(rate_hz: int, sample_bytes: int) -> int:
    """Samples that a clip may have, whose samples have so many bytes each."""
    return min(rate_hz * MAX_CLIP_SECONDS, MAX_CLIP_BYTES // sample_bytes)
