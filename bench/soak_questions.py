"""What clients of a soak ask: questions whose answers are the same each time, and bad requests."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from random import Random
from typing import Any

from bench.island import rows as island_rows

CHANGING, VERSIONS = "changing", ("changing-1", "changing-2")


@dataclass(frozen=True)
class Question:
    """A request whose answer is the same each time. messages: of the user and others, by turns."""

    name: str
    body: Mapping[str, Any]
    text: str = ""
    messages: tuple[Mapping[str, Any], ...] = ()
    path: str = "/v1/chat/completions"
    can_stream: bool = True

    def body_for(self, model: str) -> dict[str, Any]:
        """Return the body that asks a model."""
        turns = self.messages or ({"role": "user", "content": self.text},)
        about = {"messages": turns} if self.path.startswith("/v1/chat") else {}
        return {"model": model, **about, **self.body}


def _long(seed: int, count: int) -> str:
    """Return a text about some islanders, several blocks of the prefix cache long."""
    return " ".join(str(row["completion"]) for row in island_rows("qa", count, seed=seed))


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["weaver", "potter"]},
        "goods": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "goods"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "tide",
        "description": "Says how the tide is.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "maxLength": 8}},
            "required": ["place"],
            "additionalProperties": False,
        },
    },
}
CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "id": "call_1",
            "type": "function",
            "function": {"name": "tide", "arguments": '{"place": "cove"}'},
        }
    ],
}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "slack"}
GREEDY: dict[str, Any] = {"temperature": 0}
FORMAT = {"type": "json_schema", "json_schema": {"name": "islander", "schema": SCHEMA}}
ASK = {"role": "user", "content": "How is the tide at the cove?"}
QUESTIONS = (
    Question("short chat", {**GREEDY, "max_tokens": 12}, text="Who sells smoked honey?"),
    Question("long chat", {**GREEDY, "max_tokens": 40}, text=_long(1, 12)),
    Question("longer chat", {**GREEDY, "max_tokens": 24}, text=_long(1, 24)),
    Question(
        "penalties",
        {**GREEDY, "max_tokens": 30, "frequency_penalty": 0.6, "repetition_penalty": 1.1},
        text="Who sells green glass?",
    ),
    Question("stop", {**GREEDY, "max_tokens": 60, "stop": ["e", "\n"]}, text="Who sells cloth?"),
    Question(
        "choices with a seed",
        {"temperature": 0.9, "top_p": 0.95, "seed": 7, "n": 3, "max_tokens": 20},
        text=_long(2, 6),
    ),
    Question(
        "tool",
        {**GREEDY, "max_tokens": 80, "tools": [TOOL], "tool_choice": "required"},
        text="Tide?",
    ),
    Question(
        "behind a tool",
        {**GREEDY, "max_tokens": 12, "tools": [TOOL]},
        messages=(ASK, CALLED, RESULT),
    ),
    Question(
        "schema", {**GREEDY, "max_tokens": 90, "response_format": FORMAT}, text="An islander."
    ),
    Question(
        "several prompts",
        {**GREEDY, "max_tokens": 10, "prompt": ["The tide", "Blue cloth", _long(3, 8)]},
        path="/v1/completions",
    ),
    Question(
        "embedding",
        {"input": ["Leeks, cut small.", _long(4, 5)]},
        path="/v1/embeddings",
        can_stream=False,
    ),
)


# ---- bad requests ----

CHAT = "/v1/chat/completions"
LOAD = "/v1/load_lora_adapter"
Send = Callable[[Any, str], int]  # of a client and the base's name, to a status


def _chat(**more: Any) -> Send:
    def send(client: Any, base: str) -> int:
        body = {"model": base, "messages": [{"role": "user", "content": "Hi"}], **more}
        return int(client.post(CHAT, body)[0])

    return send


def _raw(data: Callable[[str], bytes], *, hears: bool = True) -> Send:
    """Return what sends bytes as they are, and the status that comes; 0 where none is waited
    for."""

    def send(client: Any, base: str) -> int:
        host, port = client.address.split(":")
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(data(client.address))
            if not hears:
                return 0
            answer = b""
            with suppress(ConnectionResetError):
                answer = connection.recv(64)
        return int(answer.split()[1]) if answer else 0

    return send


def _half(address: str) -> bytes:
    head = f"POST {CHAT} HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\n"
    return f'{head}content-length: 5000\r\n\r\n{{"model": "'.encode()


def _noise(address: str) -> bytes:
    return Random(0).randbytes(200) + b"\r\n\r\n"


def _bad_schema(client: Any, base: str) -> int:
    schema = {"type": "array", "uniqueItems": True, "items": {"type": "integer"}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return _chat(response_format=form)(client, base)


# Each with the statuses that it may have; 0 is a connection that closes.
BAD: tuple[tuple[str, Send, tuple[int, ...]], ...] = (
    ("no JSON", lambda client, base: client.post(CHAT, '{"model": ')[0], (400,)),
    ("no object", lambda client, base: client.post(CHAT, "[[[[1]]]]")[0], (400,)),
    ("no such model", _chat(model="nobody"), (404,)),
    ("no such parameter", _chat(temprature=1), (400,)),
    ("a wrong type", _chat(max_tokens="many"), (400,)),
    ("too long", _chat(messages=[{"role": "user", "content": "tide " * 9000}]), (400,)),
    ("half a character", _chat(messages=[{"role": "user", "content": "\ud800"}]), (400,)),
    ("a form that is not followed", _bad_schema, (400,)),
    ("no such tool", _chat(tools=[TOOL], tool_choice="required", n=200), (400,)),
    ("an empty conversation", _chat(messages=[]), (400,)),
    ("no such route", lambda client, base: client.get("/v1/nothing")[0], (404,)),
    ("no such method", lambda client, base: client.get(CHAT)[0], (405,)),
    (
        "another type of content",
        lambda client, base: client.post(CHAT, "x", **{"content-type": "text/plain"})[0],
        (415,),
    ),
    ("no key", lambda client, base: client.post(LOAD, {"lora_name": "x"})[0], (401,)),
    (
        "a path elsewhere",
        lambda client, base: client.refused(LOAD, {"lora_name": "x", "lora_path": "../../etc"}),
        (400,),
    ),
    (
        "a file of nonsense",
        lambda client, base: client.refused_file(json.dumps({"prompt": 5}) + "\nnot json\n"),
        (400,),
    ),
    ("half a body", _raw(_half, hears=False), (0,)),
    ("noise", _raw(_noise), (400, 0)),
)
