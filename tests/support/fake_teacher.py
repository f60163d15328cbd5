"""A small server that lists models and echoes prompts with log probabilities of its own making,
rightly or, where a test spoils them, wrongly. What it was asked for is in `asked`."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any

from support.random_adapters import tokenizer
from support.tiny_models import VOCAB


class FakeTeacher(ThreadingHTTPServer):
    """The server. models: as it lists them. spoil: makes another answer of the right one, or bytes.
    first: statuses that are answered before it, each with headers."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Routes)
        self.tokenizer = tokenizer(VOCAB)
        self.models: list[dict[str, Any]] = [{"id": "large", "max_model_len": 64}]
        self.spoil: Callable[[dict[str, Any]], Any] = lambda answer: answer
        self.first: list[tuple[int, dict[str, str]]] = []
        self.says: Any = {"error": {"message": "not \x1b[31mtoday"}}
        self.asked: list[tuple[str, Any, dict[str, str]]] = []
        self.released = Event()  # of a test that lets it hang

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients may be gone

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def questions(self) -> list[dict[str, Any]]:
        """Return the bodies of the completions that it was asked for."""
        return [body for path, body, _ in self.asked if path == "/v1/completions"]

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the right answer."""
        given = body["prompt"]
        if isinstance(given, str):
            given = [self.tokenizer(given)["input_ids"]]
        choices = [
            {"index": index, "text": "", "logprobs": echoed(prompt, body["logprobs"])}
            for index, prompt in enumerate(given)
        ]
        return {"object": "text_completion", "choices": choices}


def echoed(prompt: list[int], count: int) -> dict[str, Any]:
    """Return tokens with the likeliest in their places: 1/2, 1/4, 1/8 ... of those that follow."""
    top = [
        {f"token_id:{(token + n) % VOCAB}": (n + 1) * math.log(0.5) for n in range(count)}
        for token in prompt
    ]
    return {
        "tokens": [f"token_id:{token}" for token in prompt],
        "token_logprobs": [None, *(math.log(0.5) for _ in prompt[1:])],
        "top_logprobs": [None, *top[1:]],
        "text_offset": [0] * len(prompt),
    }


@contextmanager
def fake_teacher() -> Iterator[FakeTeacher]:
    """Serve in a thread, on a free port of this machine."""
    server = FakeTeacher()
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Routes(BaseHTTPRequestHandler):
    server: FakeTeacher

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._note(None)
        self._send(200, {"object": "list", "data": self.server.models})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self._note(body)
        if self.server.first:
            status, headers = self.server.first.pop(0)
            self._send(status, self.server.says, headers)
        else:
            answer = self.server.spoil(self.server.completion(body))
            self._send(200, answer)

    def _note(self, body: Any) -> None:
        self.server.asked.append((self.path, body, dict(self.headers.items())))

    def _send(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
