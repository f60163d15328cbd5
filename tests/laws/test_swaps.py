"""Law 4, of many: adapters come, act and go, and the base is what it was, to the bit."""

from typing import Any

import pytest
import torch

import veneer
from support.random_adapters import base_tensors, logits, same, shake, snapshot
from support.tiny_models import quantized, tiny
from veneer.quant.weight import quantized_layers

MANY = 20
BASES = {
    "float32": lambda: tiny("llama"),
    "bf16": lambda: tiny("gpt2", dtype=torch.bfloat16),
    "nf4": lambda: quantized("qwen2"),
}
KINDS: list[dict[str, Any]] = [
    {"rank": 2, "targets": "all"},
    {"rank": 1, "targets": "attention", "rslora": True},
    {"rank": 3, "targets": "all", "dora": True},
    {"rank": 2, "targets": "mlp", "alpha": 7},
]


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    """Four adapters of different kinds for each base."""
    place = tmp_path_factory.mktemp("adapters")
    for base, make in BASES.items():
        for number, kind in enumerate(KINDS):
            model = veneer.attach(make(), veneer.LoRA(**kind), seed=number)
            veneer.save(shake(model, seed=number), place / base / str(number))
    return place


@pytest.mark.parametrize("base", BASES)
def test_many_adapters_in_turn(base, homes):
    model = BASES[base]()
    before, alone = snapshot(model) | base_tensors(model), logits(model)
    expected: dict[int, torch.Tensor] = {}
    for turn in range(MANY):
        kind = turn % len(KINDS)
        veneer.load(model, homes / base / str(kind), name=f"turn{turn}")
        now = logits(model)
        assert not torch.equal(now, alone)
        assert torch.equal(expected.setdefault(kind, now), now)
        if turn % 10 == 0:
            plain = veneer.merge(model)
            with torch.no_grad():
                for path, _ in list(quantized_layers(model).items())[:1]:
                    plain.get_submodule(path.removesuffix(".original")).weight.zero_()
        veneer.detach(model)
    assert torch.equal(logits(model), alone)
    after = snapshot(model) | base_tensors(model)
    assert same(after, before)
    assert all(after[name].dtype == before[name].dtype for name in before)


@pytest.mark.parametrize("base", ["float32", "nf4"])
def test_many_adapters_side_by_side(base, homes):
    model = BASES[base]()
    alone = logits(model)
    weights = list(model.parameters())  # the very tensors, and what is in them
    before = [w.detach().clone() for w in weights]
    expected = []
    for kind in range(len(KINDS)):
        veneer.load(model, homes / base / str(kind), name=f"kind{kind}")
        expected.append(logits(model))
        veneer.detach(model)
    for turn in range(MANY):
        veneer.load(model, homes / base / str(turn % len(KINDS)), name=f"turn{turn}")
    assert len(veneer.adapters(model)) == MANY
    generator = torch.Generator().manual_seed(0)
    for turn in torch.randperm(MANY, generator=generator).tolist():
        veneer.use(model, f"turn{turn}")
        assert torch.equal(logits(model), expected[turn % len(KINDS)])
    veneer.use(model, None)
    assert torch.equal(logits(model), alone)
    own = {id(w) for w in model.parameters()}
    assert all(id(w) in own for w in weights)
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))
    veneer.detach(model)
    assert torch.equal(logits(model), alone)
