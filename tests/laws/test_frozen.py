"""Law 2: only what should train has a gradient, and all else is bit-equal after training."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import veneer
from support.kinds import Kind, each_kind, in_share
from support.random_adapters import base_tensors, examples, same, snapshot
from support.tiny_models import tiny
from veneer.models.fingerprint import base_parameters, fingerprint
from veneer.training.events import Step

COURSE = {
    "steps": 2,  # A of a B that begins at zero has a gradient in the second
    "lr": 0.05,
    "warmup": 0,
    "weight_decay": 0.1,
    "tokens_per_step": 40,
    "tokens_per_batch": 25,
}
LENGTHS = [12, 9, 15, 20, 7, 11]


def train(kind: Kind, model: Any) -> Iterator[Any]:
    if kind.reads_tokens:
        course = veneer.TrainConfig(**COURSE, **kind.training)
        yield from veneer.train(model, kind.rows(LENGTHS), course)
        return
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    adamw = torch.optim.AdamW(weights, lr=0.05)
    for _ in range(2):
        kind.logits(model).logsumexp(-1).sum().backward()
        adamw.step()
        adamw.zero_grad()
        yield None


@each_kind(fast=in_share(2, trains=True))
def test_only_what_should_train_changes(kind):
    model = kind.attached()
    marks, before = fingerprint(model), snapshot(model)
    base = base_tensors(model)
    codes = ("absmax", "SCB", "weight_scale_inv", "scales")
    assert not kind.bits or any(name.endswith(codes) for name in base)
    named = dict(model.named_parameters())
    start = {name: weight.detach().clone() for name, weight in named.items()}
    trained = {name for name, weight in named.items() if weight.requires_grad}
    assert trained == {name for name in named if re.search(kind.trains, name)}
    received: set[str] = set()
    for name in trained:
        named[name].register_post_accumulate_grad_hook(lambda _, name=name: received.add(name))
    for _ in train(kind, model):
        others = [weight for name, weight in named.items() if name not in trained]
        assert not any(w.requires_grad or w.grad is not None for w in others)
    assert all(weight.grad is None for weight in model.parameters())
    changed = {name for name, w in named.items() if not torch.equal(w.detach(), start[name])}
    assert received == changed == trained
    if kind.replaces_weights:
        own = base_parameters(model, every_name=True)
        base = {name: weight for name, weight in base.items() if not own[name].requires_grad}
    after = base_tensors(model)
    assert same(base, {name: after[name] for name in base})
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in before}
    assert same(buffers, {name: before[name] for name in buffers})
    assert fingerprint(model) == marks


def test_only_the_newest_adapter_trains():
    model = tiny("llama")
    for name in ("a", "b"):
        veneer.attach(model, veneer.LoRA(rank=2, targets="all"), name=name)
    before = snapshot(model)
    list(veneer.train(model, examples(LENGTHS), veneer.TrainConfig(**COURSE)))
    changed = {n for n, w in snapshot(model).items() if not torch.equal(w, before[n])}
    assert changed == {n for n in before if ".adapters.b." in n}


def test_a_loaded_adapter_is_frozen(tmp_path):
    veneer.save(veneer.attach(tiny("llama"), veneer.LoRA(rank=2)), tmp_path / "a")
    model = veneer.load(tiny("llama"), tmp_path / "a")
    with pytest.raises(veneer.TrainingError, match="Nothing in this model trains"):
        list(veneer.train(model, examples([9]), veneer.TrainConfig(**COURSE)))


def test_attention_of_a_run_is_given_back():
    model = veneer.attach(tiny("llama"), veneer.LoRA(rank=2))
    before = model.config._attn_implementation
    events = veneer.train(model, examples([9, 9]), veneer.TrainConfig(**COURSE))
    while not isinstance(next(events), Step):
        pass
    events.close()
    assert model.config._attn_implementation == before
    assert not model.training
