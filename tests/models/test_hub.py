"""A hub that cannot be reached is asked once, and what is in the local cache loads without it."""

import socket
import threading
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from support.tiny_models import tiny
from veneer.errors import ModelError
from veneer.models.hub import on_hub
from veneer.models.load import load_base, load_config, load_config_and_tokenizer
from veneer.models.minigpt import train_tokenizer, wrap_tokenizer


@pytest.fixture
def asked(request, monkeypatch, tmp_path) -> list[bytes]:
    """A hub that hangs up on everybody, or gives the test's answer; and what it was asked for of
    any model."""
    listener = socket.create_server(("127.0.0.1", 0))
    asked: list[bytes] = []

    def hang_up() -> None:
        while True:
            try:
                caller, _ = listener.accept()
            except OSError:
                return
            with caller:
                question = caller.recv(1 << 16).partition(b"\r\n")[0]
                if b"/owner/" in question:  # the library itself has questions too
                    asked.append(question)  # before the answer, after which the test may look
                caller.sendall(getattr(request, "param", b""))

    endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
    for name, value in {
        "HF_HUB_OFFLINE": False,
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "hub"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    on_hub.cache_clear()
    thread = threading.Thread(target=hang_up)
    thread.start()
    yield asked
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()
    on_hub.cache_clear()


def put_into_cache(hub: Path, name: str) -> None:
    home = hub / f"models--{name.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("abc")
    tiny("llama").save_pretrained(home / "snapshots" / "abc")
    wrap_tokenizer(train_tokenizer(["a text"], vocab_size=300)).save_pretrained(
        home / "snapshots" / "abc"
    )


def test_an_unreachable_hub_is_asked_once_and_what_to_do_is_said(asked, tmp_path):
    put_into_cache(tmp_path / "hub", "owner/small-one")
    with pytest.raises(ModelError) as caught:
        load_base("owner/small-on", dtype="float32")
    assert len(asked) == 1
    message = str(caught.value)
    assert message.startswith(
        "'owner/small-on' is no directory here, and as a hub name it cannot be "
    )
    assert f"looked up, for {constants.ENDPOINT} was not reached" in message
    assert message.endswith("base (minigpt, smollm2-135m); did you mean 'owner/small-one'?")


def test_a_cached_model_loads_without_a_hub_and_nobody_waits_twice(asked, tmp_path):
    put_into_cache(tmp_path / "hub", "owner/small")
    config, tokenizer = load_config_and_tokenizer("owner/small")
    base = load_base("owner/small", dtype="float32")
    assert len(asked) == 1
    assert base.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert base.name == base.model.config._name_or_path == "owner/small"
    assert [notice.partition(" in ")[0] for notice in base.notices] == ["owner/small is the copy"]
    assert base.model.config.hidden_size == config.hidden_size
    assert all(map(torch.equal, base.model.parameters(), tiny("llama").parameters()))


def test_who_asked_to_be_offline_is_told_so(asked, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="offline mode is enabled"):
        load_base("owner/small", dtype="float32")
    assert not asked


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (b"HTTP/1.1 404 No\r\nX-Error-Code: RepoNotFound\r\n\r\n", "need `hf auth login`"),
        (b"HTTP/1.1 403 No\r\nX-Error-Code: GatedRepo\r\n\r\n", "need `hf auth login`"),
        (b"HTTP/1.1 404 No\r\nX-Error-Code: EntryNotFound\r\n\r\n", "it has no config.json"),
        (b"HTTP/1.1 503 Busy\r\n\r\n", "was not reached"),
        (b"HTTP/1.1 200 OK\r\nX-Repo-Commit: abc\r\nETag: abc\r\n\r\n", None),
    ],
    indirect=["asked"],
)
def test_what_the_hub_answers_is_said(asked, says):
    if says is None:
        assert on_hub("owner/small") == "owner/small"
    else:
        with pytest.raises(ModelError, match=says):
            load_config("owner/small")
    assert len(asked) == 1
