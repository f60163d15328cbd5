"""Refusals in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from veneer.errors import QueueFull, VeneerError

RETRY_SECONDS = 2  # about what a slot takes to become free
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
TYPES |= {429: "rate_limit_error", 503: "service_unavailable"}


class ErrorDetail(BaseModel):
    """What is wrong, and with which parameter."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """What every refusal looks like."""

    error: ErrorDetail


class Fault(Exception):
    """A request that is refused with a status and a message for a person."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def headers(self) -> dict[str, str]:
        """Return the headers that belong to the status."""
        if self.status == 401:
            return {"www-authenticate": "Bearer"}
        return {"retry-after": str(RETRY_SECONDS)} if self.status in (429, 503) else {}

    def body(self) -> dict[str, Any]:
        """Return the refusal in OpenAI's shape."""
        usual = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = TYPES.get(self.status, usual)
        detail = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": detail}

    def response(self) -> Response:
        """Return the refusal as a response. ASCII alone: a message may quote half a character."""
        text = json.dumps(self.body())
        return Response(text, self.status, headers=self.headers, media_type="application/json")


def as_fault(error: Exception) -> Fault:
    """Return the refusal that an error of ours means."""
    if isinstance(error, Fault):
        return error
    if isinstance(error, QueueFull):
        return Fault(429, str(error), code="queue_full")
    if isinstance(error, VeneerError):
        return Fault(400, str(error))
    # What went wrong inside is for the log, not for whoever asks.
    return Fault(500, "The server failed at this request; its log says why.")


def install(app: FastAPI) -> None:
    """Let every refusal of `app`, its framework's own too, have OpenAI's shape."""

    @app.exception_handler(RequestValidationError)
    def invalid(_: Request, error: RequestValidationError) -> Response:
        problems = [_problem(each) for each in error.errors()]
        param = next((name for name, _ in problems if name), None)
        said = "; ".join(f"{name}: {text}" if name else text for name, text in problems)
        return Fault(400, f"This request cannot be followed: {said}.", param=param).response()

    @app.exception_handler(HTTPException)
    def http(request: Request, error: HTTPException) -> Response:
        said = {
            404: f"There is nothing at {request.url.path}.",
            405: f"{request.method} is not what {request.url.path} answers to.",
        }.get(error.status_code, str(error.detail))
        response = Fault(error.status_code, said).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Fault)
    @app.exception_handler(VeneerError)
    @app.exception_handler(Exception)
    def ours(_: Request, error: Exception) -> Response:
        return as_fault(error).response()


def _problem(error: Any) -> tuple[str, str]:
    """Return (parameter, what is wrong with it) of one of pydantic's errors."""
    place = [str(part) for part in error["loc"] if part != "body"]
    if error["type"] == "json_invalid":
        return "", "the body is not valid JSON"
    if error["type"] == "extra_forbidden":
        return place[-1], "is not supported here"
    return ".".join(place), str(error["msg"])
