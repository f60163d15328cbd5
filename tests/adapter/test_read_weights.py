"""What the outside sees of an adapted layer's weight: by its name, its value, and its gradient."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import veneer
from support import tiny_models
from support.closeness import assert_no_further
from support.random_adapters import logits, same, shake, snapshot, tokenizer, with_new_tokens
from support.tiny_models import tiny
from veneer.adapter.weight_access import Place

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "pissa": {"init": "pissa"},
}


def layer_of(architecture: str, path: str, **options: Any) -> Any:
    model = tiny(architecture)
    veneer.attach(model, veneer.LoRA(rank=2, targets=[path], **options), seed=0)
    return shake(model).get_submodule(path)


LAYERS = {"llama": "model.layers.0.mlp.up_proj", "gpt2": "transformer.h.0.attn.c_attn"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", LAYERS)
def test_the_weight_is_what_acts(architecture, kind):
    layer = layer_of(architecture, LAYERS[architecture], **KINDS[kind])
    reference = copy.deepcopy(layer).double().weight
    assert_no_further(layer.weight, layer.fuse().weight, reference)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", LAYERS)
def test_using_the_weight_is_calling_the_layer(architecture, kind):
    layer = layer_of(architecture, LAYERS[architecture], **KINDS[kind]).double()
    x = torch.randn(5, layer.base_weight.shape[1], dtype=torch.float64)
    trained = [p for p in layer.parameters() if p.requires_grad]
    by_call = layer(x)
    weight = layer.weight if architecture == "llama" else layer.weight.T
    by_weight = F.linear(x, weight, layer.bias)
    torch.testing.assert_close(by_weight, by_call)
    dy = torch.randn_like(by_call)
    gradients = torch.autograd.grad(by_weight, trained, dy)
    torch.testing.assert_close(gradients, torch.autograd.grad(by_call, trained, dy))


def test_the_weight_of_a_quantized_layer():
    model = tiny_models.quantized("llama")
    veneer.attach(model, veneer.LoRA(rank=2, targets="up_proj"), seed=0)
    layer = shake(model).get_submodule(LAYERS["llama"])
    ((adapter, _),) = layer.active()
    delta = adapter.scaling * adapter.lora_B.double() @ adapter.lora_A.double()
    reference = layer.dense_base_weight.double() + delta
    assert_no_further(layer.weight, layer.fuse().weight, reference)


def test_a_weight_on_which_nothing_acts_is_the_original_s_own():
    layer = layer_of("llama", LAYERS["llama"])
    layer.active_adapters.use(None)
    assert layer.weight is layer.original.weight


def test_a_weight_that_is_only_looked_at_is_not_made():
    model = tiny("t5")
    veneer.attach(model, veneer.LoRA(rank=2, targets="wo,wi,q"), seed=0)
    shake(model)
    block = model.encoder.block[0].layer[1].DenseReluDense
    assert block.wo.weight is block.wo.original.weight
    assert block.wi.weight is not block.wi.original.weight


class Reads(nn.Module):
    def forward(self, x: Any) -> Any:
        assert isinstance(self.a.weight, torch.Tensor)
        assert self.b.weight.dtype == x.dtype
        return self.a((x @ self.b.weight.T).to(self.c.weight.dtype)) * self.e(x) @ self.e.weight


def test_which_weights_are_only_looked_at_and_which_layers_never_called():
    looked_at = [Place(Reads, name).is_looked_at for name in "abcde"]
    assert looked_at == [True, False, True, False, False]
    never_called = [Place(Reads, name).is_never_called for name in "abcde"]
    assert never_called == [False, True, False, False, False]
    assert not Place(type("Unseen", (nn.Module,), {}), "a").is_looked_at


def test_mamba_learns_where_it_reads_a_weight():
    """It multiplies by dt_proj's weight, and never calls dt_proj."""
    model = tiny("mamba")
    veneer.attach(model, veneer.LoRA(rank=2, targets="dt_proj"), seed=0)
    base = logits(model)
    model(torch.arange(3, 20)[None]).logits.square().mean().backward()
    adapter = model.backbone.layers[0].mixer.dt_proj.adapters["default"]
    assert adapter.lora_B.grad.norm() > 0
    assert not torch.equal(logits(shake(model)), base)


@pytest.mark.parametrize("dora", [False, True])
def test_an_original_that_trains_beside_its_adapter_has_its_gradient(dora):
    layer = layer_of("llama", LAYERS["llama"], dora=dora).double()
    layer.original.requires_grad_(True)
    x = torch.randn(5, layer.base_weight.shape[1], dtype=torch.float64)
    dy = torch.randn(5, layer.base_weight.shape[0], dtype=torch.float64)
    own = layer.original.weight
    gradient = torch.autograd.grad(layer(x), own, dy)
    expected = torch.autograd.grad(F.linear(x, layer.weight), own, dy)
    torch.testing.assert_close(gradient, expected)
    assert layer.projection() is None


@pytest.mark.parametrize("targets", ["all", "embed_tokens", "lm_head"])
def test_a_state_dict_has_the_base_s_own_names(targets):
    base = tiny_models.tiny("qwen2")
    model = tiny_models.tiny("qwen2")
    veneer.attach(model, veneer.LoRA(rank=2, targets=targets, dora=True), seed=0)
    state = snapshot(shake(model))
    own = {name: value for name, value in state.items() if ".adapters." not in name}
    assert same(own, snapshot(base))
    other = tiny_models.tiny("qwen2", seed=1)
    veneer.attach(other, veneer.LoRA(rank=2, targets=targets, dora=True), seed=1)
    assert other.load_state_dict(state) == ([], [])
    assert torch.equal(logits(other), logits(model))
    assert base.load_state_dict(own) == ([], [])
    missing, unexpected = other.load_state_dict({**own, "more": own["model.norm.weight"]}, False)
    assert missing
    assert all(".adapters." in name for name in missing)
    assert unexpected == ["more"]


def test_a_state_dict_with_new_tokens_under_adapters():
    def extended(seed: int) -> Any:
        model = tiny_models.tiny("llama", seed=seed)
        with_new_tokens(model, tokenizer())
        return veneer.attach(model, veneer.LoRA(rank=2, targets="all"), seed=seed)

    model, other = shake(extended(0)), extended(1)
    state = snapshot(model)
    assert "model.embed_tokens.weight" in state
    assert "model.embed_tokens.rows" in state
    assert other.load_state_dict(state) == ([], [])
    assert torch.equal(logits(other), logits(model))
