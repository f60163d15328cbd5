"""A server's log-probabilities as a teacher: the numbers of a local one, kept as these are, and one
clear error for whatever a server may answer instead."""

import math
import socket
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import veneer
from support.closeness import assert_no_further
from support.fake_teacher import fake_teacher
from support.random_adapters import examples, same, trained_weights
from support.runs import of
from support.serving_bases import base_of, computing_server, write_adapter
from support.tiny_models import VOCAB, tiny
from veneer.data import cache
from veneer.errors import ConfigError, VeneerError, VeneerWarning
from veneer.objectives.config import Objective
from veneer.training import json_over_http, served_teacher
from veneer.training.events import Step
from veneer.training.served_teacher import ServedTeacher
from veneer.training.teacher import distillation_over

KEY = "sk-a-secret-of-its-own"
# The first row is learnt as a whole, the label of its first token too, which nothing predicts.
ROWS = [
    replace(row, labels=row.tokens if number == 0 else row.labels)
    for number, row in enumerate(examples([9, 30, 7, 21]))
]
COURSE = veneer.TrainConfig(lr=0.01, tokens_per_step=25, steps=3, warmup=0, clip=0, save_every=1)
OF_RUN: dict[str, Any] = {"identity": {"base": "tiny", "data": "rows"}}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def server():
    with fake_teacher() as server:
        yield server


def objective_of(address: str, **settings: Any) -> Objective:
    return Objective("distill", teacher=address, **settings)


def given_by(objective: Objective) -> np.ndarray:
    """Return what a teacher gives all label tokens, once and not kept."""
    (criterion,) = distillation_over(
        objective, {"train": ROWS}, tiny("llama"), identity={}, tokens_per_batch=40
    )
    return criterion.teacher.values


def student() -> Any:
    return veneer.attach(tiny("llama"), veneer.LoRA(rank=2))


def run(model: Any, objective: Objective, **more: Any) -> list[Step]:
    events = list(veneer.train(model, ROWS, COURSE, objective=objective, **OF_RUN, **more))
    return [replace(step, seconds=0.0, rss_bytes=0) for step in of(Step, events)]


def wide_probabilities(home: Any) -> torch.Tensor:
    """Return a teacher's probabilities at each label token, in float64; 1 where there is none."""
    model = veneer.load(tiny("llama"), home).double()
    each = []
    for row in ROWS:
        with torch.no_grad():
            p = model(torch.tensor([row.tokens])).logits[0].softmax(-1)
        labelled = [n for n, label in enumerate(row.labels) if label >= 0]
        each.append(torch.stack([p[n - 1] if n else torch.ones(VOCAB) for n in labelled]))
    return torch.cat(each)


@pytest.mark.parametrize("count", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_a_server_gives_what_a_local_teacher_gives(count, tmp_path):
    home = write_adapter(tmp_path / "wide", "llama", seed=1, rank=4)
    local = given_by(objective_of(str(home), teacher_top_k=count))
    with computing_server(base_of(), {"wide": home}) as server:
        objective = objective_of(f"{server.url}/v1/", teacher_model="wide", teacher_top_k=count)
        ServedTeacher.of(objective, tiny("llama").config).check(server.served.tokenizer)
        given = given_by(objective)
    assert given.dtype == local.dtype
    assert not given[0]["log_p"].any()
    assert np.array_equal(given["tokens"], local["tokens"])
    tokens = torch.tensor(given["tokens"][1:].astype(np.int64))
    wide = wide_probabilities(home)[1:].gather(1, tokens)
    wide = torch.cat([wide, 1 - wide.sum(1, keepdim=True)], dim=1)
    ours, theirs = (torch.tensor(np.exp(each["log_p"][1:])) for each in (given, local))
    assert_no_further(ours, theirs, wide)
    assert objective_of(f"{server.url}/v1").teacher_top_k == 20


def test_it_is_asked_once_for_all_runs_over_the_same_rows(server, tmp_path):
    """A run goes on to the bit; with another model behind the name it does not go on."""
    objective = objective_of(server.address, divergence="reverse")
    whole, stopped, again = student(), student(), student()
    expected = run(whole, objective, directory=tmp_path / "whole")
    assert sum(len(body["prompt"]) for body in server.questions()) == len(ROWS)
    asked = iter([True])
    first = run(
        stopped, objective, directory=tmp_path / "part", should_stop=lambda: next(asked, False)
    )
    rest = run(again, objective, directory=tmp_path / "part", resume=True)
    assert [*first, *rest] == expected
    assert same(trained_weights(again), trained_weights(whole))
    looks = server.questions()[len(server.questions()) - 2 :]
    assert [body["prompt"] for body in looks] == [[ROWS[0].tokens]] * 2
    (file,) = cache.home().glob("*/teacher.npy")
    kept = np.load(file)
    assert np.exp(kept["log_p"][1:]).sum(1) == pytest.approx(1, abs=1e-4)
    for path in (tmp_path / "whole").rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes()
    assert all(head.get("authorization") == f"Bearer {KEY}" for _, _, head in server.asked)

    def other(answer: dict[str, Any]) -> dict[str, Any]:
        for choice in answer["choices"]:
            top = choice["logprobs"]["top_logprobs"]
            top[1:] = [dict(zip(reversed(each), each.values(), strict=True)) for each in top[1:]]
        return answer

    server.spoil = other
    with pytest.raises(ConfigError, match="another model seems to be behind this name"):
        run(student(), objective, directory=tmp_path / "part", resume=True)


def test_what_breaks_off_is_not_taken_for_whole(server, monkeypatch):
    monkeypatch.setattr("veneer.training.teacher.MOST_ROWS", 1)
    right, objective = server.spoil, objective_of(server.address)
    server.spoil = lambda answer: right(answer) if len(server.questions()) < 3 else b'{"choices"'
    with pytest.raises(VeneerError, match="no JSON, or only a part of it"):
        run(student(), objective)
    assert not [*cache.home().glob("*/teacher.npy*")]
    server.spoil = right
    assert len(run(student(), objective)) == COURSE.steps
    assert [*cache.home().glob("*/teacher.npy")]


def spoilt(name: str, value: Any, at: int = 2) -> Callable[[dict[str, Any]], Any]:
    """Return what exchanges one value of a list of each choice."""

    def spoil(answer: dict[str, Any]) -> dict[str, Any]:
        for choice in answer["choices"]:
            choice["logprobs"][name][at] = value
        return answer

    return spoil


def without(answer: dict[str, Any], **logprobs: Any) -> dict[str, Any]:
    """Return an answer whose choices have these values instead."""
    for choice in answer["choices"]:
        choice["logprobs"] |= logprobs
    return answer


def top(**values: float) -> dict[str, float]:
    return {f"token_id:{name[1:]}": value for name, value in values.items()}


FEW = top(_5=-1.0, _6=-2.0)
HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no echo": (lambda a: without(a, tokens=[]), "as if it did not know echo"),
    "no logprobs": (
        lambda a: {"choices": [each | {"logprobs": None} for each in a["choices"]]},
        "gives no log-probabilities of a prompt",
    ),
    "no choices": (lambda a: {"choices": []}, "no completion of each prompt"),
    "a list": (lambda a: [1, 2], "no completion of each prompt"),
    "texts": (spoilt("tokens", " the"), "names tokens by their texts"),
    "other tokens": (spoilt("tokens", "token_id:1"), "student's tokens|other tokens than it was"),
    "NaN": (spoilt("top_logprobs", FEW | {"token_id:7": math.nan}), "no logarithm of .*nan"),
    "positive": (spoilt("top_logprobs", FEW | {"token_id:7": 0.5}), "no logarithm of .*0.5"),
    "a text": (spoilt("top_logprobs", FEW | {"token_id:7": "x"}), "no logarithm of .*x"),
    "too much": (spoilt("top_logprobs", top(_5=-0.1, _6=-0.1, _7=-3)), "come to more than 1"),
    "too few": (spoilt("top_logprobs", FEW), "gives 2 likeliest .* 3 .* --teacher-top-k 2"),
    "none": (spoilt("top_logprobs", None), "gives 0 likeliest"),
    "a short list": (lambda a: without(a, top_logprobs=[None]), "no likeliest tokens for all"),
    "larger": (
        spoilt("top_logprobs", FEW | {f"token_id:{VOCAB}": -3.0}),
        f"tokens that the student does not have .{VOCAB}",
    ),
    "no JSON": (lambda a: b"<html>", "what is no JSON"),
    "deep": (lambda a: b"[" * 100_000, "what is no JSON"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_a_server_answers_wrongly_is_one_clear_error(server, kind):
    server.spoil, says = HOSTILE[kind]
    objective = objective_of(server.address, teacher_top_k=3)
    teacher = ServedTeacher.of(objective, tiny("llama").config)
    assert ROWS[0].labels[2] >= 0  # where most are spoilt
    for ask in (lambda: teacher.check(server.tokenizer), lambda: given_by(objective)):
        with pytest.raises(VeneerError, match=says) as refused:
            ask()
        assert "\n" not in str(refused.value)
        assert server.address in str(refused.value)


@pytest.mark.parametrize(
    ("status", "headers", "says"),
    [
        (401, {}, "another key than the environment variable OPENAI_API_KEY"),
        (404, {}, "has no completions, and a chat gives no"),
        (400, {}, "echo with logprobs, as vLLM"),
        (500, {}, "answers 500: not  ?.31mtoday"),
        (307, {"location": "http://other/v1/completions"}, "leads to http://other.*not followed"),
    ],
)
def test_a_refusal_says_what_to_do(server, status, headers, says):
    server.says = {"error": {"message": f"not \x1b[31mtoday, {KEY}"}}
    server.first = [(status, headers)]
    objective = objective_of(server.address, teacher_top_k=3)
    with pytest.raises(VeneerError, match=says) as refused:
        given_by(objective)
    assert "\x1b" not in str(refused.value)
    assert KEY not in str(refused.value)
    assert len(server.questions()) == 1


def test_more_likeliest_tokens_than_a_server_gives(server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    server.says = {"message": f"Requested prompt logprobs of 64, max allowed: 20 {KEY}"}
    server.first = [(400, {}), (403, {})]
    objective = objective_of(server.address, teacher_top_k=64)
    with pytest.raises(ConfigError, match=r"max allowed: 20.* asked for 64 .*--teacher-top-k"):
        given_by(objective)
    with pytest.raises(ConfigError, match="it wants a key by the environment"):
        given_by(objective)
    assert "authorization" not in {name.lower() for name in server.asked[0][2]}
    monkeypatch.setenv("OPENAI_API_KEY", "a\nb")
    with pytest.raises(ConfigError, match="characters that no key has"):
        given_by(objective)


def test_a_busy_server_is_asked_again_and_not_for_ever(server, monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr(
        json_over_http, "time", SimpleNamespace(sleep=pauses.append, time=lambda: 0.0)
    )
    server.first = [(429, {"retry-after": "7"}), (503, {}), (429, {"retry-after": "x"})]
    with pytest.warns(VeneerWarning) as warned:
        given_by(objective_of(server.address))
    assert pauses == [7, 7, 14]
    says = ["answers 429", "answers 503", "answers 429"]
    for each, what, pause in zip(warned, says, pauses, strict=True):
        assert f"{server.address}/completions {what}" in str(each.message)
        assert f"asked again in {pause:g} s" in str(each.message)
    server.first = [(503, {"retry-after": "86400"})]
    with pytest.raises(VeneerError, match=r"answers 503.* asks for 86,400 s more"):
        given_by(objective_of(server.address))
    server.first = [(503, {})] * 100
    with (
        pytest.warns(VeneerWarning, match="so far"),
        pytest.raises(VeneerError, match="waited for"),
    ):
        given_by(objective_of(server.address))
    assert len(pauses) < 30


def test_a_server_that_hangs_or_says_too_much_is_left(server, monkeypatch):
    objective = objective_of(server.address)

    def hang(answer: dict[str, Any]) -> dict[str, Any]:
        server.released.wait(20)
        return answer

    server.spoil = hang
    monkeypatch.setattr(served_teacher, "ROWS_SECONDS", 0.2)
    with pytest.raises(VeneerError, match=r"gave no answer within 0.2 s"):
        given_by(objective)
    server.released.set()
    monkeypatch.setattr(served_teacher, "ROWS_SECONDS", 20)
    monkeypatch.setattr(served_teacher, "OTHER_BYTES", 1000)
    server.spoil = lambda answer: b" " * 10**6
    with pytest.raises(VeneerError, match=r"answers more than \S+ MB"):
        given_by(objective)


def test_a_server_that_is_not_there_or_not_ready(server):
    with socket.socket() as taken:  # which nobody listens at
        taken.bind(("127.0.0.1", 0))
        nobody = objective_of(f"http://127.0.0.1:{taken.getsockname()[1]}/v1")
        with pytest.raises(VeneerError, match=r"/v1/models cannot be reached: .*refused"):
            given_by(nobody)
    server.models[0]["max_model_len"] = 20
    with pytest.raises(VeneerError, match=r"takes rows of 20 tokens, but the longest has 30"):
        given_by(objective_of(server.address))
    server.models.append({"id": "small", "max_model_len": 30})
    with pytest.raises(ConfigError, match=r"several models.*--teacher-model: large, small"):
        given_by(objective_of(server.address))
    with pytest.raises(ConfigError, match=r"no model smal; did you mean 'small'\?"):
        given_by(objective_of(server.address, teacher_model="smal"))
    assert len(given_by(objective_of(server.address, teacher_model="small"))) > 0
    assert server.questions()[-1]["model"] == "small"
    server.models.clear()
    with pytest.raises(ConfigError, match="lists no models"):
        given_by(objective_of(server.address))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"on_policy": True}, "a server gives its likeliest alone"),
        ({"distill_temperature": 2}, "distill_temperature is of logits"),
        ({"teacher": "ftp://host/v1"}, "is no address of a server"),
        ({"teacher": "http:///v1"}, "is no address of a server"),
        ({"teacher": "http://host:port/v1"}, "is no address"),
        ({"teacher": "http://me:secret@host/v1"}, "has a user or a password"),
        ({"teacher": "runs/a", "teacher_model": "a"}, "teacher_model would do nothing"),
    ],
)
def test_settings_that_a_server_cannot_serve(settings, says):
    with pytest.raises(ConfigError, match=says) as refused:
        objective_of(**{"address": "http://host:1/v1"} | _as_address(settings))
    assert "secret" not in str(refused.value)


def test_it_teaches_all_weights_of_a_base_too():
    """Over which an adapter that teaches would act."""
    course = {"model": "m", "data": "d", "method": veneer.Method("full")}
    veneer.Recipe(**course, objective=objective_of("http://host:1/v1"))
    with pytest.raises(ConfigError, match="over which a teacher acts"):
        veneer.Recipe(**course, objective=objective_of("an/adapter"))


def _as_address(settings: dict[str, Any]) -> dict[str, Any]:
    return {{"teacher": "address"}.get(name, name): value for name, value in settings.items()}
