"""Stacks of experts are merged and certified expert by expert, dense and quantized."""

import copy

import pytest
import torch

import veneer
from support.every_architecture import small, small_quantized
from support.random_adapters import distance, logits, shake
from veneer.adapter.certify import _requantized
from veneer.adapter.layers import lora_layers
from veneer.adapter.merge import layer_roundings, rounded_away
from veneer.quant.stack import quantized_stacks

STACKS = "experts.gate_up_proj,experts.down_proj"


def bases(dtype=torch.float32):
    yield small("gpt_oss", dtype=dtype)  # whose stacks are (experts, in, out)
    yield small("qwen3_moe", dtype=dtype)
    yield small_quantized("gpt_oss", 4, dtype=dtype)
    yield small_quantized("qwen3_moe", 4, dtype=dtype)


@pytest.mark.parametrize("shared", [False, True])
def test_each_expert_is_the_sum_rounded_once(shared):
    for base in bases(torch.bfloat16):
        config = veneer.LoRA(rank=4, targets=STACKS, shared_expert_a=shared)
        model = shake(veneer.attach(base, config))
        plain = veneer.merge(model)
        for path, layer in lora_layers(model):
            expected = layer.base_weight.float() + layer.delta()
            merged = layer.weight_in(plain, path)
            assert merged.dtype == torch.bfloat16
            assert (merged.float() - expected).abs().max() <= 2**-8 * expected.abs().max()
            assert plain.get_parameter(path).is_contiguous()


def test_the_change_of_a_stack_is_that_of_its_experts_together():
    for base in bases():
        model = shake(veneer.attach(base, veneer.LoRA(rank=4, targets=STACKS)))
        plain = veneer.merge(model)
        layers = dict(lora_layers(model))
        is_quantized = bool(quantized_stacks(model))
        for rounding in layer_roundings(model, plain):
            delta = layers[rounding.path].delta()
            assert rounding.change == pytest.approx(float(delta.norm()), rel=1e-5)
            assert (rounding.error_requantized is not None) == is_quantized
        assert rounded_away(model, plain) < 1e-4


def test_quantized_stacks_are_quantized_again_for_the_certificate():
    base = small_quantized("qwen3_moe", 4, dtype=torch.float32)
    model = shake(veneer.attach(copy.deepcopy(base), veneer.LoRA(rank=4, targets="attention,mlp")))
    again = _requantized(model, veneer.merge(model))
    assert again is not None
    assert quantized_stacks(again).keys() == quantized_stacks(base).keys()
    # Merging nothing and quantizing again gives the weights of before, but for the scales.
    model = veneer.attach(copy.deepcopy(base), veneer.LoRA(rank=4, targets=STACKS))
    again = _requantized(model, veneer.merge(model))
    for path, stack in quantized_stacks(base).items():
        assert distance(quantized_stacks(again)[path].dense(), stack.dense()) < 1e-2


def test_detaching_gives_the_quantized_stacks_back():
    base = small_quantized("gpt_oss", 4, dtype=torch.float32)
    before = quantized_stacks(base)
    model = veneer.detach(shake(veneer.attach(base, veneer.LoRA(rank=4, targets=STACKS))))
    assert list(quantized_stacks(model).items()) == list(before.items())


def test_a_fresh_adapter_over_quantized_experts_changes_no_bit():
    base = small_quantized("qwen3_moe", 4, dtype=torch.float32)
    for module in base.modules():
        if hasattr(module, "top_k"):
            module.top_k = 3  # outputs that are added up in another order are others
    model = veneer.attach(copy.deepcopy(base), veneer.LoRA(rank=4, targets=STACKS))
    assert torch.equal(logits(model), logits(base))
