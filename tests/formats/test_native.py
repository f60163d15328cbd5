"""Law 5, for our own format: what is saved, loads, and nothing else does."""

from pathlib import Path
from typing import Any

import pytest
import torch

import veneer
from support.adapter_states import edit_json, edit_tensors, refusal, same_state, without_key
from support.closeness import assert_same_logits
from support.random_adapters import logits, same, shake, snapshot, targets_named, tokenizer
from support.tiny_models import VOCAB, tiny
from veneer.checksums import SUMS
from veneer.formats.adapters import read
from veneer.formats.capture import capture

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"rslora": True, "alpha": 3, "targets": "all"},
    "patterns": {
        "targets": "all",
        "rank_pattern": {r"layers\.1\..*|h\.1\..*": 5},
        "alpha_pattern": {r".*\.0\..*": 2.5},
    },
    "dropout": {"dropout": 0.25},
    "layers": {"layers": "-1", "targets": "mlp"},
    "embedding": {"targets": "embedding"},
    "everything": {"targets": "everything", "dropout": 0.5},
}

CONFIG, WEIGHTS = "lora_config.json", "lora_weights.pt"
# One architecture for each kind of layer that the format sees.
ARCHITECTURES = ("llama", "qwen2", "gpt2", "minigpt")


def adapted(architecture: str, case: str, *, seed: int = 1):
    model = tiny(architecture)
    options: dict[str, Any] = {"rank": 3, "targets": "attention"} | CASES[case]
    options["targets"] = targets_named(model, options["targets"])
    return shake(veneer.attach(model, veneer.LoRA(**options)), seed=seed)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.thinned
def test_round_trip(architecture, case, tmp_path):
    model = adapted(architecture, case)
    veneer.save(model, tmp_path / "a")
    assert same_state(read(tmp_path / "a"), capture(model))
    again = veneer.load(tiny(architecture), tmp_path / "a")
    assert torch.equal(logits(again), logits(model))
    assert not any(weight.requires_grad for weight in again.parameters())
    assert same_state(capture(again), capture(model))
    veneer.save(again, tmp_path / "b")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    files = {file.name for file in (tmp_path / "a").iterdir()}
    assert files == {CONFIG, WEIGHTS, SUMS}


def test_layers_beside_stacks_of_the_same_name(tmp_path):
    model = tiny("qwen2_moe")
    layers = "re:.*(_proj|shared_expert_gate)"  # a pattern names no stack
    shake(veneer.attach(model, veneer.LoRA(rank=2, targets=layers)))
    veneer.save(model, tmp_path / "a")
    assert torch.equal(
        logits(veneer.load(tiny("qwen2_moe"), tmp_path / "a")), expected := logits(model)
    )
    # Earlier versions shortened the names of layers to such as a stack has too.
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    edit_json(tmp_path / "a" / CONFIG, targets=[*names, "shared_expert_gate"])
    assert torch.equal(logits(veneer.load(tiny("qwen2_moe"), tmp_path / "a")), expected)


def test_a_bf16_base_keeps_float32_adapters(tmp_path):
    model = tiny("llama", dtype=torch.bfloat16)
    shake(veneer.attach(model, veneer.LoRA(rank=2)))
    veneer.save(model, tmp_path / "a")
    assert {tensor.dtype for tensor in read(tmp_path / "a").tensors.values()} == {torch.float32}
    again = veneer.load(tiny("llama", dtype=torch.bfloat16), tmp_path / "a")
    assert torch.equal(logits(again), logits(model))
    # The fingerprint compares samples in bfloat16, so that the wider base is the same one.
    veneer.load(tiny("llama"), tmp_path / "a")


def test_several_adapters_over_one_base(tmp_path):
    model = tiny("qwen2")
    own = {}
    for seed, (name, targets) in enumerate({"a": "qv", "b": "mlp", "c": "all"}.items()):
        shake(veneer.attach(model, veneer.LoRA(rank=2, targets=targets), name=name), seed=seed)
    for name in "abc":
        veneer.use(model, name)
        own[name] = logits(model)
        veneer.save(model, tmp_path / name, name=name)
    assert all(not torch.equal(own["a"], own[name]) for name in "bc")
    again = tiny("qwen2")
    for name in "cab":
        veneer.load(again, tmp_path / name, name=name)
    for name in "abc":
        veneer.use(again, name)
        assert torch.equal(logits(again), own[name])
    veneer.use(model, {"a": 0.5, "b": -1.0, "c": 1.0})
    veneer.use(again, {"a": 0.5, "b": -1.0, "c": 1.0})
    assert_same_logits(logits(again), model, logits)


def test_which_adapter_is_saved(tmp_path):
    model = tiny("llama")
    for name in ("a", "b"):
        veneer.attach(model, veneer.LoRA(rank=2), name=name)
    veneer.use(model, {"a": 1.0, "b": 1.0})
    with pytest.raises(veneer.AdapterError, match="2 adapters are in use"):
        veneer.save(model, tmp_path / "x")
    with pytest.raises(veneer.AdapterError, match="'aa'; did you mean 'a'"):
        veneer.save(model, tmp_path / "x", name="aa")
    veneer.use(model, None)
    with pytest.raises(veneer.AdapterError, match="0 adapters are in use"):
        veneer.save(model, tmp_path / "x")
    with pytest.raises(veneer.AdapterError, match="'onnx'"):
        veneer.save(model, tmp_path / "x", name="a", format="onnx")  # type: ignore[arg-type]
    assert not (tmp_path / "x").exists()


# Refusals.


@pytest.fixture
def place(tmp_path: Path) -> Path:
    veneer.save(adapted("llama", "everything"), tmp_path / "a", tokenizer=tokenizer())
    return tmp_path / "a"


@pytest.mark.parametrize("other", ["weights", "settings", "tokenizer"])
def test_a_foreign_base_of_the_same_shape(other, place):
    model, tokens = tiny("llama", seed=1 if other == "weights" else 0), tokenizer()
    if other == "settings":
        model.config.num_attention_heads = 2
    if other == "tokenizer":
        tokens = tokenizer(VOCAB - 1)
    before = snapshot(model)
    with pytest.raises(veneer.AdapterError, match=r"another base.*force"):
        veneer.load(model, place, tokenizer=tokens)
    assert same(before, snapshot(model))
    veneer.load(model, place, tokenizer=tokens, force=True)
    assert list(veneer.adapters(model)) == ["default"]


def test_force_does_not_excuse_what_does_not_fit(place):
    with pytest.raises(veneer.AdapterError, match="is no layer"):
        veneer.load(tiny("gpt2"), place, force=True)


def test_a_base_of_another_width_is_named_first(place):
    config = tiny("llama").config
    config.hidden_size = 64
    with pytest.raises(veneer.AdapterError, match="model: it was made for a base of width 32, and"):
        veneer.load(type(tiny("llama"))(config), place)


def test_a_base_of_another_architecture(place):
    message = refusal(tiny("gpt_neox"), place)
    assert "another base" in message
    assert "model.layers.0.self_attn.q_proj is no layer" in message


Q, R = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"

FAULTS: dict[str, tuple[Any, str]] = {
    "renamed": (lambda t: t.update({f"{Q}.lora_C": t.pop(f"{Q}.lora_A")}), f"{Q}.lora_C"),
    "renamed layer": (
        lambda t: t.update({k.replace("q_proj", "qproj"): t.pop(k) for k in list(t) if Q in k}),
        "qproj is no layer of this model; did you mean",
    ),
    "half": (lambda t: t.pop(f"{Q}.lora_A"), f"{Q}.lora_B stands alone"),
    "missing": (lambda t: [t.pop(k) for k in list(t) if k.startswith(R)], f"missing for {R}"),
    "unexpected": (
        lambda t: t.update(
            {"lm_head.lora_A": torch.zeros(3, 32), "lm_head.lora_B": torch.zeros(96, 3)}
        ),
        "lm_head has weights, but is not among the targets",
    ),
    "stranger": (lambda t: t.update(extra=torch.zeros(1)), "extra stands alone"),
    "misshapen": (lambda t: t.update({f"{Q}.lora_A": torch.zeros(3, 31)}), "(3, 31)"),
    "flat": (lambda t: t.update({f"{Q}.lora_A": torch.zeros(())}), f"{Q} has A ()"),
    "transposed": (lambda t: t.update({f"{Q}.lora_B": t[f"{Q}.lora_B"].T}), "(3, 32)"),
    "nan": (lambda t: t[f"{R}.lora_B"].fill_(float("nan")), f"{R}.lora_B has values that are not"),
    "infinite": (lambda t: t[f"{R}.lora_A"][0, 0].fill_(-torch.inf), f"{R}.lora_A has values"),
    "other kind": (
        lambda t: t.update(
            {k.replace("lora_", "lora_embedding_"): t.pop(k) for k in list(t) if Q in k}
        ),
        f"{Q} is a Linear, of the other kind",
    ),
    "complex": (lambda t: t.update({f"{Q}.lora_A": t[f"{Q}.lora_A"] * 1j}), f"{Q}.lora_A"),
    "whole numbers": (lambda t: t.update({f"{Q}.lora_A": t[f"{Q}.lora_A"].long()}), f"{Q}.lora_A"),
    "sparse": (lambda t: t.update({f"{Q}.lora_A": t[f"{Q}.lora_A"].to_sparse()}), f"{Q}.lora_A"),
    "without values": (
        lambda t: t.update({f"{Q}.lora_A": t[f"{Q}.lora_A"].to("meta")}),
        f"{Q}.lora_A",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault, place):
    change, expected = FAULTS[fault]
    edit_tensors(place / WEIGHTS, change)
    assert expected in refusal(tiny("llama"), place)


def test_all_faults_are_named_at_once(place):
    together = ["half", "nan", "stranger"]
    for fault in together:
        edit_tensors(place / WEIGHTS, FAULTS[fault][0])
    model = tiny("llama", seed=1)
    with pytest.raises(veneer.AdapterError) as caught:
        veneer.load(model, place)
    message = str(caught.value)
    assert all(FAULTS[fault][1] in message for fault in together)
    assert "another base" in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"format": 2}, "format is 2"),
        ({"format": None}, "format is None"),
        ({"alhpa": 4}, "'alhpa' is unknown; did you mean 'alpha'"),
        ({"rank": 0, "dropout": 1}, "dropout is 1"),
        ({"rank": "3"}, "rank is '3'"),
        ({"rank": 4}, "needs (4, 32)"),
        ({"alpha": "much"}, "alpha is 'much'"),
        ({"dropout": "some"}, "dropout"),
        ({"init": ["kaiming"]}, "init is"),
        ({"rslora": "no"}, "rslora"),
        ({"targets": 5}, "targets is (5,)"),
        ({"targets": [5]}, "targets"),
        ({"targets": []}, "targets is empty"),
        ({"targets": ["q_prj"]}, "did you mean 'q_proj'"),
        ({"layers": 1}, "layers is 1"),
        ({"layers": "9"}, "blocks 0 to 1"),
        ({"rank_pattern": 3}, "rank_pattern is 3"),
        ({"rank_pattern": {"q_proj": 3.5}}, "3.5"),
        ({"rank_pattern": {"(": 3}}, "no regular expression"),
        ({"alpha_pattern": {"nothing": 3}}, "'nothing' matches none"),
        ({"base": None}, "base"),
        ({"base": {"name": "x"}}, "base"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(changes, expected, place):
    edit_json(place / CONFIG, **changes)
    message = refusal(tiny("llama"), place)
    assert expected in message
    assert str(place) in message or "does not fit the model" in message


@pytest.mark.parametrize("key", ["rank", "alpha", "targets", "base", "rslora", "new_words"])
def test_a_setting_that_is_missing(key, place):
    without_key(place / CONFIG, key)
    assert f"{key!r} is missing" in refusal(tiny("llama"), place)


def test_places_without_an_adapter(tmp_path):
    assert "no adapter directory" in refusal(tiny("llama"), tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no adapter" in refusal(tiny("llama"), tmp_path / "empty")
