"""A server in a thread, an engine that follows a script, and calls without a client."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import random
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from threading import Lock, Semaphore, Thread
from typing import Any
from unittest.mock import patch
from urllib.parse import urlsplit

import uvicorn
from starlette.types import ASGIApp

from support.random_adapters import tokenizer
from support.tiny_models import VOCAB
from support.waiting import PATIENCE
from veneer.errors import QueueFull
from veneer.formats.training import ComputedIn
from veneer.serve.api.http import AT_A_TIME, PatientProtocol, PatientServer
from veneer.serve.app import create_app
from veneer.serve.engine.library import Library
from veneer.serve.engine.request import Answer, Request, Stats, Token
from veneer.serve.engine.served import Served
from veneer.serve.engine.stream import Stream
from veneer.serve.engine.vocabulary import Vocabulary

BASE = "tiny"
LATEST = 0.4  # seconds by which an answer is late where VENEER_TEST_LATE gives a seed
API, ADMIN = "a-key-of-some-length", "an-admin-key-of-its-own"
AS_USER, AS_ADMIN = ({"authorization": f"Bearer {key}"} for key in (API, ADMIN))


class ScriptedEngine:
    """Answers "NAME says word 0 word 1 ...", a word a token, each after `pace` seconds."""

    def __init__(
        self, library: Library, *, slots: int = 4, queue: int = 8, pace: float = 0.0
    ) -> None:
        self.library, self.pace, self.queue, self.slots = library, pace, queue, slots
        self.words = Vocabulary(tokenizer(), VOCAB)
        self.requests: list[Request] = []
        self.cancelled = self.active = self.waiting = 0
        self.fail = ""
        self.script: list[str] = []  # what it says instead
        self._free, self._lock = Semaphore(slots), Lock()

    def submit(self, request: Request) -> Stream:
        with self._lock:
            if self.waiting >= self.queue + self.slots - self.active:
                raise QueueFull("too many wait")
            self.waiting += 1
            self.requests.append(request)
        stream = Stream(request)
        Thread(target=self._answer, args=(request, stream), daemon=True).start()
        return stream

    def _answer(self, request: Request, stream: Stream) -> None:
        with self._free:
            with self._lock:
                self.waiting, self.active = self.waiting - 1, self.active + 1
            name = _name_of(request.adapter)
            words = self.script or [name, " says", *(f" word {i}" for i in range(10_000))]
            reason, new = "stop" if self.script else "length", 0
            for word in words[: request.sampling.max_new_tokens if request.answers else 0]:
                time.sleep(self.pace)
                if stream.cancelled:
                    reason = "cancelled"
                    break
                if word.strip() in request.stop:
                    reason = "stop"
                    break
                top = tuple((5 + i, -1.0 - i) for i in range(request.logprobs or 0))
                logprob = None if request.logprobs is None else -0.5
                stream.add(Answer(word, (Token(4, word, logprob, top),)))
                new += 1
            with self._lock:
                self.active -= 1
                self.cancelled += reason == "cancelled"
            error = RuntimeError(self.fail) if self.fail else None
            reason = "error" if error else reason
            prompt = len(request.tokens)
            if request.embedding is not None:
                vector = (0.6, -0.8 if request.embedding == "last" else 0.8)
                stream.add(Answer("", (), reason, prompt, error=error, embedding=vector))
                return
            if request.prompt_logprobs:
                scored = self.score(request.tokens, request.adapter)
                likeliest = tuple(() if own is None else ((4, -0.5),) for own in scored)
                ended = Answer("", (), reason, prompt, prompt_logprobs=scored, error=error)
                stream.add(replace(ended, prompt_top=likeliest))
                return
            stream.add(Answer("", (), reason, prompt, new_tokens=new, error=error))

    def score(self, tokens: Any, adapter: Any = None) -> tuple[float | None, ...]:
        change = 1.0 if adapter else 0.0
        return (None, *(-3.0 + change * (i % 2) for i in range(1, len(tokens))))

    def vocabulary(self, which: Any) -> Vocabulary:
        return self.words

    def load(self, name: str) -> None:
        self.library.info(name)

    def refuse_unservable(self, since: int = 0) -> dict[str, str]:
        return {}

    def close(self, *, drain: bool = True) -> None:
        pass

    @property
    def stats(self) -> Stats:
        zeros = {field.name: 0 for field in fields(Stats)}
        own = {"active": self.active, "waiting": self.waiting, "slots": self.slots}
        return Stats(**zeros | own | {"resident": ()})


def _name_of(which: Any) -> str:
    mix = which if isinstance(which, tuple) else ()
    return str(mix[0][0].name) if len(mix) == 1 else "base"


def scripted(
    adapters: dict[str, Path] | None = None, *, context: int = 4096, **engine: Any
) -> Served:
    """Return what a server needs, around an engine that computes nothing."""
    library = Library(adapters or {})
    return Served(
        engine=ScriptedEngine(library, **engine),
        library=library,
        tokenizer=tokenizer(),
        name=BASE,
        root="made/of/nothing",
        context=context,
        computed_in=ComputedIn("float32"),
    )


def late(app: ASGIApp, seed: str) -> ASGIApp:
    """Let each request wait up to LATEST seconds first: answers come in any order."""
    draw = random.Random(seed)

    async def wait(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await asyncio.sleep(draw.uniform(0, LATEST))
        await app(scope, receive, send)

    return wait


class Brisk:
    """What uvicorn has of asyncio, with short sleeps: it looks ten times a second whether it is to
    end, and that would be most of the time of a test with a server of its own."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds / 20)


class Server(PatientServer):
    """A server in a thread, at `url`."""

    url = ""


@contextmanager
def running(
    served: Served, *, patience: float = 10.0, end_seconds: float = 10.0, **options: Any
) -> Iterator[Server]:
    """Serve in a thread of this process, on a free port of this machine."""
    protocol = type("Protocol", (PatientProtocol,), {"header_seconds": patience})
    app = create_app(served, **options)
    if seed := os.environ.get("VENEER_TEST_LATE"):
        app = late(app, seed)
    config = uvicorn.Config(
        app, port=0, http=protocol, ws="none", log_level="critical", backlog=AT_A_TIME
    )
    server = Server(config, end_seconds)
    thread = Thread(target=server.run, daemon=True)
    with patch.object(uvicorn.server, "asyncio", Brisk()):
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        server.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        try:
            yield server
        finally:
            server.should_exit = True
            thread.join(PATIENCE)
            assert not thread.is_alive()


def call(
    url: str,
    path: str,
    body: Any = None,
    *,
    method: str = "",
    headers: dict[str, str] | None = None,
    timeout: float = PATIENCE,
) -> tuple[int, dict[str, str], Any]:
    """Return status, headers and what the JSON of the answer says (or its text)."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=timeout)
    headers = dict(headers or {})
    if body is not None:
        headers.setdefault("content-type", "application/json")
        body = body if isinstance(body, bytes | str) else json.dumps(body)
    try:
        connection.request(method or ("GET" if body is None else "POST"), path, body, headers)
        response = connection.getresponse()
        received = {name.lower(): value for name, value in response.getheaders()}
        text = response.read().decode()
    finally:
        connection.close()
    is_json = received.get("content-type", "").startswith("application/json")
    return response.status, received, json.loads(text) if is_json else text


@contextmanager
def connected(url: str, data: bytes = b"") -> Iterator[socket.socket]:
    """Connect to a server and send bytes as they are."""
    host, _, port = urlsplit(url).netloc.partition(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
        connection.sendall(data)
        yield connection


def received(connection: socket.socket) -> bytes:
    """Return everything that a server sends until it closes the connection."""
    return b"".join(iter(lambda: connection.recv(4096), b""))


def post(path: str, body: Any, *headers: str) -> bytes:
    """Return a POST of JSON as the bytes of a request."""
    data = json.dumps(body).encode()
    head = [f"POST {path} HTTP/1.1", "host: localhost", "content-type: application/json", *headers]
    return "\r\n".join([*head, f"content-length: {len(data)}", "", ""]).encode() + data


def chat(model: str = BASE, text: str = "Hi", **more: Any) -> dict[str, Any]:
    """Return the body of a chat request."""
    return {"model": model, "messages": [{"role": "user", "content": text}], **more}
