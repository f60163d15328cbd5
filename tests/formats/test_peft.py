"""Law 5, for PEFT's format: PEFT itself reads what we write, and we read what it writes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import veneer
from support.adapter_states import (
    adapted_with_new_tokens,
    edit_json,
    edit_tensors,
    refusal,
    without_key,
)
from support.closeness import assert_same_logits
from support.peft_cases import opened, theirs, written
from support.random_adapters import copy_of, logits, shake, targets_named
from support.tiny_models import tiny
from veneer.adapter.layers import lora_layers
from veneer.formats.peft import directory as store

# One architecture for each kind of layer that the format sees.
ARCHITECTURES = ("llama", "qwen2", "gpt2", "minigpt")


WRITTEN: dict[str, dict[str, Any]] = {
    "plain": {"alpha": 6},
    "rslora": {"rslora": True, "targets": "all"},
    "fraction": {"alpha": 2.5, "dropout": 0.1},
    "everything": {"targets": "everything"},
    "embedding": {"targets": "embedding"},
    "last layer": {"layers": "-1", "targets": "all"},
}


@pytest.mark.parametrize("case", WRITTEN)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.thinned
def test_what_we_write_peft_reads(architecture, case, tmp_path):
    model = tiny(architecture)
    options = {"rank": 3} | WRITTEN[case]
    if isinstance(options.get("targets"), str):
        options["targets"] = targets_named(model, options["targets"])
    shake(veneer.attach(model, veneer.LoRA(**options)))
    veneer.save(model, tmp_path / "peft", format="peft")
    assert_same_logits(logits(opened(architecture, tmp_path / "peft")), model, logits)

    again = veneer.load(tiny(architecture), tmp_path / "peft")
    assert torch.equal(logits(again), logits(model))
    for (path, layer), (its_path, other) in zip(
        lora_layers(model), lora_layers(again), strict=True
    ):
        ours, its = layer.adapters["default"], other.adapters["default"]
        assert path == its_path
        assert torch.equal(ours.lora_A, its.lora_A)
        assert torch.equal(ours.lora_B, its.lora_B)
        assert (ours.scaling, ours.dropout) == (its.scaling, its.dropout)


@pytest.mark.parametrize("rslora", [False, True])
def test_patterns_that_overlap_mean_the_same_to_peft(rslora, tmp_path):
    model = tiny("llama")
    config = veneer.LoRA(
        rank=2,
        alpha=5,
        targets="all",
        rslora=rslora,
        # Sorted, as PEFT does on saving, the general ones would come first.
        rank_pattern={"layers.1.self_attn.q_proj": 5, "[qk]_proj": 3},
        alpha_pattern={r"model\.layers\.0\.mlp\.up_proj": 1.5, "(up|down)_proj": 9},
    )
    shake(veneer.attach(model, config))
    veneer.save(model, tmp_path / "peft", format="peft")
    assert_same_logits(logits(opened("llama", tmp_path / "peft")), model, logits)
    assert torch.equal(logits(veneer.load(tiny("llama"), tmp_path / "peft")), logits(model))


def test_each_of_several_adapters_is_written_alone(tmp_path):
    model = tiny("llama")
    for seed, (name, targets) in enumerate({"a": "qv", "b": "mlp", "c": "all"}.items()):
        shake(veneer.attach(model, veneer.LoRA(rank=2, targets=targets), name=name), seed=seed)
    for name in "abc":
        veneer.save(model, tmp_path / name, format="peft", name=name)
        veneer.use(model, name)
        assert_same_logits(logits(opened("llama", tmp_path / name)), model, logits)


def test_numbers_are_whole_where_they_can_be(tmp_path):
    model = veneer.attach(tiny("llama"), veneer.LoRA(rank=4, alpha=8.0, targets="attention"))
    veneer.save(model, tmp_path / "peft", format="peft")
    config = json.loads((tmp_path / "peft" / store.CONFIG).read_text())
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert isinstance(config["lora_alpha"], int)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}


# Refusals.


@pytest.fixture
def place(tmp_path: Path) -> Path:
    options = {"target_modules": ["q_proj", "embed_tokens"]}
    written(theirs("llama", options), tmp_path / "peft")
    return tmp_path / "peft"


NOT_READ: dict[str, Any] = {
    "modules_to_save": ["lm_head"],
    "bias": "some",
    "trainable_token_indices": [1, 2],
    "layer_replication": [[0, 1]],
    "lora_bias": True,
    "exclude_modules": ["q_proj"],
    "target_parameters": ["experts"],
    "alora_invocation_tokens": "say",
    "use_qalora": True,
    "arrow_config": {"top_k": 2},
    "use_bdlora": {"nblocks": 2},
    "kasa_config": {"beta": 1.0},
    "monteclora_config": {"num_samples": 2},
    "velora_config": {"group": 2},
    "megatron_config": {"tensor_model_parallel_size": 2},
    "init_lora_weights": "pissa_niter_4",
    "a_setting_to_come": True,
    "peft_type": "LOHA",
}


def test_dora_without_magnitudes_is_refused(place):
    edit_json(place / store.CONFIG, use_dora=True)
    assert "has no magnitude, unlike its settings" in refusal(tiny("llama"), place)


@pytest.mark.parametrize("name", NOT_READ)
def test_what_is_not_read_is_named(name, place):
    edit_json(place / store.CONFIG, **{name: NOT_READ[name]})
    assert name in refusal(tiny("llama"), place)


def test_all_that_is_not_read_is_named_at_once(place):
    edit_json(place / store.CONFIG, **NOT_READ)
    message = refusal(tiny("llama"), place)
    assert all(name in message for name in NOT_READ)


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 0},
        {"r": "four"},
        {"r": None},
        {"lora_alpha": None},
        {"lora_alpha": "much"},
        {"lora_dropout": 2},
        {"lora_dropout": "some"},
        {"target_modules": None},
        {"target_modules": 3},
        {"target_modules": [1, 2]},
        {"target_modules": "("},
        {"rank_pattern": ["q_proj"]},
        {"rank_pattern": {"q_proj": "two"}},
        {"alpha_pattern": 4},
        {"layers_to_transform": ["a"]},
        {"layers_to_transform": [9]},
    ],
    ids=str,
)
def test_settings_of_the_wrong_kind(changes, place):
    edit_json(place / store.CONFIG, **changes)
    refusal(tiny("llama"), place)


@pytest.mark.parametrize("key", ["r", "lora_alpha", "target_modules", "peft_type"])
def test_settings_that_are_missing(key, place):
    without_key(place / store.CONFIG, key)
    assert key in refusal(tiny("llama"), place)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


def test_a_renamed_key(place):
    edit_tensors(
        place / store.WEIGHTS,
        lambda t: t.update({f"{Q}.lora_A.default.weight": t.pop(f"{Q}.lora_A.weight")}),
    )
    message = refusal(tiny("llama"), place)
    assert "lora_A.default.weight" in message


def test_keys_without_the_prefix(place):
    def strip(tensors):
        for key in list(tensors):
            tensors[key.removeprefix("base_model.model.")] = tensors.pop(key)

    edit_tensors(place / store.WEIGHTS, strip)
    assert "model.layers.0.self_attn.q_proj.lora_A.weight" in refusal(tiny("llama"), place)


def test_missing_half_and_missing_layer(place):
    edit_tensors(
        place / store.WEIGHTS,
        lambda t: (
            t.pop(f"{Q}.lora_B.weight"),
            t.pop(f"{Q.replace('0', '1')}.lora_A.weight"),
            t.pop(f"{Q.replace('0', '1')}.lora_B.weight"),
        ),
    )
    message = refusal(tiny("llama"), place)
    assert "model.layers.0.self_attn.q_proj.lora_A stands alone" in message
    assert "missing for model.layers.0.self_attn.q_proj, model.layers.1.self_attn.q_proj" in message


def test_an_unexpected_layer(place):
    def add(tensors):
        for half in ("lora_A", "lora_B"):
            key = f"{Q}.{half}.weight"
            tensors[key.replace("q_proj", "k_proj")] = tensors[key].clone()
            tensors[key.replace("q_proj", "qq_proj")] = tensors[key].clone()

    edit_tensors(place / store.WEIGHTS, add)
    message = refusal(tiny("llama"), place)
    assert "self_attn.k_proj" in message
    assert "self_attn.qq_proj is no layer of this model; did you mean" in message


def test_shapes_and_values(place):
    def spoil(tensors):
        tensors[f"{Q}.lora_A.weight"] = torch.zeros(4, 7)
        tensors[f"{Q.replace('0', '1')}.lora_B.weight"][0, 0] = float("nan")

    edit_tensors(place / store.WEIGHTS, spoil)
    message = refusal(tiny("llama"), place)
    assert "(4, 7)" in message
    assert "layers.1.self_attn.q_proj.lora_B has values that are not finite" in message


def test_an_embedding_of_another_base(place):
    edit_tensors(
        place / store.WEIGHTS,
        lambda t: next(v for k, v in t.items() if k.endswith("base_layer.weight")).add_(1),
    )
    assert "embed_tokens.weight of its own that differs" in refusal(tiny("llama"), place)


def test_new_tokens_are_not_written(tmp_path):
    with pytest.raises(veneer.AdapterError, match="new tokens"):
        veneer.save(adapted_with_new_tokens(), tmp_path / "peft", format="peft")
    assert not (tmp_path / "peft").exists()


def test_a_name_that_is_taken(place):
    model = veneer.load(tiny("llama"), place)
    before = copy_of(model)
    with pytest.raises(veneer.AdapterError, match="default"):
        veneer.load(model, place)
    assert torch.equal(logits(model), logits(before))
