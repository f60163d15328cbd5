"""Laws 3, 6, 8 and 9 of every objective: its loss and gradients are its paper's, whether rows are
packed, accumulated or share passes with other runs; and a run goes on to the bit."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import veneer
from support.closeness import assert_gradients_no_further, assert_no_further
from support.pairs import OBJECTIVES, expected_loss, pairs
from support.plain import Float64
from support.random_adapters import shake
from support.runs import of
from support.tiny_models import tiny
from veneer.data.encode import Example
from veneer.objectives.config import Objective
from veneer.training.events import Step
from veneer.training.optimizer import FlatAdamW

ROWS = pairs()
ONE_STEP = veneer.TrainConfig(lr=0.01, tokens_per_step=1000, steps=1, warmup=0, clip=0)
SEVERAL = replace(ONE_STEP, tokens_per_step=40, steps=4, save_every=1)

each_objective = pytest.mark.parametrize("name", OBJECTIVES)


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


@each_objective
def test_a_step_is_the_papers(name, monkeypatch):
    """Packed, and accumulated from small passes but for KTO, whose distance is each pass's own."""
    objective, model = OBJECTIVES[name], shaken()
    peer, peers = by_the_paper(objective, copy.deepcopy(model), ROWS)
    expected, exactly = by_the_paper(objective, copy.deepcopy(model).double(), ROWS)
    for tokens in (None,) if name == "kto" else (None, 30):
        course = replace(ONE_STEP, tokens_per_batch=tokens)
        step, gradients = one_step(copy.deepcopy(model), objective, course, monkeypatch)
        assert_no_further(torch.tensor(step.loss, dtype=torch.float64), peer, expected, "loss")
        assert_gradients_no_further(gradients, peers, exactly)
        assert step.label_tokens == sum(row.label_tokens for row in ROWS)
