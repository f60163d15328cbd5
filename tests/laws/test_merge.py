"""Law 4: merged equals unmerged, and going back restores every bit."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import veneer
from support.random_adapters import (
    ids,
    logits,
    same,
    shake,
    snapshot,
    targets_named,
    tokenizer,
    with_new_tokens,
)
from support.tiny_models import ARCHITECTURES, VOCAB, tiny
from veneer.adapter.layers import AdaptedLayer
from veneer.adapter.merge import rounded_away
from veneer.adapter.wrapper import Wrapper
from veneer.models import minigpt

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
KINDS: dict[str, dict[str, Any]] = {
    "one": {},
    "rslora": {"rslora": True, "alpha": 3},
    "patterns": {"rank_pattern": {r".*\.1\..*": 5}, "alpha_pattern": {r".*\.0\..*": 1.5}},
    "mix": {},
    "none": {},
}


def adapted(architecture: str, targets: str, kind: str = "one", **options: Any) -> Any:
    model = tiny(architecture)
    if targets == "embedding" and kind == "patterns":
        options["rank_pattern"] = {targets_named(model, targets)[0]: 5}
    elif kind == "patterns":
        options |= KINDS[kind]
    config = {"rank": 3} | {k: v for k, v in KINDS[kind].items() if kind == "rslora"} | options
    veneer.attach(model, veneer.LoRA(**config, targets=targets_named(model, targets)), name="a")
    if kind == "mix":
        veneer.attach(model, veneer.LoRA(rank=2, targets="all"), name="b")
        veneer.attach(model, veneer.LoRA(rank=1, targets=targets_named(model, targets)), name="c")
        veneer.use(model, {"a": 0.7, "b": -1.3, "c": 2.0})
    if kind == "none":
        veneer.use(model, None)
    return shake(model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", ["attention", "all", "embedding"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merged_equals_unmerged(architecture, targets, kind):
    model = adapted(architecture, targets, kind)
    before, said, used = snapshot(model), logits(model), veneer.in_use(model)
    base = logits(tiny(architecture))
    plain = veneer.merge(model)
    assert type(plain) is type(model)
    assert not any(isinstance(module, Wrapper) for module in plain.modules())
    torch.testing.assert_close(logits(plain), said, **CLOSE)
    assert torch.equal(said, base) == (kind == "none")
    if kind == "none":
        assert torch.equal(logits(plain), base)
    assert same(snapshot(model), before)
    assert torch.equal(logits(model), said)
    assert veneer.in_use(model) == used
    assert rounded_away(model, plain) < 1e-5

    veneer.detach(model)
    assert same(snapshot(model), snapshot(tiny(architecture)))
    assert torch.equal(logits(model), base)
    assert [type(m) for m in model.modules()] == [type(m) for m in tiny(architecture).modules()]


def test_merging_shares_what_no_adapter_changes():
    model = adapted("llama", "attention")
    plain = veneer.merge(model)
    own = dict(model.named_parameters())
    for name, weight in plain.named_parameters():
        if "self_attn" in name:
            assert weight.data_ptr() != model.get_submodule(name[:-7]).original.weight.data_ptr()
        else:
            assert weight is own[name]


def test_changing_the_merged_model_leaves_the_adapted_layers_alone():
    model = adapted("gpt2", "all")
    said, plain = logits(model), veneer.merge(model)
    with torch.no_grad():
        plain.transformer.h[0].attn.c_attn.weight.zero_()
    assert torch.equal(logits(model), said)
    plain.config.tie_word_embeddings = False
    assert model.config.tie_word_embeddings is True


def test_detaching_one_of_several():
    model = tiny("llama")
    base = snapshot(model)
    shake(veneer.attach(model, veneer.LoRA(rank=2, targets="attention"), name="a"))
    said = logits(model)
    veneer.attach(model, veneer.LoRA(rank=2, targets="all"), name="b")
    veneer.detach(model, "b")
    assert not isinstance(model.model.layers[0].mlp.up_proj, AdaptedLayer)
    assert veneer.in_use(model) == {}
    veneer.use(model, "a")
    assert torch.equal(logits(model), said)
    with pytest.raises(veneer.AdapterError, match=r"called '?b'?\."):
        veneer.detach(model, "b")
    veneer.detach(model, "a")
    assert same(snapshot(model), base)


# A merged model from the disk.


def again(model: Any, place: Any) -> nn.Module:
    minigpt.register()
    veneer.write_model(veneer.merge(model), tokenizer(), place)
    if model.config.model_type == "minigpt":
        return minigpt.load(place)[0]
    return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()


def extra_targets(model: Any) -> dict[str, list[str]]:
    """Return targets that touch the tie between embedding and head, or seem to."""
    head = next(p for p, m in model.named_modules() if m is model.get_output_embeddings())
    embeddings = [p for p, m in model.named_modules() if isinstance(m, nn.Embedding)]
    return {
        "all": ["all"],
        "embedding": targets_named(model, "embedding"),
        "everything": targets_named(model, "everything"),
        "head": [head],
        "both": [head, *targets_named(model, "embedding")],
        "embeddings": embeddings,
        "positions": embeddings[1:] or ["all"],
    }


@pytest.mark.parametrize("which", extra_targets(tiny("gpt2")))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merged_models_from_the_disk(architecture, which, tmp_path):
    model = tiny(architecture)
    config = veneer.LoRA(rank=2, targets=extra_targets(model)[which])
    shake(veneer.attach(model, config))
    torch.testing.assert_close(logits(again(model, tmp_path / "m")), logits(model), **CLOSE)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("which", ["embedding", "head", "both"])
def test_tied_or_not_it_is_the_embedding_alone_that_changes(which, tied, tmp_path):
    model = tiny("llama" if tied else "qwen2")
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    config = veneer.LoRA(rank=2, targets=extra_targets(model)[which])
    plain = veneer.merge(shake(veneer.attach(model, config)))
    embedding, head = plain.get_input_embeddings().weight, plain.get_output_embeddings().weight
    base = tiny("llama" if tied else "qwen2")
    assert torch.equal(embedding, base.get_input_embeddings().weight) == (which == "head")
    assert torch.equal(head, base.get_output_embeddings().weight) == (which == "embedding")
    torch.testing.assert_close(logits(again(model, tmp_path / "m")), logits(model), **CLOSE)


def test_a_merged_model_takes_a_new_adapter():
    plain = veneer.merge(adapted("llama", "all"))
    said = logits(plain)
    assert veneer.adapters(plain) == {}
    veneer.attach(plain, veneer.LoRA(rank=2, targets="all"))
    assert torch.equal(logits(plain), said)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_new_words_while_the_base_speaks_alone(architecture):
    model, base = tiny(architecture), tiny(architecture)
    with_new_tokens(model, tokenizer())
    shake(veneer.attach(model, veneer.LoRA(rank=2)))
    veneer.use(model, None)
    assert torch.equal(logits(model)[..., :VOCAB], logits(base))
    assert (logits(model)[..., VOCAB:] == -torch.inf).all()
    veneer.detach(model)
    assert torch.equal(logits(model), logits(base))
    assert same(snapshot(model), snapshot(base))


# What rounding takes.


def test_nothing_is_rounded_away_in_float32():
    model = adapted("llama", "all")
    assert rounded_away(model, veneer.merge(model)) < 1e-6


def test_small_changes_are_rounded_away_in_bf16():
    lost = []
    for size in (1e-6, 1e-2, 1.0):
        model = tiny("llama", dtype=torch.bfloat16)
        shake(veneer.attach(model, veneer.LoRA(rank=2, targets="all")), size=size)
        lost.append(rounded_away(model, veneer.merge(model)))
    assert lost[0] > 0.99
    assert lost[0] > lost[1] > lost[2]
    assert 0 < lost[2] < 0.05


def test_fresh_adapters_lose_nothing():
    model = veneer.attach(tiny("llama"), veneer.LoRA(rank=2))
    assert rounded_away(model, veneer.merge(model)) == 0.0


def test_bf16_sums_are_made_in_float32():
    model = tiny("llama", dtype=torch.bfloat16)
    shake(veneer.attach(model, veneer.LoRA(rank=2, targets="all")))
    plain = veneer.merge(model)
    assert plain.dtype == torch.bfloat16
    layer = model.model.layers[0].mlp.up_proj
    part = layer.adapters["default"]
    wanted = layer.original.weight.double() + part.scaling * (
        part.lora_B.double() @ part.lora_A.double()
    )
    found = plain.model.layers[0].mlp.up_proj.weight
    assert torch.equal(found, wanted.float().to(torch.bfloat16))


def test_random_tokens_reach_all_that_was_merged():
    # If few tokens were shown, a merge of the embedding could be wrong where nobody looks.
    model = adapted("qwen2", "embedding")
    every = torch.arange(VOCAB).view(8, -1)
    torch.testing.assert_close(logits(veneer.merge(model), every), logits(model, every), **CLOSE)
    assert len(ids().unique()) > 10
