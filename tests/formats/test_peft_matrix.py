"""Every part of PEFT's LoRA, both ways: its logits, and its gradients after one step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import veneer
from support.closeness import assert_no_further, assert_same_logits
from support.peft_cases import (
    CASES,
    adapter_tensors,
    base,
    logits,
    loss,
    opened,
    theirs,
    train_adapter,
    written,
)
from support.random_adapters import distance, same, snapshot

LR = 0.1
# What PEFT trains as one, and we, who keep it as two, must step by the sum of both gradients.
AS_ONE: dict[str, dict[str, str]] = {
    "embedding and head as one": {
        "model.embed_tokens.lora_embedding_A": "lm_head.lora_B",
        "model.embed_tokens.lora_embedding_B": "lm_head.lora_A",
    },
    "saved as one": {"model.embed_tokens.weight": "lm_head.weight"},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.thinned(one_in=4)
def test_logits_both_ways(case, tmp_path):
    kind, options = CASES[case]
    peer = theirs(kind, options)
    written(peer, tmp_path / "peft")
    model = base(kind)
    own, before = logits(model, kind), snapshot(model)
    veneer.load(model, tmp_path / "peft")
    ours = logits(model, kind)
    assert distance(ours, own) > 0.01
    veneer.save(model, tmp_path / "back", format="peft")
    for one in (peer, opened(kind, tmp_path / "back")):
        assert_same_logits(logits(one, kind), model, partial(logits, kind=kind))
    veneer.save(model, tmp_path / "native")
    for directory in ("back", "native"):
        again = veneer.load(base(kind), tmp_path / directory)
        assert same(adapter_tensors(again), adapter_tensors(model))
        assert torch.equal(logits(again, kind), ours)

    veneer.use(model, None)
    assert torch.equal(logits(model, kind), own)
    veneer.use(model, "default")
    assert torch.equal(logits(model, kind), ours)
    veneer.detach(model)
    assert torch.equal(logits(model, kind), own)
    assert same(before, snapshot(model))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.thinned(one_in=4, first=2)
def test_gradients_after_one_step(case, tmp_path):
    kind, options = CASES[case]
    peer, reference = theirs(kind, options), in_float64(theirs(kind, options))
    written(peer, tmp_path / "start")
    model = veneer.load(base(kind), tmp_path / "start")
    veneer.save(model, tmp_path / "back", format="peft")
    assert_same_logits(
        logits(opened(kind, tmp_path / "back"), kind), model, partial(logits, kind=kind)
    )
    train_adapter(model)
    for one in (peer, reference, model):
        loss(one, kind).backward()
    with gradients_in_place_of_weights(model):
        ours = {name: grad.detach().clone() for name, grad in adapter_tensors(model).items()}
    for first, second in AS_ONE.get(case, {}).items():
        total = ours[first] + transposed(ours[second], ours[first])
        ours |= {first: total, second: transposed(total, ours[second])}
    gradients = as_an_adapter(peer, kind, tmp_path / "peer")
    for name, exact in as_an_adapter(reference, kind, tmp_path / "reference").items():
        assert exact.any(), name
        assert_no_further(ours[name], gradients[name], exact, name)
    if case not in AS_ONE:
        stepped = [step(one, kind) for one in (model, peer, reference)]
        assert_no_further(*stepped, "logits after a step")


@pytest.mark.parametrize("case", ["experts alone", "experts, transposed"])
def test_gradients_of_experts_with_all_tokens_one_and_none(case, tmp_path):
    kind, options = CASES[case]
    peer, reference = theirs(kind, options), in_float64(theirs(kind, options))
    written(peer, tmp_path / "start")
    model = veneer.load(base(kind), tmp_path / "start")
    train_adapter(model)
    torch.manual_seed(0)
    index = torch.tensor([[0, 1], [2, 0], [0, 2], [2, 0], [0, 2]])  # 0: all, 1: one, 3: none
    x, weights, dy = torch.randn(5, 16), torch.rand(5, 2), torch.randn(5, 16)

    def gradients(model: nn.Module, experts: Callable[..., Tensor]) -> dict[str, Tensor]:
        dtype = next(model.parameters()).dtype
        leaves = {"x": x.to(dtype, copy=True), "weights": weights.to(dtype, copy=True)}
        for leaf in leaves.values():
            leaf.requires_grad_(True)
        model.zero_grad()
        experts(leaves["x"], index, leaves["weights"]).backward(dy.to(dtype))
        if isinstance(model, PeftModel):
            tensors = as_an_adapter(model, kind, tmp_path / str(dtype))
        else:
            with gradients_in_place_of_weights(model):
                tensors = {name: w.detach().clone() for name, w in adapter_tensors(model).items()}
        own = {name: w for name, w in tensors.items() if "layers.0.mlp.experts" in name}
        assert len(own) == 4
        return own | {name: leaf.grad for name, leaf in leaves.items()}

    def first_experts(model: nn.Module) -> nn.Module:
        return model.get_submodule("model.layers.0.mlp.experts")

    exact = gradients(reference, first_experts(reference.base_model.model))
    peers = gradients(peer, first_experts(peer.base_model.model))
    ours = first_experts(model)
    for forward in (ours, lambda *inputs: ours.routed(inputs, {})):  # alone, and in our passes
        for name, gradient in gradients(model, forward).items():
            assert_no_further(gradient, peers[name], exact[name], name)
            if "experts" in name:
                assert [bool(of_expert.any()) for of_expert in gradient] == [True] * 3 + [False]


def as_an_adapter(model: nn.Module, kind: str, place: Path) -> dict[str, Tensor]:
    """Return the gradients of PEFT's parameters under our names: written as an adapter's weights,
    and read as such."""
    with gradients_in_place_of_weights(model):
        written(model, place)
    return adapter_tensors(veneer.load(base(kind), place))


@contextmanager
def gradients_in_place_of_weights(model: nn.Module) -> Iterator[None]:
    trained = [weight for weight in model.parameters() if weight.grad is not None]
    weights = [weight.detach().clone() for weight in trained]
    with torch.no_grad():
        for weight in trained:  # some are views of others, whose gradients are to be added up
            weight.zero_()
        for weight in trained:
            weight.add_(weight.grad)
        yield
        for weight, value in zip(trained, weights, strict=True):
            weight.copy_(value)


def in_float64(model: nn.Module) -> nn.Module:
    """Return the model in float64, for which grouped products of experts are not made."""
    if any(name.endswith("experts") for name, _ in model.named_modules()):
        model.base_model.model.set_experts_implementation("eager")
    return model.double()


def step(model: nn.Module, kind: str) -> Tensor:
    """Take one step of plain SGD, and return the logits that come of it."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    torch.optim.SGD(trained, lr=LR).step()
    return logits(model, kind)


def transposed(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor if tensor.shape == like.shape else tensor.T
