"""Requests to the server: the first byte says to which route, the second how much of it may come.

The application is called as a web server calls it, without a network; the engine follows a script.
"""

import asyncio
import tempfile
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from fuzz.target import as_json
from support import mutated_files
from support.server import ADMIN, API, BASE, chat, scripted
from veneer.serve.app import create_app
from veneer.serve.config import Keys, Limits

MODULES = (
    *("veneer.serve.api.openai", "veneer.serve.api.protocol", "veneer.serve.api.strict"),
    *("veneer.serve.api.embeddings", "veneer.serve.api.files", "veneer.serve.api.fine_tuning"),
    *("veneer.serve.api.formats", "veneer.serve.api.tools", "veneer.serve.api.guard"),
)
PARAMETERS = {"type": "object", "properties": {"a": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "f", "schema": PARAMETERS}}
FORM = (
    b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--x\r\n'
    b'Content-Disposition: form-data; name="file"; filename="rows.jsonl"\r\n\r\n'
    b'{"prompt": "a", "completion": "b"}\r\n--x--\r\n'
)
# A route, and a body that it takes.
ROUTES: tuple[tuple[str, Any], ...] = (
    ("/v1/chat/completions", chat(max_tokens=2, tools=[TOOL], stop=["a"], seed=1, n=2)),
    ("/v1/chat/completions", chat(max_tokens=2, response_format=FORMAT, stream=True)),
    ("/v1/completions", {"model": BASE, "prompt": [[5, 6], [7]], "echo": True, "logprobs": 2}),
    ("/v1/embeddings", {"model": BASE, "input": ["a", "b"], "encoding_format": "base64"}),
    ("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "b"}),
    ("/v1/unload_lora_adapter", {"lora_name": "a"}),
    ("/v1/fine_tuning/jobs", {"model": BASE, "training_file": "file-a", "rank": 2}),
    ("/api/tokens", {**chat(), "answer": "x"}),
    ("/api/rows", {"training_file": "file-a"}),
    ("/api/plan", {"training_file": "file-a"}),
    ("/v1/files", FORM),
)


@cache
def _home() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fuzz-")


@cache
def _app() -> Any:
    limits = Limits(upload_bytes=10_000)
    root = Path(_home().name)
    return create_app(
        scripted(), keys=Keys(API, ADMIN), limits=limits, loading_root=root, runs=root
    )


@cache
def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


def seeds() -> list[bytes]:
    bodies = [body if isinstance(body, bytes) else as_json(body) for _, body in ROUTES]
    return [bytes([number, 0]) + body for number, body in enumerate(bodies)]


def mutate(data: bytes, random: Random) -> bytes:
    number = random.randrange(len(ROUTES))
    body = ROUTES[number][1]
    if isinstance(body, bytes):
        return bytes([number, 0]) + mutated_files.any_bytes(body, random)
    return bytes([number, 0]) + mutated_files.json_text(as_json(body), random)


def read(data: bytes, place: Path) -> None:
    number, pieces = (*data[:2], 0, 0)[:2] if len(data) < 2 else data[:2]
    path = ROUTES[number % len(ROUTES)][0]
    status = _loop().run_until_complete(_answer(path, data[2:], pieces % 4))
    assert 200 <= status < 500 or status == 501, status


async def _answer(path: str, body: bytes, pieces: int) -> int:
    """Return the status of a POST whose body comes in so many pieces, and one more."""
    size = len(body) // (pieces + 1) + 1
    rest = [body[i : i + size] for i in range(0, len(body), size)] or [b""]
    kind = b"multipart/form-data; boundary=x" if path == "/v1/files" else b"application/json"
    key = API if path.startswith(("/v1/c", "/v1/e", "/api/t")) else ADMIN
    statuses: list[int] = []

    async def receive() -> dict[str, Any]:
        if not rest:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": rest.pop(0), "more_body": bool(rest)}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    headers = [
        (b"host", b"localhost"),
        (b"content-type", kind),
        (b"authorization", f"Bearer {key}".encode()),
        (b"content-length", str(len(body)).encode()),
    ]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    await _app()(scope, receive, send)
    return statuses[0]
