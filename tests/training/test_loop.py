"""The course of a run: what is learnt, when it is measured and saved, and what stops it."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import veneer
from support.closeness import assert_no_further
from support.random_adapters import examples, same, shake, trained_weights
from support.runs import COURSE, ROWS, new_model, of, run
from support.tiny_models import ARCHITECTURES, tiny
from veneer.data.encode import UNLABELLED
from veneer.data.packing import StepOrder
from veneer.fused.forward import Forward
from veneer.fused.head import Head
from veneer.training import loop
from veneer.training.evaluate import evaluate
from veneer.training.events import (
    Checkpointed,
    Evaluated,
    Started,
    Step,
    Stopped,
    Trained,
)


def test_steps_go_at_the_rate_of_the_schedule():
    course = replace(COURSE, steps=7, warmup=2, schedule="linear", lr=0.5)
    steps = of(Step, run(new_model(), course))
    assert [step.lr for step in steps] == [course.lr_at(step.step, 7) for step in steps]
    assert [step.step for step in steps] == [1, 2, 3, 4, 5, 6, 7]


# The length of a run, and what it goes through.


@pytest.mark.parametrize("epochs", [1, 2, 2.5, 0.3, 0.01])
def test_epochs_go_through_every_row(epochs):
    course = replace(COURSE, epochs=epochs, seed=3)
    order = StepOrder([len(row.tokens) for row in ROWS], 30, 30, 3)
    plan = [order.epoch(epoch) for epoch in range(4)]
    whole, share = int(epochs), epochs - int(epochs)
    expected = [step for epoch in plan[:whole] for step in epoch]
    expected += plan[whole][: math.ceil(share * len(plan[whole]))] if share else []
    steps = of(Step, run(new_model(), course))
    assert [step.tokens for step in steps] == [
        sum(len(ROWS[i].tokens) for batch in step for i in batch) for step in expected
    ]
    assert [step.label_tokens for step in steps] == [
        sum(ROWS[i].label_tokens for batch in step for i in batch) for step in expected
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
    assert [event.step for event in of(Evaluated, events)] == [0, 2, 3, 4, 6]
    assert isinstance(events[1], Evaluated)  # before the first step
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


# That the gradients of the others are right is held by the laws.
@pytest.mark.parametrize(
    "architecture",
    [
        each if each in ("gpt2", "llama") else pytest.param(each, marks=pytest.mark.slow)
        for each in ARCHITECTURES
    ],
)
def test_rows_are_learnt_by_heart(architecture):
    rows = examples([9, 7, 8], seed=5, learnt=1.0)
    model = new_model(architecture, rank=8)
    course = replace(COURSE, steps=60, lr=0.03, tokens_per_step=100, schedule="constant")
    losses = [step.loss for step in of(Step, run(model, course, rows))]
    assert losses[0] > 3
    assert losses[-1] < 0.3 * losses[0]
    assert not model.training
    with torch.no_grad():
        measured = evaluate(model, rows, Forward(packed=False, head=None))
    assert measured < 0.3 * losses[0]


def test_a_step_is_that_of_adamw_on_the_mean_of_the_labels():
    course = replace(COURSE, steps=3, tokens_per_step=1000, weight_decay=0.1, lr=0.02)
    model, plain, reference = new_model(), new_model(), new_model().double()
    losses = torch.tensor([step.loss for step in of(Step, run(model, course))])
    assert_no_further(
        losses, plain_losses(plain, course), plain_losses(reference, course), "losses"
    )
    # Rounding may decide the sign of a step where the gradient is nearly zero, so all the weights
    # are judged together.
    ours, theirs, wide = (
        torch.cat([weight.flatten() for weight in trained_weights(m).values()])
        for m in (model, plain, reference)
    )
    assert_no_further(ours, theirs, wide, "weights")


def plain_losses(model: Any, course: veneer.TrainConfig) -> Tensor:
    """Train with torch's AdamW on the mean over all rows, and return the losses."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, weight_decay=course.weight_decay)
    losses = []
    for step in range(1, course.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = course.lr_at(step, course.steps)
        loss = plain_mean(model, ROWS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def plain_mean(model: Any, rows: Any) -> Tensor:
    total, count = torch.zeros(()), 0
    for row in rows:
        logits = model(torch.tensor([row.tokens]), use_cache=False).logits[0, :-1]
        labels = torch.tensor(row.labels[1:])
        total = total + F.cross_entropy(logits, labels, ignore_index=UNLABELLED, reduction="sum")
        count += int((labels != UNLABELLED).sum())
    return total / count


@torch.no_grad()
def assert_is_mean_loss(loss: float, model: Any, rows: Any) -> None:
    """Assert that a loss is no further from the float64 model's than the plain model's is."""
    training = model.training
    theirs = plain_mean(model.eval(), rows)
    reference = plain_mean(copy.deepcopy(model).double(), rows)
    model.train(training)
    assert_no_further(torch.tensor(loss), theirs, reference, "loss")


@pytest.mark.parametrize("tokens", [1, 20, 10_000])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.thinned
def test_evaluation_is_the_mean_over_label_tokens(architecture, tokens):
    rows = examples([11, 3, 16, 9, 2], learnt=0.3)
    model = shake(new_model(architecture, dropout=0.5)).train()
    forward = Forward(packed=architecture != "falcon", head=Head())
    loop.choose_forward(model, rows)  # makes packed attention known
    loss = evaluate(model, rows, forward, tokens_per_batch=tokens)
    assert model.training
    assert_is_mean_loss(loss, model, rows)
    assert all(weight.grad is None for weight in model.parameters())


def test_evaluations_of_a_run():
    held_out = examples([12, 5, 9], seed=8)
    model = new_model()
    course = replace(COURSE, steps=2, eval_every=1, schedule="constant")
    for event in veneer.train(model, ROWS, course, held_out=held_out):
        if isinstance(event, Evaluated):
            assert model.training
            assert_is_mean_loss(event.eval_loss, model, held_out)
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
    assert_is_mean_loss(seen[best][0], model, held_out)


def test_the_weights_before_the_first_step_are_kept_where_none_are_better(tmp_path):
    held_out = examples([12, 5, 9], seed=8)
    model, course = new_model(), replace(COURSE, steps=8, lr=0.3, schedule="constant")
    before = trained_weights(model)
    events = run(model, course, held_out=held_out, directory=tmp_path)
    first = of(Evaluated, events)[0]
    assert [event.best for event in of(Evaluated, events)] == [True, False, False, False]
    assert_is_mean_loss(first.eval_loss, new_model(), held_out)
    assert events[-1] == Trained(8, 0)
    assert same(trained_weights(model), before)
    assert sum(1 for _ in tmp_path.iterdir()) == course.keep  # step 0 needs no checkpoint


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
    assert events[-1] == Trained(last, max(i for i, better in enumerate(best) if better))


def test_stopping():
    model = new_model()
    events = run(model, replace(COURSE, steps=9), should_stop=lambda: True)
    assert [type(event) for event in events[-2:]] == [Step, Stopped]
    assert events[-1] == Stopped(1, "interrupted")
    assert not model.training
    assert [type(e) for e in run(model, replace(COURSE, steps=1), should_stop=lambda: True)][
        -1
    ] == Trained


# What cannot be trained.


def test_a_model_in_which_nothing_trains():
    with pytest.raises(veneer.TrainingError, match="attach an adapter first"):
        run(tiny("llama").requires_grad_(False), COURSE)


def test_what_is_no_example_and_no_model():
    with pytest.raises(TypeError, match=r"made by .*load_examples.* is expected here, not a dict"):
        run(new_model(), COURSE, [{"text": "a"}])
    with pytest.raises(TypeError, match="not a Base; pass its"):
        run(veneer.Base("x", new_model(), None), COURSE)


def test_rows_from_which_nothing_is_learnt():
    with pytest.raises(veneer.DataError, match="no rows"):
        run(new_model(), COURSE, [])
    mute = replace(ROWS[1], labels=[UNLABELLED] * len(ROWS[1].tokens), where="data:7")
    for rows, held_out in (([ROWS[0], mute], []), (ROWS, [mute])):
        with pytest.raises(veneer.DataError, match="data:7"):
            run(new_model(), COURSE, rows, held_out=held_out)
