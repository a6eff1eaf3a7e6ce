"""Who sends a request."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Caller:
    """Who sends a request, as far as the log tells."""

    peer: str
    """Address and port: one connection."""
    traceparent: str | None = None
    """The caller's trace (W3C Trace Context)."""

    @property
    def fields(self) -> dict[str, str]:
        """What a log line tells of it."""
        return {name: value for name, value in vars(self).items() if value is not None}
