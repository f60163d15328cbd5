"""Law 4: merged equals unmerged, and going back restores every bit."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import veneer
from support.closeness import assert_no_further
from support.kinds import Kind, each_kind, in_share, is_first
from support.plain import plain_pair
from support.random_adapters import (
    NEW_TOKENS,
    base_tensors,
    copy_of,
    logits,
    same,
    shake,
    snapshot,
    tokenizer,
)
from support.tiny_models import quantized, tiny
from veneer.adapter.layers import AdaptedLayer
from veneer.adapter.merge import rounded_away
from veneer.adapter.new_tokens import extend_tokenizer
from veneer.adapter.wrapper import Wrapper
from veneer.models import minigpt
from veneer.quant.weight import quantized_layers

EPSILON = torch.finfo(torch.float32).eps


@each_kind(lambda kind: kind.merges, fast=in_share(5))
def test_merged_equals_unmerged(kind):
    model = kind.shaken()
    own, ours, in_use = base_tensors(model), kind.says(model), veneer.in_use(model)
    adapter = {name: weight.clone() for name, weight in model.named_parameters()}
    merged = veneer.merge(model)
    assert type(merged) is type(model)
    assert not any(isinstance(module, Wrapper) for module in merged.modules())
    assert not quantized_layers(merged)
    assert "quantization_config" not in merged.config.to_dict()
    assert not hasattr(merged, "veneer_active_adapters")
    plain, exact = plain_pair(kind, model)
    with torch.no_grad():
        assert_no_further(kind.says(merged), ours, exact.logits(kind.inputs()))
        for name, weight in merged.named_parameters(remove_duplicate=False):
            assert_no_further(weight, plain.weights[name], exact.weights[name], name)
    # No change is lost but for the rounding of the weight, of which it is a part.
    assert rounded_away(model, merged) < 100 * EPSILON

    # The merged model has nothing of the adapter's, whatever is done to it.
    base = {id(weight) for weight in kind_weights(model)}
    with torch.no_grad():
        for weight in merged.parameters():
            if id(weight) not in base:
                weight.zero_()
    assert same(base_tensors(model), own)
    assert all(torch.equal(weight, adapter[name]) for name, weight in model.named_parameters())
    assert torch.equal(kind.says(model), ours)
    assert veneer.in_use(model) == in_use


def kind_weights(model: Any) -> list[torch.Tensor]:
    """Return what a merged model may share: the base's own weights."""
    return [*model.parameters(), *model.veneer_active_adapters.replaced.values()]


@each_kind(lambda kind: not kind.replaces_weights, fast=in_share(0))
def test_going_back(kind):
    model, base = kind.shaken(), kind.base()
    expected, own = kind.says(base), base_tensors(base)
    assert not torch.equal(kind.says(model)[..., : expected.shape[-1]], expected)
    veneer.use(model, None)
    alone = kind.says(model)
    assert torch.equal(alone[..., : expected.shape[-1]], expected)
    assert (alone[..., expected.shape[-1] :] == -torch.inf).all()  # no new token is ever likely
    if not kind.is_virtual:
        merged = veneer.merge(model)
        assert torch.equal(kind.says(merged)[..., : expected.shape[-1]], expected)
    veneer.detach(model)
    assert torch.equal(kind.says(model), expected)
    assert same(base_tensors(model), own)
    assert same(snapshot(model), snapshot(base))
    assert repr(model) == repr(base)


def adapted(architecture: str, targets: str, **options: Any) -> Any:
    return shake(veneer.attach(tiny(architecture), veneer.LoRA(rank=3, targets=targets, **options)))


def test_merging_shares_what_no_adapter_changes():
    model = adapted("llama", "attention")
    merged = veneer.merge(model)
    own = dict(model.named_parameters())
    for name, weight in merged.named_parameters():
        if "self_attn" in name:
            assert weight.data_ptr() != model.get_submodule(name[:-7]).original.weight.data_ptr()
        else:
            assert weight is own[name]


def test_the_merged_configuration_is_a_copy():
    model = adapted("gpt2", "all")
    veneer.merge(model).config.tie_word_embeddings = False
    assert model.config.tie_word_embeddings is True


def test_detaching_one_of_several():
    model = tiny("llama")
    base = snapshot(model)
    shake(veneer.attach(model, veneer.LoRA(rank=2, targets="attention"), name="a"))
    alone = logits(model)
    veneer.attach(model, veneer.LoRA(rank=2, targets="all"), name="b")
    veneer.detach(model, "b")
    assert not isinstance(model.model.layers[0].mlp.up_proj, AdaptedLayer)
    assert veneer.in_use(model) == {}
    veneer.use(model, "a")
    assert torch.equal(logits(model), alone)
    with pytest.raises(veneer.AdapterError, match=r"called '?b'?\."):
        veneer.detach(model, "b")
    veneer.detach(model, "a")
    assert same(snapshot(model), base)


# A merged model from the disk.


@each_kind(lambda kind: kind.merges and is_first(kind), fast=in_share(1))
def test_merged_models_from_the_disk(kind, tmp_path):
    merged = veneer.merge(kind.shaken())
    again = read_again(kind, merged, tmp_path / "m")
    assert torch.equal(kind.says(again), kind.says(merged))


def read_again(kind: Kind, merged: Any, place: Any) -> nn.Module:
    minigpt.register()
    own_tokenizer = tokenizer()
    if kind.new_tokens:
        extend_tokenizer(own_tokenizer, NEW_TOKENS)
    veneer.write_model(merged, own_tokenizer, place)
    if merged.config.model_type == "minigpt":
        return minigpt.load(place)[0]
    return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("which", ["embedding", "head", "both"])
def test_tied_or_not_it_is_the_embedding_alone_that_changes(which, tied):
    base = tiny("llama" if tied else "qwen2")
    assert (base.get_input_embeddings().weight is base.get_output_embeddings().weight) == tied
    targets = {"embedding": ["embed_tokens"], "head": ["lm_head"]}
    targets["both"] = [*targets["embedding"], *targets["head"]]
    config = veneer.LoRA(rank=2, targets=targets[which])
    merged = veneer.merge(shake(veneer.attach(copy_of(base), config)))
    embedding, head = merged.get_input_embeddings().weight, merged.get_output_embeddings().weight
    assert torch.equal(embedding, base.get_input_embeddings().weight) == (which == "head")
    assert torch.equal(head, base.get_output_embeddings().weight) == (which == "embedding")


def test_a_merged_model_takes_a_new_adapter():
    merged = veneer.merge(adapted("llama", "all"))
    expected = logits(merged)
    assert veneer.adapters(merged) == {}
    veneer.attach(merged, veneer.LoRA(rank=2, targets="all"))
    assert torch.equal(logits(merged), expected)


# What rounding takes.


@pytest.mark.parametrize("make", [tiny, quantized])
def test_small_changes_are_rounded_away_in_bf16(make):
    lost = []
    for size in (1e-6, 1e-2, 1.0):
        model = make("llama", dtype=torch.bfloat16)
        shake(veneer.attach(model, veneer.LoRA(rank=2, targets="all"), seed=1), size=size)
        lost.append(rounded_away(model, veneer.merge(model)))
    assert lost[0] > (0.99 if make is tiny else 0.9)
    assert lost[0] > lost[1] > lost[2]
    assert lost[1] > 0.1
    assert 0 < lost[2] < 0.05


def test_fresh_adapters_lose_nothing():
    model = veneer.attach(tiny("llama"), veneer.LoRA(rank=2))
    assert rounded_away(model, veneer.merge(model)) == 0.0


def test_bf16_sums_are_made_in_float32():
    model = tiny("llama", dtype=torch.bfloat16)
    shake(veneer.attach(model, veneer.LoRA(rank=2, targets="all")))
    merged = veneer.merge(model)
    assert merged.dtype == torch.bfloat16
    layer = model.model.layers[0].mlp.up_proj
    adapter = layer.adapters["default"]
    expected = layer.original.weight.double() + adapter.scaling * (
        adapter.lora_B.double() @ adapter.lora_A.double()
    )
    weight = merged.model.layers[0].mlp.up_proj.weight
    assert torch.equal(weight, expected.float().to(torch.bfloat16))


def test_a_person_s_own_modules_merge_too():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    veneer.attach(model, veneer.LoRA(rank=2, targets="all"), seed=0)
    shake(model)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        merged = veneer.merge(model)
        exact = copy_of(model).double()(x.double())
        ours, plain = model(x), merged(x)
    assert [type(layer) for layer in merged] == [nn.Linear, nn.Tanh, nn.Linear]
    assert not torch.equal(merged[0].weight, model[0].original.weight)
    assert_no_further(plain, ours, exact)
