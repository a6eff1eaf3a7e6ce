"""Structured logs: one JSON object per line, never any audio."""

import json
import logging
import os
import sys
from datetime import UTC, datetime

logger = logging.getLogger("percepnet.service")


class JsonFormatter(logging.Formatter):
    """A line per record: time, level, process, message, the `fields` given in `extra`, and any traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """Write one record as one line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": record.process,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(level: int) -> None:
    """Send every log line of this process, the server's own included, to standard error as JSON.

    gRPC, if it is loaded later, stays silent unless `GRPC_VERBOSITY` is set: its lines are no JSON, and any
    caller could fill the log with failed handshakes.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # It tells every odd byte of a caller's form, which the request's own line sums up.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
