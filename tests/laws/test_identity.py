"""Law 1: a fresh adapter is an identity."""

import pytest
import torch

import veneer
from support.random_adapters import distance, logits, same, shake, snapshot, targets_named
from support.tiny_models import ARCHITECTURES, tiny
from veneer.adapter.embedding import LoRAEmbedding
from veneer.adapter.layers import lora_layers

TARGETS = ["attention", "qv", "mlp", "all", "embedding", "everything"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("init", ["auto", "kaiming", "gaussian"])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_bit_equal(architecture, targets, init, dtype):
    model = tiny(architecture, dtype=dtype)
    base = logits(model)
    config = veneer.LoRA(rank=3, targets=targets_named(model, targets), init=init, dropout=0.5)
    assert veneer.attach(model, config) is model
    assert len(list(lora_layers(model))) >= 1
    assert torch.equal(logits(model), base)
    model.train()
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_beside_another_adapter(architecture):
    model = tiny(architecture)
    shake(veneer.attach(model, veneer.LoRA(rank=2, targets="all"), name="a"))
    said, base = logits(model), logits(tiny(architecture))
    veneer.attach(model, veneer.LoRA(rank=3, targets=targets_named(model, "everything")), name="b")
    assert torch.equal(logits(model), base)
    veneer.use(model, {"a": 1.0, "b": 1.0})
    torch.testing.assert_close(logits(model), said, rtol=1e-5, atol=1e-5)
    veneer.use(model, "a")
    assert torch.equal(logits(model), said)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_starts_at_zero_and_what_does_not(architecture):
    model = tiny(architecture)
    before = snapshot(model)
    config = veneer.LoRA(rank=3, targets=targets_named(model, "everything"))
    veneer.attach(model, config)
    for path, layer in lora_layers(model):
        part = layer.adapters["default"]
        zero, random = part.lora_B, part.lora_A
        if isinstance(layer, LoRAEmbedding):
            zero, random = random, zero
        assert zero.count_nonzero() == 0, path
        assert random.count_nonzero() == random.numel(), path
        assert {part.lora_A.dtype, part.lora_B.dtype} == {torch.float32}
        assert (part.rank, part.scaling) == (3, 2.0)
    veneer.detach(model)
    assert same(snapshot(model), before)


def test_the_start_of_A():
    model = tiny("llama")
    starts = {}
    for init in ("kaiming", "gaussian", "auto"):
        veneer.attach(model, veneer.LoRA(rank=64, targets="down_proj", init=init), name=init)
        starts[init] = model.model.layers[0].mlp.down_proj.adapters[init].lora_A.detach()
    bound = 1 / 48**0.5  # down_proj reads 48 features
    assert 0.95 * bound < float(starts["kaiming"].abs().max()) <= bound
    assert abs(float(starts["kaiming"].std()) * 3**0.5 - bound) < 0.05 * bound
    assert abs(float(starts["gaussian"].std()) - 0.01) < 0.001
    assert float(starts["gaussian"].abs().max()) > 0.02
    assert abs(float(starts["auto"].std() / starts["kaiming"].std()) - 1) < 0.1
    small = veneer.attach(tiny("minigpt"), veneer.LoRA(rank=64, targets="linear1"))
    assert abs(float(small.model.layers[0].linear1.adapters["default"].lora_A.std()) - 0.01) < 0.001


def test_a_seed_makes_the_start_repeatable_and_leaves_torch_alone():
    before = torch.get_rng_state()
    starts = []
    for seed in (4, 4, 5):
        model = tiny("qwen2")
        torch.set_rng_state(before)
        veneer.attach(model, veneer.LoRA(rank=2, targets="all"), seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        starts.append(snapshot(model))
    assert same(starts[0], starts[1])
    assert not same(starts[0], starts[2])
    A = [layer.adapters["default"].lora_A for _, layer in lora_layers(model)]
    assert distance(A[0].detach(), A[1].detach()) > 0.1  # layers do not share a start
