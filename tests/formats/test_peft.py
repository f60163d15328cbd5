"""Law 5, for PEFT's format: PEFT itself reads what we write, and we read what it writes."""

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import veneer
from support.random_adapters import copy_of, distance, logits, same, shake, snapshot, targets_named
from support.tiny_models import ARCHITECTURES, tiny
from veneer.adapter.layers import lora_layers
from veneer.formats.peft import directory as store

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def theirs(architecture: str, place: Path, **options: Any) -> Tensor:
    """Let PEFT write an adapter of random values to `place`; return its own logits."""
    torch.manual_seed(7)
    options = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 12} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny(architecture), peft.LoraConfig(**options)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.1)
    model.save_pretrained(place)
    return logits(model)


def opened(architecture: str, place: Path) -> Tensor:
    """Return the logits of PEFT over a fresh base, with the adapter in `place`."""
    with warnings.catch_warnings():
        # All that PEFT says of keys that it does not find.
        warnings.filterwarnings("error", message="(?i).*(missing|unexpected|not found)")
        model = peft.PeftModel.from_pretrained(tiny(architecture), place)
    return logits(model.eval())


READ: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "dropout": ("llama", {"target_modules": ["q_proj"], "lora_dropout": 0.3}),
    "rslora": ("mistral", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
    "patterns": (
        "qwen2",
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"v_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 3, "up_proj": 5.5},
        },
    ),
    "overlapping patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj"],
            "use_rslora": True,
            # Sorted, since PEFT saves them so, and the first that matches wins.
            "rank_pattern": {"model.layers.0.self_attn.q_proj": 6, "q_proj": 2},
            "alpha_pattern": {".*v_proj": 5, "layers.1.self_attn.v_proj": 30},
        },
    ),
    "embedding": ("qwen2", {"target_modules": ["q_proj", "embed_tokens"]}),
    "embedding, tied": ("llama", {"target_modules": ["embed_tokens", "v_proj"]}),
    "embedding alone": ("gpt_neox", {"target_modules": ["embed_in"]}),
    "head": ("qwen2", {"target_modules": ["q_proj", "lm_head"]}),
    "head, tied": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "positions": ("gpt2", {"target_modules": ["wpe", "c_fc"], "fan_in_fan_out": True}),
    "layers": ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}),
    "one layer": ("gpt2", {"target_modules": ["c_fc"], "layers_to_transform": 0}),
    "regex": ("llama", {"target_modules": r".*\.1\.(self_attn\.[qk]_proj|mlp\.gate_proj)"}),
    "regex of ends": ("llama", {"target_modules": r".*q_proj|.*o_proj"}),
    "all-linear": ("qwen3", {"target_modules": "all-linear"}),
    "all-linear, Conv1D": ("gpt2", {"target_modules": "all-linear"}),
    "all-linear, falcon": ("falcon", {"target_modules": "all-linear"}),
    "minigpt": ("minigpt", {"target_modules": ["q_proj", "linear1", "embed_tokens"]}),
    "gaussian": ("phi", {"target_modules": ["dense"], "init_lora_weights": "gaussian"}),
}


@pytest.mark.parametrize("case", READ)
def test_what_peft_writes_we_read(case, tmp_path):
    architecture, options = READ[case]
    wanted = theirs(architecture, tmp_path / "peft", **options)
    model = tiny(architecture)
    base = logits(model)
    veneer.load(model, tmp_path / "peft")
    torch.testing.assert_close(logits(model), wanted, **CLOSE)
    assert distance(wanted, base) > 0.01
    veneer.save(model, tmp_path / "back", format="peft")
    torch.testing.assert_close(opened(architecture, tmp_path / "back"), wanted, **CLOSE)
    veneer.save(model, tmp_path / "native")
    native = veneer.load(tiny(architecture), tmp_path / "native")
    assert torch.equal(logits(native), logits(model))


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
def test_what_we_write_peft_reads(architecture, case, tmp_path):
    model = tiny(architecture)
    options = {"rank": 3} | WRITTEN[case]
    if isinstance(options.get("targets"), str):
        options["targets"] = targets_named(model, options["targets"])
    shake(veneer.attach(model, veneer.LoRA(**options)))
    veneer.save(model, tmp_path / "peft", format="peft")
    torch.testing.assert_close(opened(architecture, tmp_path / "peft"), logits(model), **CLOSE)

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
    torch.testing.assert_close(opened("llama", tmp_path / "peft"), logits(model), **CLOSE)
    assert torch.equal(logits(veneer.load(tiny("llama"), tmp_path / "peft")), logits(model))


def test_each_of_several_adapters_is_written_alone(tmp_path):
    model = tiny("llama")
    for seed, (name, targets) in enumerate({"a": "qv", "b": "mlp", "c": "all"}.items()):
        shake(veneer.attach(model, veneer.LoRA(rank=2, targets=targets), name=name), seed=seed)
    for name in "abc":
        veneer.save(model, tmp_path / name, format="peft", name=name)
        veneer.use(model, name)
        torch.testing.assert_close(opened("llama", tmp_path / name), logits(model), **CLOSE)


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
    theirs("llama", tmp_path / "peft", target_modules=["q_proj", "embed_tokens"])
    return tmp_path / "peft"


def refusal(place: Path) -> str:
    """Return why the adapter is refused, having seen that the model stayed as it was."""
    model = tiny("llama")
    before, structure = snapshot(model), repr(model)
    trains = [weight.requires_grad for weight in model.parameters()]
    with pytest.raises(veneer.AdapterError) as caught:
        veneer.load(model, place)
    assert same(before, snapshot(model))
    assert repr(model) == structure
    assert trains == [weight.requires_grad for weight in model.parameters()]
    assert veneer.adapters(model) == {}
    return str(caught.value)


NOT_READ: dict[str, Any] = {
    "modules_to_save": ["lm_head"],
    "bias": "some",
    "trainable_token_indices": [1, 2],
    "layer_replication": [[0, 1]],
    "lora_bias": True,
    "exclude_modules": ["q_proj"],
    "target_parameters": ["experts"],
    "alora_invocation_tokens": [3],
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
    edit(place, {"use_dora": True})
    assert "has no magnitude, unlike its settings" in refusal(place)


@pytest.mark.parametrize("name", NOT_READ)
def test_what_is_not_read_is_named(name, place):
    edit(place, {name: NOT_READ[name]})
    assert name in refusal(place)


def test_all_that_is_not_read_is_named_at_once(place):
    edit(place, NOT_READ)
    said = refusal(place)
    assert all(name in said for name in NOT_READ)


def edit(place: Path, changes: dict[str, Any]) -> None:
    config = json.loads((place / store.CONFIG).read_text())
    (place / store.CONFIG).write_text(json.dumps(config | changes))


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
    edit(place, changes)
    refusal(place)


@pytest.mark.parametrize("key", ["r", "lora_alpha", "target_modules", "peft_type"])
def test_settings_that_are_missing(key, place):
    config = json.loads((place / store.CONFIG).read_text())
    del config[key]
    (place / store.CONFIG).write_text(json.dumps(config))
    assert key in refusal(place)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


def rewrite(place: Path, change: Any) -> None:
    tensors = load_file(place / store.WEIGHTS)
    change(tensors)
    save_file(tensors, place / store.WEIGHTS)


def test_a_renamed_key(place):
    rewrite(place, lambda t: t.update({f"{Q}.lora_A.default.weight": t.pop(f"{Q}.lora_A.weight")}))
    said = refusal(place)
    assert "lora_A.default.weight" in said


def test_keys_without_the_prefix(place):
    def strip(tensors):
        for key in list(tensors):
            tensors[key.removeprefix("base_model.model.")] = tensors.pop(key)

    rewrite(place, strip)
    assert "model.layers.0.self_attn.q_proj.lora_A.weight" in refusal(place)


def test_missing_half_and_missing_layer(place):
    rewrite(
        place,
        lambda t: (
            t.pop(f"{Q}.lora_B.weight"),
            t.pop(f"{Q.replace('0', '1')}.lora_A.weight"),
            t.pop(f"{Q.replace('0', '1')}.lora_B.weight"),
        ),
    )
    said = refusal(place)
    assert "model.layers.0.self_attn.q_proj.lora_A stands alone" in said
    assert "missing for model.layers.0.self_attn.q_proj, model.layers.1.self_attn.q_proj" in said


def test_an_unexpected_layer(place):
    def add(tensors):
        for half in ("lora_A", "lora_B"):
            key = f"{Q}.{half}.weight"
            tensors[key.replace("q_proj", "k_proj")] = tensors[key].clone()
            tensors[key.replace("q_proj", "qq_proj")] = tensors[key].clone()

    rewrite(place, add)
    said = refusal(place)
    assert "self_attn.k_proj" in said
    assert "self_attn.qq_proj is no layer of this model; did you mean" in said


def test_shapes_and_values(place):
    def spoil(tensors):
        tensors[f"{Q}.lora_A.weight"] = torch.zeros(4, 7)
        tensors[f"{Q.replace('0', '1')}.lora_B.weight"][0, 0] = float("nan")

    rewrite(place, spoil)
    said = refusal(place)
    assert "(4, 7)" in said
    assert "layers.1.self_attn.q_proj.lora_B has values that are not finite" in said


def test_an_embedding_of_another_base(place):
    rewrite(
        place, lambda t: next(v for k, v in t.items() if k.endswith("base_layer.weight")).add_(1)
    )
    assert "embed_tokens.weight of its own that differs" in refusal(place)


def test_new_words_are_not_written(tmp_path):
    from support.random_adapters import tokenizer, with_new_tokens

    model = tiny("llama")
    with_new_tokens(model, tokenizer())
    veneer.attach(model, veneer.LoRA(rank=2))
    with pytest.raises(veneer.AdapterError, match="new tokens"):
        veneer.save(model, tmp_path / "peft", format="peft")
    assert not (tmp_path / "peft").exists()


def test_a_name_that_is_taken(place):
    model = veneer.load(tiny("llama"), place)
    before = copy_of(model)
    with pytest.raises(veneer.AdapterError, match="default"):
        veneer.load(model, place)
    assert torch.equal(logits(model), logits(before))
