"""Keys that are exchanged while a server runs, and what is written down of their use."""

import asyncio
import json
import stat

import pytest

from veneer.errors import ConfigError
from veneer.serve.api import audit
from veneer.serve.api.audit import AuditLog
from veneer.serve.api.guard import Guard
from veneer.serve.api.rate import MOST_CALLERS, Rates
from veneer.serve.config import KeyFiles, Keys, Limits, ServeConfig

OLD, NEW, ADMIN = "old-key-of-16-and-more", "new-key-of-16-and-more", "admin-key-of-16-and-more"


async def answer(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def statuses(guard: Guard, *requests: tuple[str, str, str | None]) -> list[int]:
    """Return the status of each request: method, path and key."""

    seen: list[int] = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        if message["type"] == "http.response.start":
            seen.append(message["status"])

    for method, path, key in requests:
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        headers += [(b"authorization", f"Bearer {key}".encode())] if key else []
        scope = {"type": "http", "method": method, "path": path, "headers": headers}
        asyncio.run(guard(scope | {"client": ("127.0.0.1", 1)}, receive, send))
    return seen


def guard_of(keys, **options) -> Guard:
    return Guard(answer, keys=keys, limits=Limits(), is_draining=lambda: False, **options)


def test_a_key_has_so_many_requests_a_minute():
    limits = Limits(per_minute=2)
    guard = Guard(
        answer, keys=lambda: Keys(f"{OLD}\n{NEW}"), limits=limits, is_draining=lambda: False
    )
    post = ("POST", "/v1/completions")
    assert statuses(guard, (*post, OLD), (*post, OLD), (*post, OLD)) == [200, 200, 429]
    assert statuses(guard, (*post, NEW), (*post, "wrong-key")) == [200, 401]
    # However the header is written, it is the same key; and looking costs nothing.
    assert statuses(guard, (*post, f"  {OLD} "), ("GET", "/v1/models", OLD)) == [429, 200]
    alone = Guard(answer, keys=Keys, limits=limits, is_draining=lambda: False)
    assert statuses(alone, *[(*post, None)] * 3) == [200, 200, 429]


def test_a_bucket_fills_up_evenly():
    rates = Rates(30)
    assert [rates.wait_of("a", now=0.0) for _ in range(31)] == [0] * 30 + [2]
    assert [rates.wait_of("a", now=at) for at in (1.0, 2.0, 2.0)] == [1, 0, 2]
    assert [rates.wait_of("a", now=3600.0) for _ in range(31)] == [0] * 30 + [2]
    assert rates.wait_of("b", now=0.0) == 0
    for number in range(MOST_CALLERS):
        rates.wait_of(str(number), now=3600.0)
    assert rates.wait_of("a", now=3600.0) == 0  # forgotten, which leaves the others their memory


def test_a_key_is_exchanged_while_the_server_runs(tmp_path, caplog):
    file = tmp_path / "key"
    file.write_text(f"{OLD}\n")
    guard = guard_of(KeyFiles(ServeConfig(api_key_file=file), {}))
    requests = [("GET", "/v1/models", key) for key in (OLD, NEW, None)]
    assert statuses(guard, *requests) == [200, 401, 401]
    file.write_text(f"{OLD}\n{NEW}\n")
    assert statuses(guard, *requests) == [200, 200, 401]
    file.write_text(f"{NEW}\n\n")
    assert statuses(guard, *requests) == [401, 200, 401]
    for wrong in ("short\n", ""):  # half-written, perhaps
        file.write_text(wrong)
        assert statuses(guard, *requests) == [401, 200, 401]
    file.unlink()
    assert statuses(guard, *requests) == [401, 200, 401]
    assert NEW not in caplog.text
    assert "keys before stay" in caplog.text


def test_no_key_is_both_kinds(tmp_path):
    api, admin = tmp_path / "api", tmp_path / "admin"
    api.write_text(f"{OLD}\n{ADMIN}\n")
    admin.write_text(f"{NEW}\n{ADMIN}\n")
    config = ServeConfig(
        api_key_file=api, admin_key_file=admin, runs=tmp_path, enable_training=True
    )
    with pytest.raises(ConfigError, match="another than the API key"):
        KeyFiles(config, {})


def test_an_audit_log_that_cannot_be_written_is_refused_before_the_start(tmp_path):
    for place in (tmp_path, tmp_path / "nowhere" / "audit.jsonl"):
        with pytest.raises(ConfigError, match=r"audit_log .* a file that can be written"):
            ServeConfig(audit_log=place)
    ServeConfig(audit_log=tmp_path / "audit.jsonl")


def test_requests_with_the_admin_key_are_written_down(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(audit.time, "monotonic", lambda: 60.0)  # all in one minute
    place = tmp_path / "audit.jsonl"
    guard = guard_of(lambda: Keys(api=OLD, admin=ADMIN), audit=AuditLog(place))
    requests = [
        ("DELETE", "/v1/files/file-1", ADMIN),
        ("GET", "/v1/fine_tuning/jobs", OLD),
        ("GET", "/v1/models", OLD),  # needs no admin key
        ("POST", "/v1/load_lora_adapter", None),
    ]
    assert statuses(guard, *requests) == [200, 401, 200, 401]
    lines = [json.loads(line) for line in place.read_text().splitlines()]
    assert [(x["method"], x["path"], x["status"]) for x in lines] == [
        ("DELETE", "/v1/files/file-1", 200),
        ("GET", "/v1/fine_tuning/jobs", 401),
        ("POST", "/v1/load_lora_adapter", 401),
    ]
    assert len({line["key"] for line in lines}) == 3  # whose is whose, and nobody's
    assert lines[2]["key"] is None
    assert not any(key in place.read_text() for key in (OLD, ADMIN))
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    assert statuses(guard, ("GET", f"/v1/files/{'a' * 9999}", OLD)) == [401]
    assert len(place.read_text().splitlines()[-1]) < 500  # whoever has no key fills no disk
    # Nor do many of them, and what was left out is counted.
    monkeypatch.setattr(audit, "MOST_UNKNOWN", 4)
    refused = ("GET", "/v1/files", None)
    before = len(place.read_text().splitlines())
    assert before == 4  # three of them refused
    assert statuses(guard, *[refused] * 5, requests[0]) == [401] * 5 + [200]
    after = [json.loads(line) for line in place.read_text().splitlines()[before:]]
    assert [line.get("left_out") for line in after] == [None, 4]
    place.unlink()
    place.mkdir()  # where nothing can be written
    assert statuses(guard, requests[0]) == [200]
    assert "cannot be written" in caplog.text
