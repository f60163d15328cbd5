"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import errno
import json
import logging
import re
from collections.abc import Collection, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from veneer.errors import (
    ContextExceeded,
    Missing,
    QueueFull,
    RequestError,
    StorageError,
    UnknownModel,
    VeneerError,
    joined,
    nearest,
)
from veneer.serve.api import job_protocol, protocol

log = logging.getLogger("veneer.serve")

TYPE_NAMES = frozenset("[]-() ")  # characters of pydantic's names of types, as in list[Text]
MESSAGE = re.compile(r"^(?:Input|List|String|Value|Dictionary) (should)|^Value error, ")
RETRY_SECONDS = 2  # about what a slot takes to become free
FULL = (errno.ENOSPC, errno.EDQUOT)
# What a client is told; where the files are, and how a command goes on, is for the log.
NOT_KEPT = "The server's disk is full, or fails, and nothing of the request was kept."
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
TYPES |= {429: "rate_limit_error", 503: "service_unavailable"}
# The status and the code of each of our errors; the first class that fits holds.
STATUSES: tuple[tuple[type[VeneerError], int, str | None], ...] = (
    (UnknownModel, 404, "model_not_found"),
    (ContextExceeded, 400, "context_length_exceeded"),
    (Missing, 404, "not_found"),
    (QueueFull, 429, "queue_full"),
    (StorageError, 507, "storage"),
    (VeneerError, 400, None),
)


class ErrorDetail(BaseModel):
    """What is wrong, and with which parameter."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every response with an error."""

    error: ErrorDetail


# For the schema: every route may answer so.
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody},
    "5XX": {"model": ErrorBody},
}


class ApiError(Exception):
    """A response with an error: an HTTP status, and what its body says."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int = RETRY_SECONDS,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    @classmethod
    def of(cls, error: Exception, request_id: str) -> ApiError:
        """Return the response that an error means."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, StorageError) or (isinstance(error, OSError) and error.errno in FULL):
            error = StorageError(NOT_KEPT)
        for kind, status, code in STATUSES:
            if isinstance(error, kind):
                return cls(status, str(error), param=getattr(error, "param", None), code=code)
        # What went wrong inside is for the log, not for the client.
        return cls(500, f"The server failed at request {request_id}; its log says why.")

    @property
    def headers(self) -> dict[str, str]:
        """Return the headers that belong to the status."""
        if self.status == 401:
            return {"www-authenticate": "Bearer"}
        return {"retry-after": str(self.retry_after)} if self.status in (429, 503) else {}

    def body(self) -> dict[str, Any]:
        """Return the error in OpenAI's shape."""
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = TYPES.get(self.status, default)
        detail = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": detail}

    def response(self) -> Response:
        """Return the response. ASCII alone: a message may quote half a character."""
        text = json.dumps(self.body())
        return Response(text, self.status, headers=self.headers, media_type="application/json")


def log_failure(error: BaseException, request_id: str) -> None:
    """Write an unexpected error into the log, with its traceback."""
    log.error("Request %s failed.", request_id, exc_info=error)


def failed(error: Exception, request_id: str) -> ApiError:
    """Return the response that an error means; an unexpected one is logged before."""
    response = ApiError.of(error, request_id)
    if response.status >= 500 and response is not error:
        log_failure(error, request_id)
    return response


def install(app: FastAPI) -> None:
    """Let every error of `app`, its framework's own too, be answered in OpenAI's shape."""

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> Response:
        problems = invalid_parameters(error.errors(), _names_at(request.url.path))
        param = next(filter(None, problems), None)
        text = joined(f"{name or 'the body'} {what}" for name, what in problems.items())
        refusal = RequestError(f"This request cannot be followed: {text}.", param=param)
        return ApiError.of(refusal, request.state.request_id).response()

    @app.exception_handler(HTTPException)
    def http(request: Request, error: HTTPException) -> Response:
        message = {
            404: f"There is nothing at {request.url.path}.",
            405: f"{request.url.path} does not take {request.method}.",
        }.get(error.status_code, str(error.detail))
        response = ApiError(error.status_code, message).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(ApiError)
    @app.exception_handler(VeneerError)
    @app.exception_handler(Exception)
    def ours(request: Request, error: Exception) -> Response:
        request.state.logged = error  # the framework raises unexpected ones again
        return failed(error, request.state.request_id).response()


def _names_at(path: str) -> set[str]:
    """Return the parameters that a route knows."""
    if path.startswith("/v1/fine_tuning"):
        return {*job_protocol.JobRequest.model_fields}
    asked = {*protocol.ChatRequest.model_fields, *protocol.CompletionRequest.model_fields}
    return {*protocol.NEUTRAL, *protocol.IGNORED, *asked}


def invalid_parameters(errors: Sequence[Any], names: Collection[str]) -> dict[str, str]:
    """Return what is wrong with each parameter, from pydantic's errors. names: of those that exist.

    A value that fits none of several types has an error for each. Those count that found the right
    type and looked further.
    """
    by_path: dict[str, dict[str, None]] = {}
    of_value = {_path(error["loc"]) for error in errors if error["type"] == "value_error"}
    for error in errors:
        path = "" if error["type"] == "json_invalid" else _path(error["loc"])
        if path in of_value and error["type"] != "value_error":
            continue
        texts = by_path.setdefault(path, {})
        text = _what(error, names)
        texts[text.removeprefix("should be ") if texts else text] = None
    return {
        path: " or ".join(texts)
        for path, texts in by_path.items()
        if not any(path and other.startswith((f"{path}[", f"{path}.")) for other in by_path)
    }


def _path(loc: Sequence[str | int]) -> str:
    """Return messages[0].content of a place, without pydantic's names of types."""
    names = [name for name in loc[1:] if isinstance(name, int) or TYPE_NAMES.isdisjoint(name)]
    return "".join(f"[{x}]" if isinstance(x, int) else f".{x}" for x in names).removeprefix(".")


def _what(error: Any, names: Collection[str]) -> str:
    name = str(error["loc"][-1])
    match error["type"]:
        case "json_invalid":
            return "is not valid JSON"
        case "missing":
            return "is missing"
        case "extra_forbidden" if len(error["loc"]) > 2 or name in protocol.NEUTRAL:
            values = map(json.dumps, protocol.NEUTRAL.get(name, ()))
            return f"is not supported ({', or give '.join(['leave it out', *values])})"
        case "extra_forbidden":
            return f"is no parameter{nearest(name, names)}"
        case "too_long" | "too_short" if isinstance(error["input"], str):
            # pydantic counts items in whatever has a validator of ours, texts too.
            text = MESSAGE.sub(r"\1", str(error["msg"])).replace(" after validation", "")
            return text.replace(" items", " characters").replace(" item", " character")
        case "model_attributes_type":
            return "should be a JSON object"
        case _:
            return MESSAGE.sub(r"\1", str(error["msg"])).replace(" after validation", "")
