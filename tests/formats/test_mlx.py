"""Law 5, for mlx-lm's format: mlx-lm itself reads what we write, and we read what it writes.

mlx computes on the processor where there is no GPU of Apple's.
"""

import copy
import importlib
import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from torch import Tensor

import veneer
from support.adapter_states import adapted_with_new_tokens, edit_json, edit_tensors, refusal
from support.closeness import assert_same_logits
from support.random_adapters import distance, ids, logits, shake, targets_named
from support.tiny_models import CONFIGS, tiny
from veneer.formats import mlx as store
from veneer.formats.adapters import read

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"rslora": True, "alpha": 3, "targets": "all"},
    "patterns": {
        "targets": "all",
        "rank_pattern": {r".*\.1\..*": 5},
        "alpha_pattern": {r".*\.0\..*": 2.5},
    },
    "dropout": {"dropout": 0.25},
    "last block": {"layers": "-1", "targets": "mlp"},
    "first block": {"layers": "0", "targets": "attention"},
    "one of each": {"targets": r"re:0.*(q_proj|c_attn|query_key_value)$|1.*(down_proj|c_fc|fc2)$"},
    "dora": {"dora": True, "targets": "all"},
    "dora with patterns": {"dora": True, "alpha_pattern": {r".*\.0\..*": 7}},
    "pissa": {"init": "pissa", "targets": "all"},
}
UNTIED = ("qwen2", "qwen3", "gpt_neox")
# Each has paths or settings of its own in mlx-lm.
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma", "phi", "gpt_neox", "gpt2")


def adapted(architecture: str, case: str = "plain", **more: Any) -> Any:
    options: dict[str, Any] = {"rank": 3, "targets": "attention"} | CASES[case] | more
    model = tiny(architecture)
    if isinstance(options["targets"], str):
        options["targets"] = targets_named(model, options["targets"])
    return shake(veneer.attach(model, veneer.LoRA(**options), seed=3))


@pytest.fixture(autouse=True)
def settings_that_mlx_lm_has_no_others_for(monkeypatch):
    """mlx-lm's GPT-NeoX is four times as wide inside, whatever is expected, and it has each model's
    GELU as most checkpoints of it have theirs."""
    neox, gemma = (copy.deepcopy(CONFIGS[name]) for name in ("gpt_neox", "gemma"))
    neox.intermediate_size, neox.hidden_act = 4 * neox.hidden_size, "gelu_new"
    gemma.hidden_activation = gemma.hidden_act = "gelu"
    monkeypatch.setitem(CONFIGS, "gpt_neox", neox)
    monkeypatch.setitem(CONFIGS, "gemma", gemma)


def theirs(architecture: str) -> Any:
    """Return mlx-lm's own model with the random weights of ours."""
    model = tiny(architecture)
    module = importlib.import_module(f"mlx_lm.models.{architecture}")
    settings = model.config.to_dict()
    rope = settings.get("rope_parameters") or {}
    settings["rope_theta"] = settings["rotary_emb_base"] = rope.get("rope_theta", 10000.0)
    settings["partial_rotary_factor"] = rope.get("partial_rotary_factor", 1.0)
    settings["rotary_pct"] = settings["partial_rotary_factor"]
    settings["n_ctx"] = settings.get("n_positions")
    other = module.Model(module.ModelArgs.from_dict(settings))
    weights = {  # named as in checkpoints: GPT-2's without its first name
        name.removeprefix("transformer."): mx.array(value.numpy())
        for name, value in model.state_dict().items()
    }
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    elif architecture == "gpt_neox":
        weights["embed_out.weight"] = weights.pop("lm_head.weight")
    if hasattr(other, "sanitize"):
        weights = other.sanitize(weights)
    other.load_weights(list(weights.items()))
    return other


def their_logits(model: Any) -> Tensor:
    return torch.from_numpy(np.array(model(mx.array(ids().numpy()))))


def opened(architecture: str, place: Path) -> Tensor:
    """Return the logits of mlx-lm with the adapter in `place`."""
    model = load_adapters(theirs(architecture), str(place))
    model.eval()
    return their_logits(model)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_both_have_the_same_base(architecture):
    assert_same_logits(their_logits(theirs(architecture)), tiny(architecture), logits)


@pytest.mark.parametrize(
    ("architecture", "case"),
    [*product(("llama", "gpt2"), CASES), *product(ARCHITECTURES[1:-1], ("plain", "one of each"))],
)
@pytest.mark.thinned
def test_what_we_write_mlx_lm_reads(architecture, case, tmp_path):
    model = adapted(architecture, case)
    veneer.save(model, tmp_path / "mlx", format="mlx")
    assert_same_logits(opened(architecture, tmp_path / "mlx"), model, logits)
    assert distance(logits(model), logits(tiny(architecture))) > 0.01
    again = veneer.load(tiny(architecture), tmp_path / "mlx")
    assert_same_logits(logits(again), model, logits)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("keys", ["few", "all", "paths"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.thinned
def test_what_mlx_lm_writes_we_read(architecture, keys, dora, tmp_path):
    model = theirs(architecture)
    blocks = {"gpt2": "model.h", "gpt_neox": "model.h"}.get(architecture, "model.layers")
    first = {"gpt2": "attn.c_attn", "gpt_neox": "attention.query_key_value"}.get(
        architecture, "self_attn.q_proj"
    )
    chosen = {"few": [first], "all": None, "paths": [f"{blocks}.1.{first}"]}[keys]
    settings = {"rank": 4, "scale": 1.75, "dropout": 0.0, "keys": chosen}
    model.freeze()
    linear_to_lora_layers(model, 1 if keys == "few" else -1, settings, use_dora=dora)
    mx.random.seed(7)
    ends = (".lora_a", ".lora_b", ".m")
    new = {
        name: value * (1 + 0.1 * mx.random.normal(value.shape))
        if name.endswith(".m")
        else 0.1 * mx.random.normal(value.shape)
        for name, value in tree_flatten(model.trainable_parameters())
        if name.endswith(ends)
    }
    model.load_weights(list(new.items()), strict=False)
    (tmp_path / "theirs").mkdir()
    mx.save_safetensors(str(tmp_path / "theirs" / "adapters.safetensors"), new)
    config = {"fine_tune_type": "dora" if dora else "lora", "num_layers": -1}
    config |= {"lora_parameters": settings, "model": "some/base"}
    (tmp_path / "theirs" / "adapter_config.json").write_text(json.dumps(config))
    model.eval()
    ours = veneer.load(tiny(architecture), tmp_path / "theirs")
    assert_same_logits(their_logits(model), ours, logits)
    assert distance(logits(ours), logits(tiny(architecture))) > 0.01


@pytest.mark.parametrize("targets", ["embedding", "everything", "lm_head"])
@pytest.mark.parametrize("architecture", UNTIED)
def test_embeddings_and_heads_that_are_two_weights(architecture, targets, tmp_path):
    model = adapted(architecture, targets=targets)
    veneer.save(model, tmp_path / "mlx", format="mlx")
    assert_same_logits(opened(architecture, tmp_path / "mlx"), model, logits)
    again = veneer.load(tiny(architecture), tmp_path / "mlx")
    assert_same_logits(logits(again), model, logits)


def test_positions_are_an_embedding_too(tmp_path):
    model = adapted("gpt2", targets=["wpe", "c_fc"])
    veneer.save(model, tmp_path / "mlx", format="mlx")
    assert_same_logits(opened("gpt2", tmp_path / "mlx"), model, logits)


KEYS: dict[str, tuple[int, list[str]]] = {
    "plain": (-1, ["k_proj", "o_proj", "q_proj", "v_proj"]),
    "last block": (1, ["down_proj", "gate_proj", "up_proj"]),
    "first block": (-1, [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"]),
    "one of each": (-1, ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]),
}


@pytest.mark.parametrize("case", KEYS)
def test_keys_name_these_layers_and_no_others(case, tmp_path):
    veneer.save(adapted("llama", case), tmp_path / "mlx", format="mlx")
    config = json.loads((tmp_path / "mlx" / store.CONFIG).read_text())
    count, keys = KEYS[case]
    written = config["lora_parameters"]["keys"]
    assert config["num_layers"] == count
    assert [
        key.rpartition(".")[2] if count == 1 or case == "plain" else key for key in written
    ] == keys


def test_notes_say_what_was_folded(tmp_path):
    assert veneer.save(adapted("llama"), tmp_path / "plain", format="mlx") == []
    model = adapted("llama", "patterns")
    notes = " ".join(veneer.save(model, tmp_path / "patterns", format="mlx"))
    assert "One scaling for all layers" in notes
    assert "One rank for all layers, 5" in notes
    notes = " ".join(veneer.save(adapted("llama", "pissa"), tmp_path / "pissa", format="mlx"))
    assert "rank 6 in place of 3" in notes
    notes = " ".join(veneer.save(adapted("llama", "rslora"), tmp_path / "rs", format="mlx"))
    assert "rsLoRA" in notes


def test_what_a_block_has_is_read_without_a_base(tmp_path):
    veneer.save(adapted("llama"), tmp_path / "llama", format="mlx")
    state = read(tmp_path / "llama")
    assert {key.rpartition(".")[2] for key in state.tensors} == {"lora_A", "lora_B"}
    for architecture, targets in (("qwen2", "embedding"), ("gpt2", "attention")):
        veneer.save(adapted(architecture, targets=targets), tmp_path / architecture, format="mlx")
        with pytest.raises(veneer.AdapterError, match="name the base"):
            read(tmp_path / architecture)


# Refusals.


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "tied embedding": (
        lambda: adapted("llama", targets="embedding"),
        "embed_tokens is embedding and",
    ),
    "tied head": (lambda: adapted("gemma", targets="lm_head"), "lm_head is embedding and head"),
    "dora over an embedding": (
        lambda: adapted("qwen2", "dora", targets="embedding"),
        "magnitudes are of tokens",
    ),
    "prefix": (
        lambda: veneer.attach(tiny("llama"), veneer.Method("prefix")),
        "no place for prefix",
    ),
    "full": (lambda: veneer.attach(tiny("llama"), veneer.Method("full")), "no place for full"),
    "new tokens": (adapted_with_new_tokens, "new tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_written_is_refused(case, tmp_path):
    make, expected = REFUSED[case]
    with pytest.raises(veneer.AdapterError, match=expected):
        veneer.save(make(), tmp_path / "mlx", format="mlx")
    assert not (tmp_path / "mlx").exists()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    veneer.save(adapted("llama"), tmp_path / "mlx", format="mlx")
    return tmp_path / "mlx"


def edit(place: Path, **changes: Any) -> None:
    config = json.loads((place / store.CONFIG).read_text())
    settings = config["lora_parameters"] | changes.pop("lora_parameters", {})
    settings = {name: value for name, value in settings.items() if value != "gone"}
    edit_json(place / store.CONFIG, lora_parameters=settings, **changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"fine_tune_type": "full"}, "fine_tune_type is 'full'"),
        ({"fine_tune_type": "dora"}, "has no magnitude, unlike its settings"),
        ({"fine_tune_type": ["lora"]}, "fine_tune_type is ['lora']"),
        ({"lora_parameters": {"rank": 4}}, "needs (4, 32)"),
        ({"lora_parameters": {"rank": "4"}}, "rank is '4'"),
        ({"lora_parameters": {"rank": 0}}, "rank is 0"),
        ({"lora_parameters": {"rank": "gone"}}, "rank is None"),
        ({"lora_parameters": {"scale": "gone"}}, "scale is None"),
        ({"lora_parameters": {"scale": "much"}}, "scale is 'much'"),
        ({"lora_parameters": {"scale": float("nan")}}, "above 0"),
        ({"lora_parameters": {"alpha": 16}}, "lora_parameters has an alpha"),
        ({"lora_parameters": {"dropout": 2}}, "dropout is 2"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(changes, expected, place):
    edit(place, **changes)
    assert expected in refusal(tiny("llama"), place)


def test_settings_of_another_kind(place):
    for text in ("[]", '{"lora_parameters": 3}', "{}", "{"):
        (place / store.CONFIG).write_text(text)
        refusal(tiny("llama"), place)


Q = "model.layers.0.self_attn.q_proj"
FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "renamed": (lambda t: t.update({f"{Q}.lora_c": t.pop(f"{Q}.lora_a")}), f"{Q}.lora_c"),
    "half": (lambda t: t.pop(f"{Q}.lora_a"), f"{Q}.lora_B stands alone"),
    "another layer": (
        lambda t: t.update({k.replace("q_proj", "qproj"): t.pop(k) for k in list(t) if Q in k}),
        "qproj is no layer of this model; did you mean",
    ),
    "nan": (lambda t: t[f"{Q}.lora_b"].fill_(float("nan")), "not finite"),
    "untransposed": (
        lambda t: t.update({f"{Q}.lora_a": t[f"{Q}.lora_a"].T.contiguous()}),
        "(32, 3)",
    ),
    "experts": (lambda t: t.update({f"{Q}.lora_a": torch.zeros(2, 3, 32)}), "of experts"),
    "a weight": (lambda t: t.update({"model.norm.weight": torch.zeros(32)}), "model.norm.weight"),
    "flat": (lambda t: t.update({f"{Q}.lora_a": torch.zeros(())}), Q),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault, place):
    change, expected = FAULTS[fault]
    edit_tensors(place / store.WEIGHTS, change)
    assert expected in refusal(tiny("llama"), place)


def test_a_damaged_file_is_named(place):
    whole = (place / store.WEIGHTS).read_bytes()
    for damaged in (b"", whole[:40], whole[:-7], b"\x00" * 99):
        (place / store.WEIGHTS).write_bytes(damaged)
        assert str(place) in refusal(tiny("llama"), place)


def test_which_of_the_two_configurations_it_is(tmp_path):
    model = adapted("llama")
    veneer.save(model, tmp_path / "peft", format="peft")
    veneer.save(model, tmp_path / "mlx", format="mlx")
    assert (tmp_path / "peft" / store.CONFIG).exists()
    for name in ("peft", "mlx"):
        again = veneer.load(tiny("llama"), tmp_path / name)
        assert_same_logits(logits(again), model, logits)
