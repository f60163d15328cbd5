"""A client of a soak: asks by HTTP, and reduces answers to what must be the same each time."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from bench.soak_questions import Question
from bench.soak_server import KEY

PATIENCE = 600.0  # seconds for an answer, on a machine that may be busy
JSON = {"content-type": "application/json"}
AS_ADMIN = {"authorization": f"Bearer {KEY}"}
Choice = tuple[str, str, str | None]  # text, calls as JSON, why it ended


class Refused(Exception):
    """A status other than 200."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"status {status}: {text[:300]}")
        self.status = status


class Client:
    """Calls one server, with a connection for each request."""

    def __init__(self, url: str) -> None:
        self.address = urlsplit(url).netloc

    @contextmanager
    def sent(
        self, method: str, path: str, body: bytes | str | None = None, **headers: str
    ) -> Iterator[http.client.HTTPResponse]:
        """Yield the response to a request."""
        connection = http.client.HTTPConnection(self.address, timeout=PATIENCE)
        try:
            connection.request(method, path, body, headers)
            yield connection.getresponse()
        finally:
            connection.close()

    def get(self, path: str) -> tuple[int, str]:
        with self.sent("GET", path) as response:
            return response.status, response.read().decode()

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, str]:
        text = body if isinstance(body, bytes | str) else json.dumps(body)
        with self.sent("POST", path, text, **(JSON | headers)) as response:
            return response.status, response.read().decode()

    def admin(self, method: str, path: str, body: Any = None) -> Any:
        """Return the JSON, or the text, of a call with the admin key. Raises Refused."""
        text = None if body is None else json.dumps(body)
        with self.sent(method, path, text, **JSON, **AS_ADMIN) as response:
            answer = response.read().decode()
            if response.status != 200:
                raise Refused(response.status, f"{path}: {answer}")
            is_json = response.headers.get_content_type() == "application/json"
            return json.loads(answer) if is_json else answer

    def refused(self, path: str, body: Any) -> int:
        """Return the status of a call with the admin key."""
        return self.post(path, body, **AS_ADMIN)[0]

    def upload(self, name: str, rows: str) -> dict[str, Any]:
        """Send a file of rows, and return what it is. Raises Refused."""
        status, text = self._form(name, rows)
        if status != 200:
            raise Refused(status, text)
        return dict(json.loads(text))

    def refused_file(self, rows: str) -> int:
        """Return the status of a file of rows."""
        return self._form("rows.jsonl", rows)[0]

    def _form(self, name: str, rows: str) -> tuple[int, str]:
        fields = (
            'name="purpose"\r\n\r\nfine-tune',
            f'name="file"; filename="{name}"\r\ncontent-type: text/plain\r\n\r\n{rows}',
        )
        pieces = [f"--edge\r\ncontent-disposition: form-data; {field}\r\n" for field in fields]
        kind = {"content-type": "multipart/form-data; boundary=edge"}
        return self.post("/v1/files", "".join([*pieces, "--edge--\r\n"]), **kind, **AS_ADMIN)

    # ---- what every server is asked ----

    def base(self) -> str:
        return str(json.loads(self.get("/v1/models")[1])["data"][0]["id"])

    def numbers(self) -> dict[str, float]:
        """Return the server's metrics."""
        lines = [line for line in self.get("/metrics")[1].splitlines() if line[:1] != "#"]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    def cache_bytes(self) -> float:
        """Return the bytes of prefix blocks and adapters in memory, which have limits of their
        own."""
        numbers = self.numbers()
        return numbers["veneer_engine_cache_bytes"] + numbers["veneer_engine_resident_bytes"]

    def load(self, name: str, directory: str) -> None:
        body = {"lora_name": name, "lora_path": directory, "load_inplace": True}
        self.admin("POST", "/v1/load_lora_adapter", body)

    def unload(self, name: str) -> None:
        self.admin("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    # ---- questions ----

    def ask(self, question: Question, model: str, *, stream: bool = False) -> Any:
        """Return what an answer says, in a form that does not depend on how it came. Raises
        Refused."""
        body = question.body_for(model) | ({"stream": True} if stream else {})
        with self.sent("POST", question.path, json.dumps(body), **JSON) as response:
            text = response.read().decode()
            if response.status != 200:
                raise Refused(response.status, text)
        if stream:
            return _streamed(text)
        answer = json.loads(text)
        if "choices" not in answer:
            return [each["embedding"] for each in answer["data"]]
        return [_whole(choice) for choice in answer["choices"]]

    def break_off(self, question: Question, model: str, *, after: int) -> None:
        """Ask for a stream, and close the connection after some of its lines."""
        body = question.body_for(model) | {"stream": True}
        with self.sent("POST", question.path, json.dumps(body), **JSON) as response:
            if response.status != 200:
                raise Refused(response.status, response.read().decode())
            for _ in range(after):
                response.readline()


def _whole(choice: dict[str, Any]) -> Choice:
    message = choice.get("message") or {"content": choice["text"]}
    calls = [_call(call["function"]) for call in message.get("tool_calls") or ()]
    return message["content"] or "", json.dumps(calls), choice["finish_reason"]


def _call(function: dict[str, str]) -> list[str]:
    return [function["name"], function["arguments"]]


def _streamed(text: str) -> list[Choice]:
    """Return the choices of a stream, put together from its events."""
    events = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    if not events or events.pop() != "[DONE]":
        raise Refused(500, f"a stream without an end: {text[-300:]}")
    texts: dict[int, str] = {}
    calls: dict[int, list[list[str]]] = {}
    reasons: dict[int, str | None] = {}
    for event in map(json.loads, events):
        if "error" in event:
            raise Refused(500, f"an error in a stream: {event}")
        for choice in event["choices"]:
            number, delta = choice["index"], choice.get("delta") or {"content": choice.get("text")}
            texts[number] = texts.get(number, "") + (delta.get("content") or "")
            own = calls.setdefault(number, [])
            own += [_call(call["function"]) for call in delta.get("tool_calls") or ()]
            reasons[number] = choice["finish_reason"] or reasons.get(number)
    return [(texts[n], json.dumps(calls[n]), reasons[n]) for n in sorted(texts)]
