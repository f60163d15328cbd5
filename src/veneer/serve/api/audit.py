"""What holders of the admin key have done, or others have tried: a JSON line for each request."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from datetime import UTC, datetime
from pathlib import Path

from starlette.types import Message, Scope, Send

log = logging.getLogger("veneer.serve")
UNKNOWN = 401
MOST_UNKNOWN = 60  # lines a minute for requests without a key that is known: anybody can send them
MOST_OF_A_PATH = 200  # characters: whoever has no key can send long ones, and many


class AuditLog:
    """A file that only grows, and may be moved away at any time: each line opens it anew.

    Keys are in it as the first digits of their hashes. Of requests without a known key only so many
    are in it for each minute; the next line says how many were left out. For one thread.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._minute = self._unknown = self._left_out = 0

    def watch(self, scope: Scope, send: Send, *, authorization: str) -> Send:
        """Return `send` that writes a line once the status of the response is known."""

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._write(scope, message["status"], authorization)
            await send(message)

        return watched

    def _write(self, scope: Scope, status: int, authorization: str) -> None:
        if status == UNKNOWN and self._is_one_too_many():
            self._left_out += 1
            return
        key = authorization.partition(" ")[2].strip()
        line = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "client": (scope.get("client") or ("",))[0],
            "key": hashlib.sha256(key.encode()).hexdigest()[:12] if key else None,
            "method": scope["method"],
            "path": scope["path"][:MOST_OF_A_PATH],
            "status": status,
            "request": scope["state"]["request_id"],
        }
        if self._left_out:
            line["left_out"], self._left_out = self._left_out, 0
        try:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
            with os.fdopen(os.open(self.path, flags, 0o600), "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:  # a full disk must not keep an administrator from making room
            log.error("The audit log %s cannot be written: %s.", self.path, error)

    def _is_one_too_many(self) -> bool:
        """Count a request without a known key, and return whether this minute has had enough."""
        minute = int(time.monotonic() // 60)
        if minute != self._minute:
            self._minute, self._unknown = minute, 0
        self._unknown += 1
        return self._unknown > MOST_UNKNOWN
