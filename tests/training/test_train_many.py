"""Which jobs share a pass, and which cannot."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

import veneer
from support.many_runs import COURSE, KINDS, together
from support.random_adapters import examples
from support.tiny_models import tiny
from veneer.formats.capture import capture
from veneer.formats.install import install
from veneer.formats.state import StoredTokens
from veneer.training.begin import let_train
from veneer.training.checkpoint import newest
from veneer.training.events import Ended, Failed, Notice, Step
from veneer.training.many import train as many
from veneer.training.many.schedule import Waiting, choose


@pytest.mark.parametrize(
    ("waiting", "chosen"),
    [
        ([(300, 0.0), (300, 0.0), (300, 0.0)], [0, 1, 2]),
        ([(600, 0.5), (600, 0.1)], [1]),  # who is least far comes first
        ([(600, 0.5), (600, 0.1), (400, 0.9)], [1, 2]),  # and who fits takes what is left
        ([(4000, 0.2), (10, 0.1)], [1]),
        ([(4000, 0.2), (10, 0.3)], [0]),  # a batch larger than a pass has one of its own
        ([(500, 0.2), (500, 0.2), (1, 0.2)], [0, 1]),
    ],
)
def test_passes_are_filled_by_those_that_are_least_far(waiting, chosen):
    assert choose([Waiting(*each) for each in waiting], 1000) == chosen


def test_jobs_of_many_lengths_fill_passes_and_end_together(monkeypatch):
    passes: list[list[str]] = []

    def seen(forward: Any, model: Any, batches: Any, **options: Any) -> Any:
        passes.append([each.adapter for each in batches])
        return own(forward, model, batches, **options)

    own = many.backward_together
    monkeypatch.setattr(many, "backward_together", seen)
    long = replace(KINDS["qv"], course={"steps": 6})
    short = replace(KINDS["qv"], course={"steps": 2, "tokens_per_batch": 10}, lengths=(9, 8, 10))
    results = together({"long": long, "short": short, "other": long})
    assert [len(result.losses) for result in results.values()] == [6, 2, 6]
    # Two steps of three batches each, so that every pass but those of the last steps has them all.
    assert passes == [["long", "short", "other"]] * 6
    steps = [e for e in results["short"].events if isinstance(e, Step)]
    assert [e.tokens for e in steps] == [27, 27]


def job(**course: Any) -> veneer.Job:
    return veneer.Job(examples([9, 8]), replace(COURSE, **course))


def test_what_cannot_train_together_is_said_before_the_first_step():
    model = veneer.attach(tiny("llama"), veneer.LoRA(rank=1), name="one", seed=0)
    veneer.attach(model, veneer.LoRA(rank=1), name="two", seed=0)
    jobs = {"one": job(recompute="full"), "two": job(replay_passes=True)}
    with pytest.raises(veneer.ConfigError, match=r"recompute must be the same.*replay_passes is"):
        next(veneer.train_many(model, jobs))
    with pytest.raises(veneer.AdapterError, match=r"'tow' \(attached: one, two\); did you mean"):
        next(veneer.train_many(model, {"tow": job()}))
    with pytest.raises(veneer.DataError, match="no rows"):
        next(veneer.train_many(model, {"one": job(), "two": veneer.Job([])}))
    assert veneer.in_use(model) == {"two": 1.0}


def test_jobs_that_cannot_join_leave_the_others_learning():
    model = veneer.attach(tiny("llama"), veneer.LoRA(rank=1), name="one", seed=0)
    late = iter([{"one": job()}, {"late": veneer.Job([])}])

    def joining() -> dict[str, veneer.Job]:
        jobs = next(late, {})
        for name in {*jobs} - {"one"}:
            veneer.attach(model, veneer.LoRA(rank=1), name=name, seed=0)
        return jobs

    events = list(veneer.train_many(model, {"one": job(steps=4)}, joining=joining))
    failed = [(name, str(event.error)) for name, event in events if isinstance(event, Failed)]
    assert failed == [
        ("one", "one is a job that trains already."),
        ("late", "There are no rows to train on."),
    ]
    assert sum(isinstance(event, Step) for _, event in events) == 4


def test_an_error_that_nobody_expected_ends_its_own_job_alone():
    def through(events: Any) -> Any:
        for event in events:
            if isinstance(event, Step):
                raise RuntimeError("out of memory")
            yield event

    model = veneer.attach(tiny("llama"), veneer.LoRA(rank=1), name="one", seed=0)
    veneer.attach(model, veneer.LoRA(rank=1), name="two", seed=0)
    jobs = {"one": replace(job(steps=4), through=through), "two": job(steps=4)}
    events = list(veneer.train_many(model, jobs))
    last = dict(events)
    assert isinstance(last["one"], Failed)
    assert last["one"].why == "RuntimeError: out of memory"
    assert isinstance(last["two"], Ended)


def test_an_error_in_a_pass_of_its_own_ends_its_own_job_alone(monkeypatch):
    def fails(forward: Any, model: Any, batches: Any, **options: Any) -> Any:
        if batches[0].adapter == "one":
            raise RuntimeError("out of memory")
        return own(forward, model, batches, **options)

    own = many.backward_together
    monkeypatch.setattr(many, "backward_together", fails)
    monkeypatch.setattr(many, "why_alone", lambda *_: {"one": "its kind"})
    model = veneer.attach(tiny("llama"), veneer.LoRA(rank=1), name="one", seed=0)
    veneer.attach(model, veneer.LoRA(rank=1), name="two", seed=0)
    events = list(veneer.train_many(model, {"one": job(steps=4), "two": job(steps=4)}))
    last = dict(events)
    assert isinstance(last["one"], Failed)
    assert isinstance(last["two"], Ended)
    assert sum(isinstance(event, Step) for name, event in events if name == "two") == 4


def test_a_job_of_a_kind_that_trains_two_at_a_time_joins_without_another_proof(monkeypatch):
    proofs: list[list[str]] = []

    def noted(forward: Any, model: Any, names: Any, rows: Any) -> Any:
        proofs.append(list(names))
        return own(forward, model, names, rows)

    own = many.why_alone
    monkeypatch.setattr(many, "why_alone", noted)
    model = tiny("llama")
    plain, dora = veneer.LoRA(rank=1), veneer.LoRA(dora=True)
    prompt = veneer.Method(method="prompt", virtual_tokens=2)
    joins = [
        {"three": veneer.LoRA(rank=4)},  # as one and two
        {"dora": dora},  # the first of its kind
        {"doras": dora, "four": plain},  # with which nothing shared a pass
        {"last": dora, "five": plain},
    ]

    def joining() -> dict[str, veneer.Job]:
        return attached(joins.pop(0)) if joins else {}

    def attached(configs: Any) -> dict[str, veneer.Job]:
        for name, config in configs.items():
            veneer.attach(model, config, name=name, seed=0)
        return dict.fromkeys(configs, job(steps=12))

    first = {"one": plain, "two": veneer.LoRA(rank=2, alpha=3), "prompt": prompt}
    events = list(veneer.train_many(model, attached(first), joining=joining))
    earlier = ["one", "two", "prompt"]
    others = [["three", "dora"], ["doras", "four"]]
    assert proofs == [earlier, earlier + others[0], earlier + others[0] + others[1]]
    notices = [(name, event.text) for name, event in events if isinstance(event, Notice)]
    assert {name for name, text in notices if "passes of their own" in text} == {"prompt"}
    assert sum(isinstance(event, Ended) for _, event in events) == 9


def test_rows_of_single_tokens_are_learnt_by_their_own_job_alone(tmp_path):
    model = veneer.attach(tiny("llama"), veneer.LoRA(rank=1), seed=0)
    path, weight = "model.embed_tokens", model.get_input_embeddings().weight.detach()
    state = replace(capture(model), trained_tokens={path: StoredTokens((7, 9), weight[[7, 9]])})
    alone, model = tiny("llama"), tiny("llama")
    install(alone, state, name="default", tokenizer=None)
    let_train(alone, "default")
    list(
        veneer.train(alone, examples([9, 8]), replace(COURSE, lr=0.3), directory=tmp_path / "alone")
    )
    jobs = {}
    for name, lr in (("one", 0.3), ("two", 0.01)):
        install(model, state, name=name, tokenizer=None)
        course = replace(COURSE, lr=lr)
        jobs[name] = veneer.Job(examples([9, 8]), course, directory=tmp_path / name)
    assert not any(isinstance(event, Failed) for _, event in veneer.train_many(model, jobs))
    rows = [each.get_submodule(path).tokens for each in (alone, model)]
    assert torch.equal(rows[0]["default"].rows, rows[1]["one"].rows)
    assert not torch.equal(rows[1]["one"].rows, rows[1]["two"].rows)
    stored = [newest(tmp_path / name).tensors for name in ("alone", "one", "two")]
    assert stored[0].keys() == stored[1].keys() == stored[2].keys()


@pytest.mark.parametrize("tokens_join", [True, False])
def test_what_a_configuration_does_not_say_keeps_passes_apart_whoever_joins(tokens_join):
    """Rows of single tokens, here: beside plain adapters of the same configuration."""
    alone, model = (tiny("llama") for _ in range(2))
    config = veneer.LoRA(rank=1)
    path, weight = "model.embed_tokens", model.get_input_embeddings().weight.detach()
    state = capture(veneer.attach(tiny("llama"), config, seed=0))
    state = replace(state, trained_tokens={path: StoredTokens((7, 9), weight[[7, 9]])})
    install(alone, state, name="tokens", tokenizer=None)
    list(veneer.train_many(alone, {"tokens": job(steps=6)}))

    def attached(*names: str) -> dict[str, veneer.Job]:
        for name in names:
            if name == "tokens":
                install(model, state, name=name, tokenizer=None)
            else:
                veneer.attach(model, config, name=name, seed=0)
        return dict.fromkeys(names, job(steps=6))

    joins = [("tokens",) if tokens_join else ("three",)]
    first = ("one", "two") if tokens_join else ("tokens", "one", "two")
    joining = lambda: attached(*joins.pop()) if joins else {}  # noqa: E731
    events = list(veneer.train_many(model, attached(*first), joining=joining))
    assert {name for name, event in events if isinstance(event, Notice)} == {"tokens"}
    expected, own = (each.get_submodule(path).tokens["tokens"].rows for each in (alone, model))
    assert torch.equal(own, expected)


def test_forwards_are_of_the_modules_that_are_there_and_compute_again_what_a_job_asks(monkeypatch):
    """Of experts that had no adapter for a while, and of jobs after all others have ended."""
    forwards: list[Any] = []

    def seen(forward: Any, model: Any, batches: Any, **options: Any) -> Any:
        assert set(forward.experts) <= set(model.modules())
        forwards.append(forward)
        return own(forward, model, batches, **options)

    own = many.backward_together
    monkeypatch.setattr(many, "backward_together", seen)
    model = tiny("mixtral")
    config = veneer.LoRA(rank=1, targets=["experts.gate_up_proj", "experts.down_proj"])

    def attached(*names: str, **course: Any) -> dict[str, veneer.Job]:
        def through(events: Any, name: str) -> Any:
            try:
                yield from events
            finally:
                veneer.detach(model, name)

        for name in names:
            veneer.attach(model, config, name=name, seed=0)
        veneer.use(model, None)  # all of them will have been detached
        return {
            name: replace(job(steps=2, **course), through=partial(through, name=name))
            for name in names
        }

    def joining() -> dict[str, veneer.Job]:
        if veneer.adapters(model) or not joins:
            return {}
        names, course = joins.pop()
        return attached(*names, **course)

    joins = [(("five", "six"), {"recompute": "full"}), (("three", "four"), {})]
    list(veneer.train_many(model, attached("one", "two"), joining=joining))
    assert [each.recompute for each in forwards] == ["none"] * 4 + ["full"] * 2
    assert len({each.experts for each in forwards}) == 3
    assert all(each.experts for each in forwards)


@pytest.mark.slow
def test_who_has_passes_of_his_own_is_told_why():
    model = tiny("gpt2")
    model.transformer.drop.p = 0.1
    for name in ("one", "two"):
        veneer.attach(model, veneer.LoRA(rank=1), name=name, seed=0)
    events = list(veneer.train_many(model, {"one": job(), "two": job()}))
    texts = {(name, event.text) for name, event in events if isinstance(event, Notice)}
    why = (
        "Its steps have passes of their own: the base draws random numbers by itself in training, "
        "as dropout does."
    )
    assert {(name, why) for name in ("one", "two")} <= texts
    assert {name for name, event in events if isinstance(event, Step)} == {"one", "two"}
