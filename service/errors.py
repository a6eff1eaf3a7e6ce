"""Every way a request can fail, and the one table that says how each is answered."""

import asyncio
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeVar

from starlette.responses import JSONResponse

from percepnet.errors import AudioError, ParameterError, SnapshotError, UnsupportedAudioError

_Result = TypeVar("_Result")


class ServiceError(Exception):
    """Base of the failures that only a service knows; the message is for the caller."""


class MediaTypeError(ServiceError):
    """The request's body is of a kind that is never audio."""


class BodyError(ServiceError):
    """The request's body is empty, incomplete, or not the multipart form it says it is."""


class TooLargeError(ServiceError):
    """The upload, the recording or the result is beyond a limit of this deployment."""


class UploadTimeoutError(ServiceError):
    """The caller stopped sending in the middle of the upload."""


class BusyError(ServiceError):
    """No room for another file or stream now."""

    retry_seconds = 1.0
    """When a stream should come back: calls end all the time."""


class CrowdedError(BusyError):
    """No room here, but another worker of the service has some."""

    retry_seconds = 0.3  # by then, this worker has sent its callers away


class LimitError(BusyError):
    """One caller has as many files or streams as it may."""


class UnauthenticatedError(ServiceError):
    """The caller did not say who it is with a known API key or a certificate."""


class StoppingError(ServiceError):
    """The process ends before the file is done."""


class IdleError(ServiceError):
    """A live stream sent nothing for too long."""


class SlowReaderError(ServiceError):
    """A live stream did not read its answers for too long."""


class AheadError(ServiceError):
    """A session that shares its RPC sent more than it may have unanswered."""


class ClientGoneError(ServiceError):
    """The caller hung up: nobody reads the answer, but the log and the metrics name what happened."""


@dataclass(frozen=True)
class Answer:
    """How a failure is told to the caller."""

    code: str
    """Stable name for programs."""
    http_status: int
    grpc_code: str
    """A name of `grpc.StatusCode`."""
    meaning: str


ANSWERS: dict[type[Exception], Answer] = {
    AudioError: Answer(
        "unusable_audio", 400, "INVALID_ARGUMENT", "The audio is empty, truncated, damaged or out of range."
    ),
    BodyError: Answer("bad_body", 400, "INVALID_ARGUMENT", "The body is empty, incomplete or malformed."),
    UploadTimeoutError: Answer("upload_timeout", 408, "DEADLINE_EXCEEDED", "The upload stopped midway."),
    TooLargeError: Answer(
        "too_large",
        413,
        "RESOURCE_EXHAUSTED",
        "The upload, its duration or its channel count exceeds a limit.",
    ),
    MediaTypeError: Answer(
        "unsupported_media_type", 415, "INVALID_ARGUMENT", "The body's content type is never audio."
    ),
    UnsupportedAudioError: Answer(
        "not_audio", 415, "INVALID_ARGUMENT", "The file is not audio, or of no accepted format."
    ),
    ParameterError: Answer(
        "bad_parameter", 422, "INVALID_ARGUMENT", "A parameter is unknown, given twice or out of range."
    ),
    SnapshotError: Answer(
        "state_refused",
        409,
        "FAILED_PRECONDITION",
        "The state that a live stream should go on from is refused.",
    ),
    IdleError: Answer("idle", 408, "DEADLINE_EXCEEDED", "The live stream sent nothing for too long."),
    SlowReaderError: Answer(
        "slow_reader", 408, "RESOURCE_EXHAUSTED", "The live stream did not read its answers."
    ),
    AheadError: Answer(
        "ahead", 429, "RESOURCE_EXHAUSTED", "The session sent more than it may have unanswered."
    ),
    ClientGoneError: Answer("client_gone", 499, "CANCELLED", "The caller hung up."),
    UnauthenticatedError: Answer(
        "unauthenticated", 401, "UNAUTHENTICATED", "A known API key or a client certificate is needed."
    ),
    LimitError: Answer(
        "too_many", 429, "RESOURCE_EXHAUSTED", "This caller has as many files or streams as it may."
    ),
    BusyError: Answer("busy", 503, "RESOURCE_EXHAUSTED", "Too many files are being worked on; try again."),
    StoppingError: Answer("stopping", 503, "UNAVAILABLE", "The service is stopping; try again."),
    Exception: Answer("internal", 500, "INTERNAL", "The service failed; the fault is not the caller's."),
}
"""Looked up by the exception's class, then by its bases, nearest first."""

NOT_ABOUT_FILES = (AheadError, ClientGoneError, IdleError, SlowReaderError, SnapshotError)
"""Never told to the caller of `/enhance`."""

RETRY_AFTER_SECONDS = 5
"""When to come back after a 429 or 503: a file takes about a second a minute of audio."""

PROBLEM_SCHEMA: dict[str, Any] = {
    "type": "object",
    "description": "A problem as RFC 9457 defines it.",
    "required": ["title", "status", "detail", "code"],
    "properties": {
        "title": {"type": "string", "description": "The HTTP status in words."},
        "status": {"type": "integer", "description": "The HTTP status."},
        "detail": {"type": "string", "description": "What came and what is accepted, for people."},
        "code": {"type": "string", "description": "What went wrong, for programs."},
    },
}


def answer_for(error: Exception) -> Answer:
    """The row of the table that fits an exception best."""
    return next(ANSWERS[kind] for kind in type(error).__mro__ if kind in ANSWERS)


def outcome(error: BaseException) -> str:
    """What logs and metrics call it; who cancels is a caller that is gone."""
    return answer_for(error if isinstance(error, Exception) else ClientGoneError()).code


def told(error: Exception) -> str:
    """What the caller is told: an undeclared exception tells nothing about the service's inside."""
    answer = answer_for(error)
    return answer.meaning if answer.code == "internal" else str(error)


def logged(error: BaseException) -> dict[str, str]:
    """What a log line tells of a failure, whose text may hold as much of the request as the caller likes."""
    detail = {"detail": f"{told(error):.500}"} if isinstance(error, Exception) else {}
    return {"outcome": outcome(error)} | detail


async def within(seconds: float, work: Awaitable[_Result], error: Exception) -> _Result:
    """Await some work, but not for longer; raises the error then."""
    try:
        async with asyncio.timeout(seconds):
            return await work
    except TimeoutError:
        raise error from None


def problem(error: Exception) -> JSONResponse:
    """The answer to a failed request: a problem document (RFC 9457) with a stable `code`."""
    answer = answer_for(error)
    headers = {}
    if answer.http_status in (429, 503):
        headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    elif answer.http_status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return problem_response(answer.http_status, answer.code, told(error), headers)


def problem_response(status: int, code: str, detail: str, headers: dict[str, str]) -> JSONResponse:
    """A problem document with the status' own words as its title."""
    title = HTTPStatus(status).phrase if status != 499 else "Client Closed Request"
    document = {"title": title, "status": status, "detail": detail, "code": code}
    return JSONResponse(document, status, headers, media_type="application/problem+json")


def documented_problems(kinds: Iterable[type[Exception]]) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's `responses` for the failures an operation declares, joined by status."""
    responses: dict[int | str, dict[str, Any]] = {}
    for answer in (ANSWERS[kind] for kind in kinds):
        entry = responses.setdefault(
            answer.http_status,
            {"description": "", "content": {"application/problem+json": {"schema": PROBLEM_SCHEMA}}},
        )
        entry["description"] = f"{entry['description']} `{answer.code}`: {answer.meaning}".strip()
    return responses
