"""Around every request: failures become declared problems, and each leaves one log line and its metrics."""

import asyncio
import logging
import time
from typing import Any

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.access import peer_of
from service.errors import StoppingError, answer_for, problem
from service.logs import logger
from service.metrics import Metrics

# Asked every few seconds by machines; a line each would bury the others.
_QUIET = {"/healthz", "/readyz", "/metrics"}


class Observe:
    """ASGI middleware; an endpoint adds to its log line through `request.state.line`."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        peer = peer_of(HTTPConnection(scope))
        line: dict[str, Any] = {"status": None, "request_bytes": 0, "response_bytes": 0, "peer": peer}
        scope.setdefault("state", {})["line"] = line

        unread = any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"])

        async def counted_receive() -> Message:
            nonlocal unread
            message = await receive()
            unread = unread and message.get("more_body", False)
            line["request_bytes"] += len(message.get("body", b""))
            return message

        async def counted_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                line["status"] = message["status"]
                if unread:  # or the server would go on reading what nobody wants
                    message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            line["response_bytes"] += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, counted_receive, counted_send)
        except asyncio.CancelledError:
            await self._fail(StoppingError("the service is stopping"), scope, receive, counted_send)
        except Exception as error:
            await self._fail(error, scope, receive, counted_send)
        finally:
            self._record(scope, line, time.perf_counter() - started)

    async def _fail(self, error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
        line = scope["state"]["line"]
        answer = answer_for(error)
        line["error"] = answer.code
        if answer.http_status == 500:
            logger.error("request failed", exc_info=error)
        else:
            line["detail"] = str(error)
        if line["status"] is None:  # otherwise it is too late, and the server cuts the connection
            await problem(error)(scope, receive, send)

    def _record(self, scope: Scope, line: dict[str, Any], seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        self.metrics.request_duration.labels(route, line["status"]).observe(seconds)
        self.metrics.request_size.labels(route).observe(line["request_bytes"])
        self.metrics.response_size.labels(route).observe(line["response_bytes"])
        if "error" in line:
            self.metrics.errors.labels(line["error"]).inc()
        level = logging.DEBUG if route in _QUIET else logging.INFO
        fields = {
            "method": scope["method"],
            "path": scope["path"],
            **line,
            "duration_seconds": round(seconds, 6),
        }
        logger.log(level, "request", extra={"fields": fields})
