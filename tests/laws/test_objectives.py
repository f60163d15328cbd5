"""Laws 3, 6, 8 and 9 of every objective: its loss and gradients are its paper's, whether rows are
packed, accumulated or share passes with other runs; and a run goes on to the bit."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import veneer
from support.closeness import assert_gradients_no_further, assert_no_further
from support.pairs import OBJECTIVES, expected_loss, log_probabilities, pairs
from support.plain import Float64
from support.random_adapters import examples, same, shake, trained_weights
from support.runs import of
from support.tiny_models import quantized, tiny
from veneer.adapter.use import base_alone
from veneer.data.encode import Example
from veneer.data.packing import pack
from veneer.fused.forward import Forward, choose_forward
from veneer.objectives.config import Objective
from veneer.processes.world import ALONE
from veneer.training.begin import let_train
from veneer.training.events import Evaluated, Notice, Step, Stopped
from veneer.training.optimizer import FlatAdamW
from veneer.training.reference import criteria_over
from veneer.training.step import counts_of

ROWS = pairs(3)
ONE_STEP = veneer.TrainConfig(lr=0.01, tokens_per_step=1000, steps=1, warmup=0, clip=0)
SEVERAL = replace(ONE_STEP, tokens_per_step=40, steps=3, save_every=1)

# IPO, SimPO and CPO are made of what DPO and ORPO are, and `losses` proves their formulas; ORPO
# is held to its paper in small passes below.
each_objective = pytest.mark.parametrize(
    "name",
    [
        name if name in ("dpo", "kto") else pytest.param(name, marks=pytest.mark.slow)
        for name in OBJECTIVES
    ],
)


def shaken(base: Any = None) -> Any:
    model = tiny("llama") if base is None else base
    return shake(veneer.attach(model, veneer.LoRA(rank=2, targets="all")), size=0.2)


def one_step(
    model: Any, objective: Objective, course: veneer.TrainConfig, monkeypatch: Any
) -> tuple[Step, dict[str, Tensor]]:
    """Return a run's one step, and its gradients by the weights' names."""
    gradients: dict[str, Tensor] = {}

    def note(self: FlatAdamW, **options: Any) -> Tensor:
        weights = (each for each in model.named_parameters() if each[1].requires_grad)
        gradients.update({name: weight.grad.clone() for name, weight in weights})
        return torch.tensor(True)

    monkeypatch.setattr(FlatAdamW, "step", note)
    (step,) = of(Step, list(veneer.train(model, ROWS, course, objective=objective)))
    return step, gradients


def by_the_paper(
    objective: Objective, model: Any, rows: list[Example]
) -> tuple[Tensor, dict[str, Tensor]]:
    weights = {n: w for n, w in model.named_parameters() if w.requires_grad}
    with Float64():
        loss = expected_loss(objective, model, rows)
    return loss.detach(), dict(
        zip(weights, torch.autograd.grad(loss, weights.values()), strict=True)
    )


@pytest.fixture(scope="module")
def model_and_forward() -> tuple[Any, Forward]:
    model = shaken()
    forward, _ = choose_forward(model, ROWS)
    assert forward.shares  # so that the laws below are of prompts that are computed once
    return model, forward


@each_objective
def test_a_packed_batch_is_the_papers(name, model_and_forward):
    objective, (model, forward) = OBJECTIVES[name], model_and_forward
    (criterion,) = criteria_over(
        *(objective, {"train": ROWS}, model, forward),
        **{"identity": {}, "world": ALONE, "tokens_per_batch": 50},
    )
    batch = pack(ROWS, [2, 0, 1])
    counts = counts_of(criterion, [(batch, True)], ALONE)
    outcome = criterion(forward.losses(model, batch), batch, counts)
    loss = outcome.loss / criterion.divisor(counts)
    weights = {n: w for n, w in model.named_parameters() if w.requires_grad}
    gradients = torch.autograd.grad(loss, weights.values())
    peer, peers = by_the_paper(objective, copy.deepcopy(model), ROWS)
    expected, exactly = by_the_paper(objective, copy.deepcopy(model).double(), ROWS)
    assert_no_further(loss, peer, expected, "the loss")
    assert_gradients_no_further(dict(zip(weights, gradients, strict=True)), peers, exactly)
    assert outcome.metrics is not None
    assert len(outcome.metrics) == len(criterion.metrics)


def test_a_step_of_small_passes_is_the_papers(monkeypatch):
    """Of ORPO, which divides one sum by pairs and another by tokens."""
    objective, model = OBJECTIVES["orpo"], shaken()
    peer, peers = by_the_paper(objective, copy.deepcopy(model), ROWS)
    expected, exactly = by_the_paper(objective, copy.deepcopy(model).double(), ROWS)
    course = replace(ONE_STEP, tokens_per_batch=30)
    step, gradients = one_step(copy.deepcopy(model), objective, course, monkeypatch)
    assert_no_further(torch.tensor(step.loss, dtype=torch.float64), peer, expected, "the loss")
    assert_gradients_no_further(gradients, peers, exactly)
    assert step.label_tokens == sum(row.label_tokens for row in ROWS)


def shaken_nf4() -> Any:
    return shaken(quantized("llama"))


@pytest.mark.parametrize("base", [pytest.param(shaken, marks=pytest.mark.slow), shaken_nf4])
def test_a_run_goes_on_to_the_bit(base, tmp_path):
    """Its reference is measured anew, as no cache knows these rows."""
    whole, stopped = base(), base()
    with base_alone(whole):
        chosen, rejected = log_probabilities(whole, ROWS)[0].unbind(1)
    seen: list[Any] = []
    options: dict[str, Any] = {"objective": OBJECTIVES["dpo"], "held_out": ROWS[:2]}

    def run(model: Any, place: Path, **more: Any) -> list[Any]:
        events = list(veneer.train(model, ROWS, SEVERAL, directory=place, **options, **more))
        seen.extend(events)
        steps = [replace(step, seconds=0.0, rss_bytes=0) for step in of(Step, events)]
        return [*steps, *of(Evaluated, events), *of(Stopped, events)]

    expected = run(whole, tmp_path / "whole")
    notice, *_ = [e.text for e in of(Notice, seen) if "The reference gives" in e.text]
    assert f"in {int((chosen > rejected).sum())} of {len(ROWS)} pairs" in notice
    asked = iter([False, True])
    first = run(stopped, tmp_path / "stopped", should_stop=lambda: next(asked))
    again = base()
    rest = run(again, tmp_path / "stopped", resume=True)
    assert len(of(Step, expected)) == SEVERAL.steps
    assert of(Step, first) + of(Step, rest) == of(Step, expected)
    assert of(Evaluated, first) + of(Evaluated, rest) == of(Evaluated, expected)
    assert same(trained_weights(again), trained_weights(whole))


def test_objectives_share_passes_with_each_other_and_with_answers():
    """Each run is what it is by itself, but for rounding, whatever objective the others have."""
    objectives = {"dpo": OBJECTIVES["dpo"], "sft": Objective()}
    rows = {name: examples([9, 12, 7]) if name == "sft" else ROWS for name in objectives}
    alone, together = with_adapters(objectives), with_adapters(objectives)
    expected: dict[str, list[Step]] = {}
    for name, objective in objectives.items():
        veneer.use(alone, name)
        let_train(alone, name)
        events = veneer.train(alone, rows[name], SEVERAL, objective=objective)
        expected[name] = of(Step, list(events))
        alone.requires_grad_(False)
    jobs = {name: veneer.Job(rows[name], SEVERAL, objectives[name]) for name in objectives}
    events = list(veneer.train_many(together, jobs))
    for name in objectives:
        steps = [event for own, event in events if own == name and isinstance(event, Step)]
        for ours, theirs in zip(steps, expected[name], strict=True):
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)
            assert ours.metrics == pytest.approx(theirs.metrics, rel=1e-3, abs=1e-4)
    texts = dict.fromkeys(objectives, "")
    for name, event in events:
        texts[name] += event.text if isinstance(event, Notice) else ""
    assert "Both rows of a pair read one prompt" in texts["dpo"]
    assert "pair" not in texts["sft"]


def with_adapters(names: Any) -> Any:
    model = tiny("llama")
    for number, name in enumerate(names):
        veneer.attach(model, veneer.LoRA(rank=2), name=name, seed=number)
    veneer.use(model, None)
    return model
