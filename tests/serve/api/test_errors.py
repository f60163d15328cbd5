"""What cannot be served is refused with its reason; what goes wrong inside reaches the log."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch

from support.random_adapters import shake
from support.server import call, chat, running
from support.serving_bases import base_of
from support.tiny_models import tiny
from veneer.adapter.attach import attach
from veneer.adapter.config import LoRA
from veneer.checksums import SUMS
from veneer.errors import AdapterError, QueueFull
from veneer.files import read_tensors, write_tensors
from veneer.formats.adapters import save
from veneer.generate.sampling import Sampling
from veneer.serve.api.replies import ChatReply
from veneer.serve.config import ServeConfig
from veneer.serve.engine.detokenizer import Detokenizer
from veneer.serve.engine.request import Request
from veneer.serve.run import prepare

CHAT = "/v1/chat/completions"


@pytest.fixture
def root(adapter_dirs, tmp_path):
    """A good adapter among damaged ones, one of another base, and what is none."""
    root = tmp_path / "adapters"
    for name in ("good", "cut", "nan", "empty", "un named"):
        shutil.copytree(adapter_dirs / "law", root / name)
    weights = "lora_weights.pt"
    (root / "cut" / weights).write_bytes((root / "cut" / weights).read_bytes()[:-500])
    tensors = read_tensors(root / "nan" / weights)
    next(iter(tensors.values()))[0, 0] = torch.nan
    write_tensors(root / "nan" / weights, tensors)
    (root / "nan" / SUMS).unlink()
    (root / "empty" / weights).unlink()
    save(shake(attach(tiny("llama", seed=5), LoRA(rank=2))), root / "foreign")
    (root / "notes").mkdir()
    return root


def prepared(adapters_dir):
    base = replace(base_of(), name="some/base")
    served, notices = prepare(base, (), ServeConfig(adapters_dir=adapters_dir))
    served.notices = notices
    return served


@pytest.fixture
def served(root):
    with (served := prepared(root)).engine:
        yield served


@pytest.fixture(scope="module")
def good(adapter_dirs, tmp_path_factory):
    """A server's adapters and engine, which every error leaves as good as they were."""
    root = tmp_path_factory.mktemp("adapters")
    (root / "good").symlink_to(adapter_dirs / "law")
    with (served := prepared(root)).engine:
        yield served


def test_what_cannot_be_served_is_not_listed_and_says_why(served, root, caplog):
    def asked(name, **more):
        status, _, reply = call(server.url, CHAT, chat(name, max_tokens=1, **more))
        return status, reply["error"]["message"] if status != 200 else ""

    def listed():
        return [model["id"] for model in call(server.url, "/v1/models")[2]["data"]]

    with running(served) as server:
        assert listed() == ["some/base", "good", "nan"]
        assert asked("good") == (200, "")
        for name, why in (
            ("cut", "cannot be read as tensors"),
            ("empty", "No such file"),
            ("foreign", "it was trained on another base"),
            ("un named", "its name must be at most 64 letters"),
        ):
            status, message = asked(name)
            assert (status, served.notices.count(message)) == (400, 1), name
            assert message.startswith(f"The adapter {name!r} in {root / name} cannot be served: ")
            assert why in message
            assert asked("some/base", adapters={name: 1.0}) == (400, message)
        assert served.notices[-1] == f"Below {root} there is no adapter in notes."
        assert len(served.notices) == 5
        # Values are read when it is asked for; from then on it is not listed.
        status, message = asked("nan")
        assert status == 400
        assert "has values that are not finite" in message
        assert caplog.text.count("not finite") == 1
        assert listed() == ["some/base", "good"]
        assert asked("nan", stream=True) == (400, message)
    with pytest.raises(
        AdapterError, match=r"'a' in .* cannot be served.*'b' in .* cannot be served"
    ):
        prepare(served.engine.base, [f"a={root / 'foreign'}", f"b={root / 'nan'}"], ServeConfig())


def fail(*_, **__):
    raise KeyError("the lamp went out")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("where", ["template", "step", "text", "end", "slot", "reply"])
@pytest.mark.thinned
def test_an_unexpected_error_reaches_the_log_and_the_server_goes_on(
    where, stream, good, monkeypatch, caplog
):
    served = good
    owner, name = {
        "template": (served, "chat_tokens"),
        "step": (served.engine.runner, "step"),
        "text": (Detokenizer, "add"),
        "end": (Detokenizer, "end"),
        "slot": (served.engine.runner, "free"),
        "reply": (ChatReply, "delta" if stream else "content"),
    }[where]
    with running(served) as server:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            body = chat("good", max_tokens=2, stream=stream)
            status, headers, reply = call(server.url, CHAT, body)
        if status == 200:
            assert stream
            *_, event, done = [line for line in reply.splitlines() if line]
            assert done == "data: [DONE]"
            reply = json.loads(event.removeprefix("data: "))
        else:
            assert status == 500
        error = reply["error"]
        assert error["type"] == "server_error"
        (number,) = re.findall(r"request ([0-9a-f]{32})", error["message"])
        assert number == headers["x-request-id"]
        assert "lamp" not in error["message"]
        assert caplog.text.count(f"Request {number} failed.") == 1
        assert caplog.text.count("KeyError: 'the lamp went out'") == 1
        assert "Traceback" in caplog.text
        assert call(server.url, CHAT, chat("good", max_tokens=2))[0] == 200
        assert served.engine.stats.active == 0


def test_an_error_in_one_answer_ends_no_other(good, monkeypatch):
    add = Detokenizer.add
    monkeypatch.setattr(Detokenizer, "add", lambda self, i: fail() if self.stop else add(self, i))
    requests = [Request((5, 6), None, Sampling(max_new_tokens=4), stop) for stop in ((), ("x",))]
    ends = [stream.result() for stream in good.submit(requests)]
    assert [end.reason for end in ends] == ["length", "error"]


def test_when_the_engine_cannot_go_on_nobody_waits_for_ever(served, monkeypatch, caplog):
    monkeypatch.setattr(served.engine, "_admit", fail)
    end = served.engine.submit(Request((5, 6))).result()
    assert (end.reason, type(end.error)) == ("error", KeyError)
    assert "The engine ended" in caplog.text
    with pytest.raises(QueueFull, match="closing"):
        served.engine.submit(Request((5, 6)))
