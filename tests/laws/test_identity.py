"""Law 1: a fresh adapter is an identity, to the bit."""

import pytest
import torch

import veneer
from support.closeness import assert_no_further
from support.kinds import CORE, KINDS, each_kind, in_share, is_first_of
from support.plain import Plain
from support.random_adapters import distance, same, shake, snapshot, targets_named
from support.tiny_models import ARCHITECTURES, CAUSAL, tiny
from veneer.adapter.embedding import LoRAEmbedding
from veneer.adapter.layers import lora_layers


def test_every_architecture_has_a_kind():
    assert {kind.architecture for kind in KINDS} >= {*CAUSAL, "vit", "convnext"}
    for bits in (None, 4, 8):
        assert {kind.architecture for kind in KINDS if kind.bits == bits} >= {"llama"}
    assert {kind.architecture for kind in KINDS if kind.bits} >= {*ARCHITECTURES}
    names = {str(kind) for kind in KINDS}
    assert len(names) == len(KINDS)
    assert names >= CORE


def is_first_somehow(kind):
    """Return whether a kind is the first of its name and bits, or of its architecture."""
    return is_first_of(kind, "name", "bits") or is_first_of(kind, "architecture")


@each_kind(lambda kind: kind.identity and is_first_somehow(kind), fast=in_share(0))
def test_logits_are_bit_equal(kind):
    for dtype in (torch.float32, torch.bfloat16):
        expected = kind.says(kind.base(dtype))
        model = kind.fresh(dtype)
        for training in (False, True):
            logits = kind.says(model.train(training))
            assert torch.equal(logits[..., : expected.shape[-1]], expected)


@each_kind(
    lambda kind: (
        kind.lora
        and kind.identity
        and kind.reads_tokens
        and not kind.new_tokens
        and is_first_of(kind, "name")
    ),
    fast=in_share(2),
)
def test_beside_another_adapter(kind):
    model = shake(veneer.attach(kind.base(), veneer.LoRA(rank=2, targets="all"), name="other"))
    alone, reference = kind.says(model), Plain(kind, model, torch.float64)
    kind.attached(model)
    assert torch.equal(kind.says(model), kind.says(kind.base()))
    veneer.use(model, "other")
    assert torch.equal(kind.says(model), alone)
    veneer.use(model, {"default": 1.0, "other": 1.0})
    expected = reference.logits(kind.inputs()).detach()
    assert_no_further(kind.says(model), alone, expected)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_what_starts_at_zero_and_what_does_not(architecture):
    model = tiny(architecture)
    targets, expert_rank = targets_named(model, "everything"), None
    if architecture == "mixtral":
        targets += ["experts.gate_up_proj", "experts.down_proj"]
        expert_rank = 3
    veneer.attach(model, veneer.LoRA(rank=3, targets=targets, expert_rank=expert_rank))
    for path, layer in lora_layers(model):
        adapter = layer.adapters["default"]
        zero, random = adapter.lora_B, adapter.lora_A
        if isinstance(layer, LoRAEmbedding):
            zero, random = random, zero
        assert zero.count_nonzero() == 0, path
        assert random.count_nonzero() == random.numel(), path
        assert {adapter.lora_A.dtype, adapter.lora_B.dtype} == {torch.float32}
        assert (adapter.rank, adapter.scaling) == (3, 2.0)


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
