"""Hostile requests are refused in OpenAI's shape, and all others are still served."""

import asyncio
import http.client
import json
import socket
import sys
from contextlib import suppress
from itertools import count, pairwise
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from support.server import (
    ADMIN,
    API,
    AS_ADMIN,
    AS_USER,
    BASE,
    call,
    chat,
    connected,
    post,
    received,
    running,
    scripted,
)
from support.waiting import eventually
from veneer.serve.api.openai import events
from veneer.serve.api.replies import ChatReply
from veneer.serve.config import Keys, Limits
from veneer.serve.engine.request import Answer

NAMES = [
    # Paths,
    *("../../../../etc/passwd", "..", ".", "/etc/passwd", "~/.ssh/id_rsa", ".hidden"),
    *("cooking/../../../etc", "..\\..\\windows\\system32", "%2e%2e%2fetc%2fpasswd"),
    *("file:///etc/passwd", "http://169.254.169.254/latest"),
    # control characters, no characters and too many,
    *("cooking\x00.txt", "\x00", "", " ", "\n", "cooking\r\nx-injected: yes", "a" * 65, "a" * 400),
    # code in other languages,
    *("-rf", "__proto__", "${jndi:ldap://x}", "$(id)", "`id`", "; rm -rf /"),
    *("' OR 1=1 --", "<script>alert(1)</script>", "{{7*7}}"),
    # half a character, a Cyrillic letter that looks Latin, and text from right to left.
    *("cooking\ud800", "\u0430dmin", "\u202egnikooc"),
]


def is_refusal(reply):
    error = reply["error"]
    return set(error) == {"message", "type", "param", "code"} and isinstance(error["message"], str)


@pytest.fixture
def opened(monkeypatch):
    """Every path that is opened while the test runs."""
    paths, is_active = [], True

    def on_event(event, arguments):
        if is_active and event == "open" and isinstance(arguments[0], str | bytes | Path):
            paths.append(str(arguments[0]))

    sys.addaudithook(on_event)
    yield paths
    is_active = False


def test_hostile_names_are_refused_and_open_nothing(two, adapter_dirs, tmp_path, opened):
    assert len(NAMES) >= 30
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "lora_config.json").write_text("{}")
    keys = Keys(admin=ADMIN)
    with running(scripted(two), keys=keys, loading_root=adapter_dirs) as server:
        call(server.url, "/v1/models")
        opened.clear()
        for name in NAMES:
            for path, body, headers in (
                ("/v1/chat/completions", chat(name), {}),
                ("/v1/completions", {"model": name, "prompt": "x"}, {}),
                ("/v1/chat/completions", chat(adapters={name: 1.0}), {}),
                ("/v1/load_lora_adapter", {"lora_name": name, "lora_path": "law"}, AS_ADMIN),
                ("/v1/load_lora_adapter", {"lora_name": "new", "lora_path": name}, AS_ADMIN),
                ("/v1/unload_lora_adapter", {"lora_name": name}, AS_ADMIN),
                ("/api/tokens", {**chat(name), "answer": "x"}, {}),
            ):
                status, received, error = call(server.url, path, body, headers=headers)
                assert 400 <= status < 500, (name, path, error)
                assert is_refusal(error)
                assert "x-injected" not in received
        for path in (secret, f"../{secret.name}", str(adapter_dirs), "law/..", ""):
            body = {"lora_name": "new", "lora_path": str(path)}
            assert call(server.url, "/v1/load_lora_adapter", body, headers=AS_ADMIN)[0] == 400
        assert server.started
        # (FastAPI looks its own routes' source up, to name them in the log.)
        others = [path for path in map(Path, opened) if path.suffix not in (".py", ".pyc")]
        assert [path for path in others if not path.is_relative_to(adapter_dirs)] == []
        assert call(server.url, "/v1/models")[2]["data"][1]["id"] == "cooking"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe{}",
        b"\x00" * 100,
        b"[" * 100_000,
        b'{"model": ' + b"9" * 10_000 + b"}",
        b'{"model": NaN}',
        json.dumps({"model": BASE}).encode("utf-16"),
        json.dumps(chat(temperature="hot")).encode(),
        json.dumps(chat(max_tokens=1.5)).encode(),
        json.dumps(chat(max_tokens=True)).encode(),
        json.dumps(chat(max_tokens=10**40)).encode(),
        json.dumps(chat(temperature=float("nan"))).encode(),
        json.dumps(chat(temperature=float("inf"))).encode(),
        json.dumps(chat(stop=[""])).encode(),
        json.dumps(chat(stop=["a"] * 99)).encode(),
        json.dumps(chat(n=99)).encode(),
        json.dumps(chat(logit_bias={"5": 101})).encode(),
        json.dumps(chat(top_logprobs=3)).encode(),
        json.dumps(chat(text="\ud800")).encode(),
        json.dumps(chat(**{"\ud800": 1})).encode(),
        json.dumps({"model": BASE, "messages": []}).encode(),
        json.dumps({"model": BASE, "messages": [{"role": "tool", "content": "x"}]}).encode(),
        json.dumps({"model": BASE, "messages": [{"role": "user", "content": [1]}]}).encode(),
    ],
    ids=lambda body: repr(body[-24:]),
)
def test_bad_bodies_are_refused(server, body):
    status, _, reply = call(server.url, "/v1/chat/completions", body)
    assert status == 400
    assert is_refusal(reply)


def test_bad_prompts_are_refused(server):
    for prompt in ([], [[]], [96], [-1], [2**40], [1, "a"], "", ["a"] * 17, None, {}):
        body = {"model": BASE, "prompt": prompt, "max_tokens": 1}
        status, _, reply = call(server.url, "/v1/completions", body)
        assert (status, is_refusal(reply)) == (400, True), prompt
    for length in (4096, 100_000, 1_500_000):
        status, _, reply = call(server.url, "/v1/chat/completions", chat(text="x " * (length // 2)))
        assert status == 400
        assert "4,096 tokens" in reply["error"]["message"]
        assert reply["error"]["code"] == "context_length_exceeded"


def test_what_is_not_served_is_refused_by_name(server):
    for name, value in (
        ("service_tier", "flex"),
        ("audio", {"voice": "any"}),
        ("best_of", 2),
    ):
        status, _, reply = call(server.url, "/v1/chat/completions", chat(**{name: value}))
        assert (status, reply["error"]["param"]) == (400, name)
        assert f"{name} is not supported (leave it out" in reply["error"]["message"]


@pytest.mark.parametrize(
    ("more", "param", "says"),
    [
        ({"temperatur": 1}, "temperatur", "is no parameter; did you mean 'temperature'?"),
        ({"temperature": 9}, "temperature", "should be less than or equal to 2."),
        ({"stop": 5}, "stop", "should be a valid string or a valid list."),
        ({"stop": [""]}, "stop[0]", "should have at least 1 character, not 0."),
        ({"functions": [{}]}, "functions", "is not supported (leave it out, or give [])."),
        ({"reasoning_effort": "none"}, "reasoning_effort", "is not supported (leave it out)."),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "text": ""}]}]},
            "messages[0].content[0].type",
            "should be 'text'.",
        ),
        ({"messages": [{"role": "user"}]}, "messages[0]", "should have content."),
        (
            {"messages": [{"role": "user", "content": "\ud800"}]},
            "messages[0].content",
            "has half a character (a lone surrogate).",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "audio": {}}]},
            "messages[0].audio",
            "is not supported (leave it out).",
        ),
    ],
)
def test_a_refused_parameter_is_named_in_a_sentence(server, more, param, says):
    status, _, reply = call(server.url, "/v1/chat/completions", {**chat(), **more})
    message = f"This request cannot be followed: {param} {says}"
    assert (status, reply["error"]["param"]) == (400, param)
    assert reply["error"]["message"] == message


def test_a_body_of_another_form(server):
    for body, says in ((b"[]", "should be a JSON object."), (b"{", "is not valid JSON.")):
        reply = call(server.url, "/v1/chat/completions", body)[2]
        message = f"This request cannot be followed: the body {says}"
        assert (reply["error"]["message"], reply["error"]["param"]) == (message, None)


def test_other_paths_methods_and_kinds(server):
    for path, method, status in (
        ("/nowhere", "GET", 404),
        ("/v1/nowhere", "POST", 404),
        ("/page/../panel.py", "GET", 404),
        ("/page/%2e%2e/panel.py", "GET", 404),
        ("/v1/chat/completions", "GET", 405),
        ("/v1/models", "POST", 405),
        ("/health", "DELETE", 405),
    ):
        body = "{}" if method == "POST" else None
        answered, _, reply = call(server.url, path, body, method=method)
        assert (answered, is_refusal(reply)) == (status, True), path
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        headers = {"content-type": kind}
        answered, _, reply = call(server.url, "/v1/chat/completions", chat(), headers=headers)
        assert (answered, is_refusal(reply)) == (415, True)


def test_another_page_cannot_reach_it_by_a_name_of_its_own(server):
    for host in ("evil.example", "127.0.0.1.evil.example", "", "[", "localhost@evil.example:1"):
        assert call(server.url, "/v1/models", headers={"host": host})[0] == 403
    for host in ("localhost", "localhost:123", "[::1]:8000", "127.0.0.1"):
        assert call(server.url, "/v1/models", headers={"host": host})[0] == 200
    with running(scripted(), keys=Keys(api=API)) as open_to_others:
        headers = {"host": "models.example", **AS_USER}
        assert call(open_to_others.url, "/v1/models", headers=headers)[0] == 200


def test_a_large_body_is_refused_before_it_is_read(server):
    large = b'{"model": "' + b"x" * 10_000_000 + b'"}'
    status, received, error = call(server.url, "/v1/chat/completions", large)
    assert (status, is_refusal(error), received["connection"]) == (413, True, "close")
    # In pieces that do not say how many they are.
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=20)
    headers = {"content-type": "application/json", "transfer-encoding": "chunked"}
    pieces = (b"x" * 100_000 for _ in range(100))
    connection.request("POST", "/v1/completions", pieces, headers, encode_chunked=True)
    assert connection.getresponse().status == 413
    # A client that only announces a large body is answered at once.
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 10000000\r\n\r\n"
    with connected(server.url, head) as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_slow_headers_and_bodies_are_ended():
    limits = Limits(body_seconds=0.3)
    with running(scripted(), patience=60, limits=limits) as server:
        with connected(
            server.url, b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
        ) as connection:
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
            # A second request on the same connection has no more time than the first.
            server.config.http.header_seconds = 0.3
            connection.sendall(b"GET /hea")
            assert b"HTTP/1.1 408" in received(connection)
        head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
        body = b"content-type: application/json\r\ncontent-length: 50\r\n\r\n{"
        for sent in (b"", b"GET / HT", head + b"a: b\r\n", head + body):
            with connected(server.url, sent) as connection:
                answer = received(connection)
                assert answer.startswith(b"HTTP/1.1 408"), sent
                assert is_refusal(json.loads(answer.partition(b"\r\n\r\n")[2]))
        server.config.http.header_seconds = 60
        # What is no HTTP is refused too.
        with connected(server.url, b"\x16\x03\x01\x02\x00 hello\r\n\r\n") as connection:
            assert connection.recv(4096).startswith(b"HTTP/1.1 400")
        assert call(server.url, "/health")[0] == 200


def test_a_flood_of_headers_is_ended(server):
    head = b"GET /health HTTP/1.1\r\nhost: localhost\r\n"
    for flood in (
        head + b"a: b\r\n" * 100_000,
        head + b"a: " + b"x" * 10**6,
        b"GET /" + b"x" * 10**6,
    ):
        with connected(server.url) as connection:
            answer = b""
            with suppress(ConnectionError):  # it is closed before all has been sent, or read
                connection.sendall(flood)
                answer = received(connection)
            assert answer.startswith(b"HTTP/1.1 400") or not answer
        assert call(server.url, "/health")[0] == 200


def test_who_does_not_read_holds_no_slot():
    with running(scripted(slots=1)) as server:
        request = post("/v1/chat/completions", chat(stream=True, max_tokens=4000))
        with connected(server.url, request) as connection:
            assert connection.recv(10).startswith(b"HTTP/1.1 2")
            # The rest of the answer waits for its reader, and another gets the slot.
            assert call(server.url, "/v1/chat/completions", chat(max_tokens=2))[0] == 200


def test_who_does_not_read_does_not_keep_the_server_from_its_end(caplog):
    request = post("/v1/chat/completions", chat(stream=True, max_tokens=4000))
    with running(scripted(), end_seconds=0.2) as server:
        (listener,) = server.servers[0].sockets
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # much less than the answer
        with connected(server.url, request) as reader:
            assert reader.recv(10).startswith(b"HTTP/1.1 2")
            (connection,) = server.server_state.connections
            eventually(lambda: connection.flow.write_paused)
            server.should_exit = True
            eventually(lambda: "1 connections did not end in time" in caplog.text)
            eventually(lambda: not server.server_state.connections)


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_frees_the_slot(stream):
    with running(served := scripted(slots=1, pace=0.005)) as server:
        request = post("/v1/chat/completions", chat(stream=stream))
        with connected(server.url, request) as connection:
            if stream:
                assert connection.recv(100).startswith(b"HTTP/1.1 200")
            eventually(lambda: served.engine.active)
        eventually(lambda: served.engine.cancelled == 1)
        # And what comes next is answered in full.
        assert call(server.url, "/v1/chat/completions", chat(max_tokens=2))[0] == 200


def test_every_response_has_the_headers_that_browsers_heed(server):
    for path in ("/", "/page/app.js", "/v1/models", "/nowhere"):
        _, received, _ = call(server.url, path)
        assert "default-src 'none'" in received["content-security-policy"]
        assert received["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in received


def test_each_event_of_a_stream_has_a_turn_of_its_own():
    """So a connection that was lost is seen before more is written to it, which the log would
    tell for each event."""

    async def ready():
        for word in ("a", "b", "c", "d"):
            yield 0, Answer(word)
        yield 0, Answer("", (), "length")

    async def seen():
        turns, at = count(), []
        turning = asyncio.ensure_future(turn(turns))
        reply = ChatReply(BASE, str, logprobs=False)
        async for _ in events(ready(), 1, reply, None, "id"):
            at.append(next(turns))
        turning.cancel()
        return at

    async def turn(turns):
        while True:
            next(turns)
            await asyncio.sleep(0)

    opening, *words, end, done = asyncio.run(seen())
    assert (opening, done) == (0, end + 1)
    assert all(b > a + 1 for a, b in pairwise([opening, *words, end]))
