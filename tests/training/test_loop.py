"""The course of a run: what is learnt, when it is measured and saved, and what stops it."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import veneer
from support.random_adapters import distance, examples, same, shake, trained_weights
from support.tiny_models import ARCHITECTURES, tiny
from veneer.data.encode import UNLABELLED
from veneer.data.packing import StepOrder
from veneer.fused.forward import Forward
from veneer.training import loop
from veneer.training.evaluate import evaluate
from veneer.training.events import (
    Checkpointed,
    Evaluated,
    Event,
    Skipped,
    Started,
    Step,
    Stopped,
    Trained,
)

ROWS = examples([11, 7, 16, 9, 13, 8])
COURSE = veneer.TrainConfig(lr=0.01, tokens_per_step=30, warmup=0, clip=0)


def new_model(architecture: str = "llama", **options: Any) -> Any:
    config = veneer.LoRA(**{"rank": 2, "targets": "all"} | options)
    return veneer.attach(tiny(architecture), config, seed=0)


def run(model: Any, course: veneer.TrainConfig, rows: Any = ROWS, **options: Any) -> list[Event]:
    return list(veneer.train(model, rows, course, **options))


def of(kind: type, events: list[Event]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


# The learning rate.


@given(
    steps=st.integers(1, 300),
    warmup=st.sampled_from([0, 0.03, 0.1, 0.5, 0.9, 1, 3, 10, 400]),
    schedule=st.sampled_from(["constant", "cosine", "linear"]),
)
def test_schedules(steps, warmup, schedule):
    course = veneer.TrainConfig(lr=2.0, warmup=warmup, schedule=schedule)
    rates = [course.lr_at(step, steps) for step in range(1, steps + 1)]
    rise = warmup if warmup >= 1 else round(warmup * steps)
    assert all(0 < rate <= 2.0 for rate in rates)
    assert rates[:rise] == [2.0 * step / rise for step in range(1, min(rise, steps) + 1)]
    falling = rates[rise:]
    if not falling:
        return
    assert falling[0] == 2.0
    if schedule == "constant":
        assert set(falling) == {2.0}
        return
    assert falling == sorted(falling, reverse=True)
    left = len(falling)
    for done, rate in enumerate(falling):
        part = done / left
        wanted = 1 - part if schedule == "linear" else (1 + math.cos(math.pi * part)) / 2
        assert abs(rate - 2.0 * wanted) < 1e-12
    # One step more would be at zero.
    after = course.lr_at(steps + 1, steps)
    assert abs(after) < 1e-12


def test_steps_go_at_the_rate_of_the_schedule():
    course = replace(COURSE, steps=7, warmup=2, schedule="linear", lr=0.5)
    steps = of(Step, run(new_model(), course))
    assert [step.lr for step in steps] == [course.lr_at(step.step, 7) for step in steps]
    assert [step.step for step in steps] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    "faults",
    [
        {"epochs": 0},
        {"epochs": math.inf},
        {"steps": 0},
        {"lr": 0.0},
        {"lr": math.nan},
        {"warmup": -1},
        {"weight_decay": -0.1},
        {"clip": -1},
        {"tokens_per_step": 0},
        {"tokens_per_batch": 0},
        {"seed": -1},
        {"schedule": "steep"},
        {"save_every": 0},
        {"eval_every": -2},
        {"patience": 0},
    ],
    ids=str,
)
def test_courses_that_cannot_be(faults):
    with pytest.raises(veneer.ConfigError, match=next(iter(faults))):
        veneer.TrainConfig(**faults)


def test_all_faults_of_a_course_at_once():
    with pytest.raises(veneer.ConfigError) as caught:
        veneer.TrainConfig(lr=-1, steps=0, patience=0, schedule="x")  # type: ignore[arg-type]
    assert all(name in str(caught.value) for name in ("lr", "steps", "patience", "schedule"))


# The length of a run, and what it goes through.


@pytest.mark.parametrize("epochs", [1, 2, 2.5, 0.3, 0.01])
def test_epochs_go_through_every_row(epochs):
    course = replace(COURSE, epochs=epochs, seed=3)
    order = StepOrder([len(row.tokens) for row in ROWS], 30, 30, 3)
    plan = [order.epoch(epoch) for epoch in range(4)]
    whole, part = int(epochs), epochs - int(epochs)
    wanted = [step for epoch in plan[:whole] for step in epoch]
    wanted += plan[whole][: math.ceil(part * len(plan[whole]))] if part else []
    steps = of(Step, run(new_model(), course))
    assert [step.tokens for step in steps] == [
        sum(len(ROWS[i].tokens) for batch in step for i in batch) for step in wanted
    ]
    assert [step.label_tokens for step in steps] == [
        sum(ROWS[i].label_tokens for batch in step for i in batch) for step in wanted
    ]


def test_steps_outweigh_epochs():
    assert len(of(Step, run(new_model(), replace(COURSE, steps=11, epochs=1)))) == 11
    assert len(of(Step, run(new_model(), replace(COURSE, steps=1, epochs=9)))) == 1


def test_the_order_of_events(tmp_path):
    course = replace(COURSE, epochs=2, eval_every=2, save_every=3)
    events = run(new_model(), course, held_out=ROWS[:2], directory=tmp_path)
    steps = len(of(Step, events))
    per_epoch = steps // 2
    assert per_epoch == 3
    assert events[0] == Started(steps, 0)
    assert [event.step for event in of(Evaluated, events)] == [2, 3, 4, 6]
    assert [event.step for event in of(Checkpointed, events)] == [3, 6]
    assert isinstance(events[-1], Trained)
    for event in of(Checkpointed, events):
        assert event.place.parent == tmp_path
    kinds = [type(event).__name__ for event in events]
    at = kinds.index("Checkpointed")
    assert kinds[at - 2 : at + 1] == ["Step", "Evaluated", "Checkpointed"]


def test_nothing_is_written_without_a_directory(tmp_path):
    run(new_model(), replace(COURSE, steps=2, save_every=1))
    assert list(tmp_path.iterdir()) == []


def test_the_same_seed_gives_the_same_run():
    results = []
    for seed in (1, 1, 2):
        model = new_model(dropout=0.2)
        torch.rand(seed)  # whatever was drawn before
        losses = [s.loss for s in of(Step, run(model, replace(COURSE, epochs=2, seed=seed)))]
        results.append((losses, trained_weights(model)))
    assert results[0][0] == results[1][0] != results[2][0]
    assert same(results[0][1], results[1][1])
    assert not same(results[0][1], results[2][1])


# Learning.


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_are_learnt_by_heart(architecture):
    rows = examples([9, 7, 8], seed=5, learnt=1.0)
    model = new_model(architecture, rank=8)
    course = replace(COURSE, steps=60, lr=0.03, tokens_per_step=100, schedule="constant")
    losses = [step.loss for step in of(Step, run(model, course, rows))]
    assert losses[0] > 3
    assert losses[-1] < 0.3 * losses[0]
    assert not model.training
    with torch.no_grad():
        measured = evaluate(model, rows, Forward(packed=False, labelled_head=False))
    assert measured < 0.3 * losses[0]


def test_a_step_is_that_of_adamw_on_the_mean_of_the_labels():
    course = replace(COURSE, steps=3, tokens_per_step=1000, weight_decay=0.1, lr=0.02)
    model, plain = new_model(), new_model()
    losses = [step.loss for step in of(Step, run(model, course))]
    weights = [weight for weight in plain.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, weight_decay=0.1)
    for step in range(1, 4):
        for group in optimizer.param_groups:
            group["lr"] = course.lr_at(step, 3)
        loss = plain_mean(plain, ROWS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert abs(losses[step - 1] - float(loss)) < 1e-5 * float(loss)
    for found, wanted in zip(
        trained_weights(model).values(), trained_weights(plain).values(), strict=True
    ):
        assert distance(found, wanted) < 1e-3


def plain_mean(model: Any, rows: Any) -> Tensor:
    total, labels = torch.zeros(()), 0
    for row in rows:
        out = model(torch.tensor([row.tokens]), use_cache=False).logits[0, :-1]
        wanted = torch.tensor(row.labels[1:])
        total = total + F.cross_entropy(out, wanted, ignore_index=UNLABELLED, reduction="sum")
        labels += int((wanted != UNLABELLED).sum())
    return total / labels


@pytest.mark.parametrize("tokens", [1, 20, 10_000])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_evaluation_is_the_mean_over_label_tokens(architecture, tokens):
    rows = examples([11, 3, 16, 9, 2], learnt=0.3)
    model = shake(new_model(architecture, dropout=0.5)).train()
    with torch.no_grad():
        wanted = float(plain_mean(model.eval(), rows))
    model.train()
    way = Forward(packed=architecture != "falcon", labelled_head=True)
    loop.choose_forward(model, rows)  # makes packed attention known
    found = evaluate(model, rows, way, tokens_per_batch=tokens)
    assert abs(found - wanted) < 1e-5 * wanted
    assert model.training
    assert all(weight.grad is None for weight in model.parameters())


def test_evaluations_of_a_run():
    held_out = examples([12, 5, 9], seed=8)
    model = new_model()
    course = replace(COURSE, steps=2, eval_every=1, schedule="constant")
    for event in veneer.train(model, ROWS, course, held_out=held_out):
        if isinstance(event, Evaluated):
            assert model.training
            with torch.no_grad():
                wanted = float(plain_mean(model.eval(), held_out))
            model.train()
            assert abs(event.eval_loss - wanted) < 1e-5 * wanted
            assert event.perplexity == math.exp(event.eval_loss)


def test_the_best_weights_are_kept():
    held_out = examples([12, 5, 9], seed=8)
    model = new_model(rank=8)
    # At this rate the run clearly overfits: from its best of 4.70 to 5.14 in the end.
    course = replace(COURSE, epochs=6, lr=0.03, eval_every=1, schedule="constant")
    seen: dict[int, tuple[float, dict[str, Tensor]]] = {}
    events = []
    for event in veneer.train(model, ROWS, course, held_out=held_out):
        events.append(event)
        if isinstance(event, Evaluated):
            seen[event.step] = (event.eval_loss, trained_weights(model))
            earlier = [loss for step, (loss, _) in seen.items() if step < event.step]
            assert event.best == (event.eval_loss < min(earlier, default=math.inf))
    best = min(seen, key=lambda step: seen[step][0])
    last = max(seen)
    assert events[-1] == Trained(last, best)
    assert best < last
    assert same(trained_weights(model), seen[best][1])
    with torch.no_grad():
        assert abs(float(plain_mean(model, held_out)) - seen[best][0]) < 1e-5 * seen[best][0]


def test_without_held_out_rows_the_last_weights_are_kept():
    model = new_model()
    events = run(model, replace(COURSE, steps=3))
    assert events[-1] == Trained(3, 3)


@pytest.mark.parametrize("patience", [1, 3])
def test_patience(patience):
    held_out = examples([12, 5, 9], seed=8)
    course = replace(
        COURSE, epochs=20, lr=1.0, eval_every=1, schedule="constant", patience=patience
    )
    events = run(new_model(), course, held_out=held_out)
    best = [event.best for event in of(Evaluated, events)]
    assert best[-patience:] == [False] * patience
    assert all(any(best[i : i + patience]) for i in range(len(best) - patience))
    last = events[-3].step if not isinstance(events[-3], Checkpointed) else 0
    assert of(Stopped, events) == [Stopped(last, "patience")]
    assert events[-1] == Trained(last, 1 + max(i for i, better in enumerate(best) if better))


def test_stopping():
    model = new_model()
    events = run(model, replace(COURSE, steps=9), should_stop=lambda: True)
    assert [type(event) for event in events[-2:]] == [Step, Stopped]
    assert events[-1] == Stopped(1, "interrupted")
    assert not model.training
    assert [type(e) for e in run(model, replace(COURSE, steps=1), should_stop=lambda: True)][
        -1
    ] == Trained


# Gradients that are too large, or are none.


def spoil(monkeypatch: Any, when: Any, value: float = math.nan) -> None:
    """Let the loss of those training passes be `value` times itself for which `when` says so."""
    plain, passes = Forward.__call__, iter(range(10_000))

    def forward(self: Forward, model: Any, batch: Any) -> Tensor:
        loss = plain(self, model, batch)
        return loss * value if model.training and when(next(passes), batch) else loss

    monkeypatch.setattr(Forward, "__call__", forward)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_changes_nothing(value, monkeypatch):
    spoil(monkeypatch, lambda number, batch: number == 1, value)
    model = new_model()
    weights: list[dict[str, Tensor]] = []
    events = []
    for event in veneer.train(model, ROWS, replace(COURSE, steps=3, schedule="constant")):
        events.append(event)
        weights.append(trained_weights(model))
        assert all(weight.grad is None for weight in model.parameters())
    assert [type(event) for event in events[1:4]] == [Step, Skipped, Step]
    assert same(weights[1], weights[2])
    assert not same(weights[2], weights[3])
    order = StepOrder([len(row.tokens) for row in ROWS], 30, 30, 0)
    rows = {ROWS[i].where for batch in order.epoch(0)[1] for i in batch}
    assert set(events[2].rows) == rows
    assert all(torch.isfinite(weight).all() for weight in weights[-1].values())


def test_one_bad_pass_of_several_spoils_its_step(monkeypatch):
    spoil(monkeypatch, lambda number, batch: number == 0)
    model = new_model()
    before = trained_weights(model)
    course = replace(COURSE, steps=1, tokens_per_step=1000, tokens_per_batch=20)
    events = run(model, course)
    assert [set(event.rows) for event in of(Skipped, events)] == [{row.where for row in ROWS}]
    assert same(trained_weights(model), before)


def test_a_gradient_that_is_not_finite_changes_nothing():
    model = new_model()
    before = trained_weights(model)
    weight = model.model.layers[0].mlp.up_proj.adapters["default"].lora_B
    weight.register_hook(lambda grad: grad * math.inf)
    events = run(model, replace(COURSE, steps=2))
    assert len(of(Skipped, events)) == 2
    assert same(trained_weights(model), before)


def test_three_in_a_row_end_the_run(monkeypatch, tmp_path):
    spoil(monkeypatch, lambda number, batch: number >= 2)
    model = new_model()
    events: list[Event] = []
    course = replace(COURSE, steps=9, save_every=1)
    with pytest.raises(veneer.TrainingError) as caught:
        events.extend(veneer.train(model, ROWS, course, directory=tmp_path))
    assert len(of(Step, events)) == len(of(Skipped, events)) == 2
    said = str(caught.value)
    assert "3 steps in a row, up to step 5" in said
    assert "row:" in said
    assert str(tmp_path) in said
    assert not model.training


def test_others_between_them_let_the_run_go_on(monkeypatch):
    spoil(monkeypatch, lambda number, batch: number % 3 != 2)
    events = run(new_model(), replace(COURSE, steps=9))
    assert len(of(Skipped, events)) == 6
    assert len(of(Step, events)) == 3


@pytest.mark.parametrize("clip", [0, 1e-3, 1e6])
def test_clipping(clip, monkeypatch):
    norms: list[float] = []
    step = torch.optim.AdamW.step

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        grads = [w.grad for group in self.param_groups for w in group["params"]]
        norms.append(float(torch.stack([grad.norm() for grad in grads]).norm()))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    run(shake(new_model()), replace(COURSE, steps=2, clip=clip))
    if clip == 1e-3:
        assert all(abs(norm - clip) < 1e-5 for norm in norms)
    else:
        plain = list(norms)
        norms.clear()
        run(shake(new_model()), replace(COURSE, steps=2))
        assert plain == norms
        assert min(norms) > 0.01


# What cannot be trained.


def test_a_model_in_which_nothing_trains():
    with pytest.raises(veneer.TrainingError, match="attach an adapter first"):
        run(tiny("llama").requires_grad_(False), COURSE)


def test_rows_from_which_nothing_is_learnt():
    with pytest.raises(veneer.DataError, match="no rows"):
        run(new_model(), COURSE, [])
    mute = replace(ROWS[1], labels=[UNLABELLED] * len(ROWS[1].tokens), where="data:7")
    for rows, held_out in (([ROWS[0], mute], []), (ROWS, [mute])):
        with pytest.raises(veneer.DataError, match="data:7"):
            run(new_model(), COURSE, rows, held_out=held_out)
