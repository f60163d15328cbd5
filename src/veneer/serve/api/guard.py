"""Checks before every route: who may ask, how much, and what a browser may do with a response."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Callable
from urllib.parse import urlsplit
from uuid import uuid4

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from veneer.serve.api.audit import AuditLog
from veneer.serve.api.errors import ApiError, log_failure
from veneer.serve.api.rate import Rates
from veneer.serve.config import Keys, Limits

OPEN = ("/", "/health", "/ready")  # these and the page's own files need no key
PAGE = "/page/"
LOADING = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
PANEL = ("/api/rows", "/api/plan", "/api/jobs", "/api/merges")  # the page's, of training
ADMIN = (*LOADING, "/v1/files", "/v1/fine_tuning", *PANEL)
UPLOAD = "/v1/files"  # takes a form, which is not kept in memory
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
LINGER_SECONDS = 2.0
# The page needs nothing from elsewhere, runs no script but its own, and may be in no frame.
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}


class Guard:
    """Passes a request on to `app` once it is allowed and its body has come.

    is_draining: whether the server is ending and takes no more work. Without an API key the server
    is for this machine alone. A request must then carry one of this machine's own names as its
    host, or any web page could reach the server through a name that it resolves to this address.
    keys: gives the keys as they are now. audit: where requests below ADMIN are written down.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Callable[[], Keys],
        limits: Limits,
        is_draining: Callable[[], bool],
        audit: AuditLog | None = None,
    ) -> None:
        self.app, self.limits, self.is_draining, self.audit = app, limits, is_draining, audit
        self._keys = keys
        self._rates = Rates(limits.per_minute) if limits.per_minute is not None else None
        self.in_flight = 0

    @property
    def keys(self) -> Keys:
        """The keys as they are now."""
        return self._keys()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        try:
            await self._pass_on(scope, receive, with_headers(send, request_id))
        except Exception as error:
            if state.get("logged") is not error:  # the response had begun
                log_failure(error, request_id)

    async def _pass_on(self, scope: Scope, receive: Receive, guarded: Send) -> None:
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        if self.audit is not None and _is_below(scope["path"], ADMIN):
            authorization = headers.get("authorization", "")
            guarded = self.audit.watch(scope, guarded, authorization=authorization)
        try:
            self._check(scope, headers)
        except ApiError as error:
            await _refuse(error, scope, receive, guarded, more=_has_body(headers))
            return
        if not _has_body(headers):
            await self.app(scope, receive, guarded)
            return
        self.in_flight += 1
        try:
            if self._is_upload(scope):
                await self.app(scope, self._limited(receive), guarded)
                return
            body = await self._read(receive)
            if body is not None:  # else the client has disconnected
                await self.app(scope, _replay(body, receive), guarded)
        except ApiError as error:
            await _refuse(error, scope, receive, guarded, more=True)
        finally:
            self.in_flight -= 1

    def _check(self, scope: Scope, headers: dict[str, str]) -> None:
        """Raise ApiError for a request that is not allowed, before its body is read."""
        path, method, keys = scope["path"], scope["method"], self.keys
        if keys.api is None and not _is_local(headers.get("host", "")):
            raise ApiError(
                403,
                "Without an API key this server answers to localhost and 127.0.0.1 alone; start "
                "it with an API key to call it otherwise.",
                code="host_not_allowed",
            )
        needed, which = keys.api, "the API key"
        # Without an admin key, the route answers that it is off.
        if _is_below(path, ADMIN) and keys.admin is not None:
            needed, which = keys.admin, "the admin key"
        elif path in OPEN or path.startswith(PAGE):
            needed = None
        if needed is not None and not _same(headers.get("authorization", ""), needed):
            message = f"This needs {which}, as in: Authorization: Bearer KEY."
            raise ApiError(401, message, code="invalid_api_key")
        if method not in ("POST", "PUT", "PATCH"):
            return
        if self.is_draining():
            raise ApiError(503, "The server is about to end.", code="draining")
        if self._rates is not None:
            # The key is a right one by now: whoever has none has been refused.
            caller = _token(headers.get("authorization", "")) if needed else _address(scope)
            if seconds := self._rates.wait_of(caller):
                raise ApiError(
                    429,
                    f"More than {self._rates.per_minute:,} requests came within a minute; come "
                    f"again in {seconds} s.",
                    code="rate_limit_exceeded",
                    retry_after=seconds,
                )
        length = headers.get("content-length", "0")
        is_upload = self._is_upload(scope)
        most = self.limits.upload_bytes if is_upload else self.limits.body_bytes
        if not length.isdigit() or int(length) > most:
            raise _too_large(most)
        # A browser lets a page of another site post text or forms, but JSON only if we allow it;
        # and a form without the admin key has been refused above.
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        expected = "multipart/form-data" if is_upload else "application/json"
        if kind != expected:
            what = "a form" if is_upload else "JSON"
            raise ApiError(415, f"The body must be {what}, with the content type {expected}.")
        if self.in_flight >= self.limits.in_flight:
            raise ApiError(429, "Too many requests at once; come again later.", code="too_many")

    async def _read(self, receive: Receive) -> bytes | None:
        """Return the whole body, or None where the connection ended before it. Raises ApiError."""
        chunks, size = [], 0
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        return None
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > self.limits.body_bytes:
                        raise _too_large(self.limits.body_bytes)
                    if not message.get("more_body", False):
                        return b"".join(chunks)
        except TimeoutError as error:
            seconds = f"{self.limits.body_seconds:g}"
            raise ApiError(408, f"The body took over {seconds} s to come.") from error

    def _is_upload(self, scope: Scope) -> bool:
        """Return whether a request may bring a file. Without an admin key none does."""
        takes = self.limits.upload_bytes > 0 and self.keys.admin is not None
        return takes and scope["method"] == "POST" and scope["path"] == UPLOAD

    def _limited(self, receive: Receive) -> Receive:
        """Return a `receive` that raises ApiError for a form that is too large, or stops coming."""
        size, most, seconds = 0, self.limits.upload_bytes, self.limits.body_seconds
        is_whole = False

        async def limited() -> Message:
            nonlocal size, is_whole
            if is_whole:
                return await receive()
            try:
                async with asyncio.timeout(seconds):
                    message = await receive()
            except TimeoutError as error:
                raise ApiError(408, f"The file stopped coming for {seconds:g} s.") from error
            size += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if size > most:
                raise _too_large(most)
            return message

        return limited


def with_headers(send: Send, request_id: str) -> Send:
    """Return `send` that adds HEADERS and the request's id (as OpenAI's responses have it) to each
    response that does not set them itself."""
    headers = {**HEADERS, "x-request-id": request_id}

    async def guarded(message: Message) -> None:
        if message["type"] == "http.response.start":
            names = {name for name, _ in message["headers"]}
            more = [(name.encode(), value.encode()) for name, value in headers.items()]
            missing = [(name, value) for name, value in more if name not in names]
            message = {**message, "headers": [*message["headers"], *missing]}
        await send(message)

    return guarded


async def _refuse(
    error: ApiError, scope: Scope, receive: Receive, send: Send, *, more: bool
) -> None:
    """Send an error; where a body is still coming, read and drop it for a moment before closing.

    Closing at once would reset the connection, and the client would never see the response.
    """
    response = error.response()
    if not more:
        await response(scope, receive, send)
        return
    response.headers["connection"] = "close"
    start = {"status": error.status, "headers": response.raw_headers}
    await send({"type": "http.response.start", **start})
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    try:
        async with asyncio.timeout(LINGER_SECONDS):
            while (message := await receive())["type"] == "http.request":
                if not message.get("more_body", False):
                    break
    except TimeoutError:
        pass
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body at once, and then whatever else comes."""
    is_sent = False

    async def again() -> Message:
        nonlocal is_sent
        if is_sent:
            return await receive()
        is_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"The body is larger than {most:,} bytes.")


def _is_below(path: str, places: tuple[str, ...]) -> bool:
    return any(path == place or path.startswith(f"{place}/") for place in places)


def _has_body(headers: dict[str, str]) -> bool:
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers


def _address(scope: Scope) -> str:
    """Return the address that a request comes from."""
    return str((scope.get("client") or ("",))[0])


def _is_local(host: str) -> bool:
    try:
        return urlsplit(f"//{host}").hostname in LOCAL_NAMES
    except ValueError:
        return False


def _same(header: str, keys: str) -> bool:
    """Say whether a header carries one of `keys`, one a line, in a time that depends on neither."""
    # Digests are equally long, whatever the client sent.
    ours, theirs = [_digest(key) for key in keys.split("\n")], _digest(_token(header))
    is_one = [hmac.compare_digest(key, theirs) for key in ours]  # each, wherever the one is
    return any(is_one) and header.partition(" ")[0].lower() == "bearer"


def _token(header: str) -> str:
    return header.partition(" ")[2].strip()


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
