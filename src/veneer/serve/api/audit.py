"""What holders of the admin key have done, or others have tried: a JSON line for each request."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from datetime import UTC, datetime
from pathlib import Path

from starlette.types import Message, Scope, Send

log = logging.getLogger("veneer.serve")
MOST_OF_A_PATH = 200  # characters: whoever has no key can send long ones, and many


class AuditLog:
    """A file that only grows, and may be moved away at any time: each line opens it anew.

    Keys are in it as the first digits of their hashes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def watch(self, scope: Scope, send: Send, *, authorization: str) -> Send:
        """Return `send` that writes a line once the status of the response is known."""

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._write(scope, message["status"], authorization)
            await send(message)

        return watched

    def _write(self, scope: Scope, status: int, authorization: str) -> None:
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
        try:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
            with os.fdopen(os.open(self.path, flags, 0o600), "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:  # a full disk must not keep an administrator from making room
            log.error("The audit log %s cannot be written: %s.", self.path, error)
