"""Adapted experts where autocast chooses the dtype, as transformers' Trainer with bf16 does."""

import pytest
import torch

import veneer
from support.closeness import assert_no_further
from support.random_adapters import shake
from support.tiny_models import tiny

EXPERTS = "model.layers.0.mlp.experts"
INDEX = torch.tensor([[0, 1], [2, 0], [3, 2], [1, 3], [0, 2]])


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
def test_autocast_rounds_as_it_does_in_the_merged_model(architecture):
    model = tiny(architecture)
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    shake(veneer.attach(model, veneer.LoRA(rank=2, targets=targets)))
    merged = veneer.merge(model)
    merged.set_experts_implementation("eager")  # grouped products know no autocast
    torch.manual_seed(0)
    x, weights = torch.randn(len(INDEX), model.config.hidden_size), torch.rand(INDEX.shape)
    ours, theirs = (each.get_submodule(EXPERTS) for each in (model, merged))
    exact = theirs(x, INDEX, weights)
    with torch.autocast("cpu", torch.bfloat16):
        trained = ours(x, INDEX, weights)
        with torch.no_grad():
            y, peer = (experts(x, INDEX, weights) for experts in (ours, theirs))
        assert ours.reason is None  # they are recognised there, too
    for each in (y, trained):
        assert each.dtype == peer.dtype
        assert_no_further(each, peer, exact)
    trained.sum().backward()
    assert all(w.grad.any() for w in ours.parameters() if w.requires_grad)
