"""Law 9: a pass over several adapters, each with rows of its own, equals a pass for each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import veneer
from support.random_adapters import examples, shake
from support.tiny_models import tiny
from veneer.adapter.beside import attach_beside
from veneer.adapter.use import acting
from veneer.data.packing import Batch, pack
from veneer.fused.forward import Forward, choose_forward
from veneer.fused.together import AdapterBatch, backward_together, losses_together

ROWS = examples([7, 19, 12, 5, 9, 16])
# The rows of each adapter.
BATCHES = {"default": [0, 3], "wide": [1], "dora": [5, 2, 4]}
LABELS = {"default": 10, "wide": 18, "dora": 34}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {"rank": 3, "targets": "qv", "dropout": 0.5},
    "wide": {"rank": 5, "targets": "all"},
    "dora": {"rank": 2, "targets": "all", "dora": True},
}


def beside() -> tuple[Any, Forward]:
    """Return a model in training mode, with all adapters beside each other, and its forward."""
    model = tiny("llama")
    for name, settings in SETTINGS.items():
        attach_beside(model, veneer.LoRA(**settings), name=name, seed=0)
    shake(model)
    forward, _ = choose_forward(model, ROWS)
    return model.train(), forward


def batches(seeds: int = 1) -> list[AdapterBatch]:
    return [
        AdapterBatch(name, packed(name), LABELS[name], torch.Generator().manual_seed(number))
        for number, name in enumerate(BATCHES)
    ]


def packed(name: str) -> Batch:
    return pack(ROWS, BATCHES[name])


def gradients(model: Any) -> dict[str, Tensor]:
    """Return the gradients that have added up, and forget them."""
    named = {n: w.grad for n, w in model.named_parameters() if w.grad is not None}
    model.zero_grad()
    return named


def test_attaching_beside_leaves_the_others_as_they_are():
    model = tiny("llama")
    first = attach_beside(model, veneer.LoRA(rank=2, targets="qv"), name="first", seed=0)
    second = attach_beside(model, veneer.LoRA(rank=3, lora_fa=True), name="second", seed=1)
    assert all(".first." in name for name in first)
    assert all(name.endswith(".second.lora_B") for name in second)
    trains = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trains == first.keys() | second.keys() != set()
    assert veneer.in_use(model) == {}


def test_a_pass_for_all_equals_a_pass_for_each():
    model, forward = beside()
    together = backward_together(forward, model, batches())
    ours, alone, losses = gradients(model), {}, []
    for number, name in enumerate(BATCHES):
        torch.manual_seed(number)
        with acting(model, name):
            losses.append(forward(model, packed(name)))
            (losses[-1] / LABELS[name]).backward()
        alone |= gradients(model)
    assert torch.equal(together, torch.stack(losses))
    assert ours.keys() == alone.keys() != set()
    assert all(torch.equal(ours[name], gradient) for name, gradient in alone.items())
    assert torch.equal(losses_together(forward, model, batches()), together)
    assert veneer.in_use(model) == {}
