"""Law 5, for microsoft/LoRA's format: loralib reads what we write, and the other way round."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loralib
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import veneer
from support.adapter_states import adapted_with_new_tokens, edit_json, edit_tensors, refusal
from support.closeness import assert_same_logits
from support.random_adapters import distance, logits, same, shake, targets_named
from support.tiny_models import tiny
from veneer.formats import loralib as store
from veneer.formats.adapters import read
from veneer.formats.convert import convert

QKV = (True, False, True)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"rslora": True, "alpha": 3, "targets": "all"},
    "patterns": {
        "targets": "all",
        "rank_pattern": {r".*\.1\..*": 5},
        "alpha_pattern": {r".*\.0\..*": 2.5},
    },
    "fraction": {"alpha": 2.5},
    "dropout": {"dropout": 0.25},
    "last block": {"layers": "-1", "targets": "mlp"},
    "embedding": {"targets": "embedding"},
    "everything": {"targets": "everything"},
    "pissa": {"init": "pissa", "targets": "all"},
}
# One architecture for each kind of layer that the format sees.
ARCHITECTURES = ("llama", "qwen2", "gpt2", "minigpt")


def adapted(architecture: str, case: str = "plain", **more: Any) -> Any:
    options: dict[str, Any] = {"rank": 3, "targets": "attention"} | CASES[case] | more
    model = tiny(architecture)
    options["targets"] = targets_named(model, options["targets"])
    return shake(veneer.attach(model, veneer.LoRA(**options), seed=3))


def replaced(architecture: str, layers: dict[str, dict[str, Any]]) -> Any:
    """Return a model with loralib's layers in these places, over the weights that stood there."""
    model = tiny(architecture)
    for path, layer in layers.items():
        old = model.get_submodule(path)
        settings = {"r": layer["r"], "lora_alpha": layer["lora_alpha"], "merge_weights": False}
        if isinstance(old, nn.Embedding):
            new: Any = loralib.Embedding(*old.weight.shape, padding_idx=old.padding_idx, **settings)
        else:
            fan = isinstance(old, Conv1D)
            in_, out = old.weight.shape if fan else old.weight.shape[::-1]
            if layer["layer"] == "MergedLinear":
                kind, settings["enable_lora"] = loralib.MergedLinear, list(layer["enable_lora"])
            else:
                kind = loralib.Linear
            settings |= {"fan_in_fan_out": fan, "bias": old.bias is not None}
            new = kind(in_, out, **settings)
            if old.bias is not None:
                new.bias = old.bias
        new.weight.data = old.weight.data
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, new)
    return model.eval()


def random_factors(model: Any) -> None:
    generator = torch.Generator().manual_seed(7)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data.copy_(0.1 * torch.randn(weight.shape, generator=generator))


def opened(architecture: str, place: Path) -> Tensor:
    """Return the logits of loralib's layers with the state dictionary in `place`."""
    config = json.loads((place / store.CONFIG).read_text())
    model = replaced(architecture, config["layers"])
    weights = torch.load(place / store.WEIGHTS, weights_only=True)
    keys = model.load_state_dict(weights, strict=False)
    assert not keys.unexpected_keys
    assert not [key for key in keys.missing_keys if "lora_" in key]
    return logits(model)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.thinned
def test_what_we_write_loralib_reads(architecture, case, tmp_path):
    model = adapted(architecture, case)
    veneer.save(model, tmp_path / "loralib", format="loralib")
    assert_same_logits(opened(architecture, tmp_path / "loralib"), model, logits)
    assert distance(logits(model), logits(tiny(architecture))) > 0.01
    again = veneer.load(tiny(architecture), tmp_path / "loralib")
    assert_same_logits(logits(again), model, logits)


def gpt2_layers(enabled: tuple[bool, ...], r: int = 2) -> dict[str, dict[str, Any]]:
    """Return the layers of microsoft/LoRA's GPT-2 example: c_attn alone."""
    layer = {"layer": "MergedLinear", "r": r, "lora_alpha": 5, "enable_lora": enabled}
    return {f"transformer.h.{block}.attn.c_attn": layer for block in range(2)}


@pytest.mark.parametrize("r", [1, 2, 3])
@pytest.mark.parametrize(
    "enabled", [QKV, (True, True, True), (True, False, False), (False, True, False), (True, True)]
)
@pytest.mark.thinned
def test_fused_layers_with_blocks_both_ways(enabled, r, tmp_path):
    theirs = replaced("gpt2", gpt2_layers(enabled, r))
    random_factors(theirs)
    torch.save(loralib.lora_state_dict(theirs), tmp_path / "lora.pt")
    # Where all parts have factors, B is as high as the layer, which tells it.
    options = {} if all(enabled) else {"enable_lora": enabled}
    ours = veneer.load(tiny("gpt2"), tmp_path / "lora.pt", alpha=5, **options)
    assert_same_logits(logits(theirs), ours, logits)
    assert distance(logits(ours), logits(tiny("gpt2"))) > 0.01

    done = convert(
        tmp_path / "lora.pt",
        tmp_path / "back",
        to="loralib",
        base=tiny("gpt2"),
        alpha=5,
        enable_lora=enabled,
    )
    assert "MergedLinear" in " ".join(done.notes)
    back = torch.load(tmp_path / "back" / store.WEIGHTS, weights_only=True)
    assert same(back, loralib.lora_state_dict(theirs))
    layers = json.loads((tmp_path / "back" / store.CONFIG).read_text())["layers"]
    assert layers == {
        k: v | {"enable_lora": list(enabled)} for k, v in gpt2_layers(enabled, r).items()
    }
    assert_same_logits(opened("gpt2", tmp_path / "back"), ours, logits)
    again = veneer.load(tiny("gpt2"), tmp_path / "back")
    assert_same_logits(logits(again), ours, logits)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_loralib_writes_we_read(architecture, tmp_path):
    model = tiny(architecture)
    layers = {
        path: {"layer": "Linear", "r": 2 + number % 3, "lora_alpha": 6}
        for number, (path, module) in enumerate(model.named_modules())
        if isinstance(module, nn.Linear | Conv1D | nn.Embedding) and path != "lm_head"
    }
    theirs = replaced(architecture, layers)
    random_factors(theirs)
    torch.save(loralib.lora_state_dict(theirs), tmp_path / "lora.pt")
    ours = veneer.load(tiny(architecture), tmp_path / "lora.pt", alpha=6)
    assert_same_logits(logits(theirs), ours, logits)


def test_one_alpha_for_all_and_what_is_folded(tmp_path):
    assert veneer.save(adapted("llama"), tmp_path / "plain", format="loralib") == []
    notes = " ".join(veneer.save(adapted("llama", "patterns"), tmp_path / "p", format="loralib"))
    assert "One alpha for all layers" in notes
    layers = json.loads((tmp_path / "p" / store.CONFIG).read_text())["layers"]
    assert len({layer["lora_alpha"] for layer in layers.values()}) == 1
    assert {layer["r"] for layer in layers.values()} == {3, 5}
    notes = " ".join(veneer.save(adapted("llama", "pissa"), tmp_path / "pissa", format="loralib"))
    assert "rank 6 in place of 3" in notes


# Refusals.


def test_what_the_file_does_not_say_must_be_given(tmp_path):
    layers = gpt2_layers(QKV)
    theirs = replaced("gpt2", layers)
    random_factors(theirs)
    place = tmp_path / "lora.pt"
    torch.save(loralib.lora_state_dict(theirs), place)
    for options, expected in (
        ({}, "--alpha"),
        ({"alpha": 5}, "--enable-lora 101"),
        ({"alpha": 5, "enable_lora": (True, False, False)}, "--enable-lora 101"),
        ({"alpha": 0, "enable_lora": QKV}, "above 0"),
        ({"alpha": -1, "enable_lora": QKV}, "above 0"),
    ):
        assert expected in refusal(tiny("gpt2"), place, **options)
    with pytest.raises(veneer.AdapterError, match="--alpha"):
        read(place)


def test_whether_it_is_an_embedding_must_be_known(tmp_path):
    theirs = replaced(
        "qwen2", {"model.embed_tokens": {"layer": "Embedding", "r": 2, "lora_alpha": 4}}
    )
    random_factors(theirs)
    torch.save(loralib.lora_state_dict(theirs), tmp_path / "lora.pt")
    with pytest.raises(veneer.AdapterError, match="embedding or a linear layer; name the base"):
        convert(tmp_path / "lora.pt", tmp_path / "out", to="native", alpha=4)
    assert not (tmp_path / "out").exists()
    convert(tmp_path / "lora.pt", tmp_path / "out", to="native", alpha=4, base=tiny("qwen2"))
    ours = veneer.load(tiny("qwen2"), tmp_path / "out")
    assert_same_logits(logits(theirs), ours, logits)


def test_alpha_where_the_file_says_it_is_refused(tmp_path):
    model = adapted("llama")
    for format in ("loralib", "native", "peft", "mlx"):
        veneer.save(model, tmp_path / format, format=format)
        with pytest.raises(veneer.AdapterError, match="alpha"):
            veneer.load(tiny("llama"), tmp_path / format, alpha=4)


def test_blocks_that_are_not_there(tmp_path):
    veneer.save(adapted("gpt2"), tmp_path / "native")
    with pytest.raises(veneer.AdapterError, match="No layer of this adapter has the blocks"):
        convert(tmp_path / "native", tmp_path / "out", to="loralib", enable_lora=QKV)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "dora": (lambda: adapted("llama", dora=True), "DoRA's magnitudes"),
    "prompt": (
        lambda: veneer.attach(tiny("llama"), veneer.Method("prompt")),
        "no place for prompt",
    ),
    "freeze": (
        lambda: veneer.attach(tiny("llama"), veneer.Method("freeze")),
        "no place for freeze",
    ),
    "new tokens": (adapted_with_new_tokens, "new tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_written_is_refused(case, tmp_path):
    make, expected = REFUSED[case]
    with pytest.raises(veneer.AdapterError, match=expected):
        veneer.save(make(), tmp_path / "out", format="loralib")
    assert not (tmp_path / "out").exists()


Q = "model.layers.0.self_attn.q_proj"
FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "bias": (lambda t: t.update({f"{Q}.bias": torch.zeros(32)}), f"{Q}.bias is a trained bias"),
    "renamed": (lambda t: t.update({f"{Q}.lora_C": t.pop(f"{Q}.lora_A")}), f"{Q}.lora_C"),
    "half": (lambda t: t.pop(f"{Q}.lora_B"), f"{Q} needs lora_A and lora_B"),
    "flat": (lambda t: t.update({f"{Q}.lora_A": torch.zeros(3)}), f"{Q} needs lora_A and lora_B"),
    "misshapen": (lambda t: t.update({f"{Q}.lora_A": torch.zeros(3, 31)}), "(3, 31)"),
    "ranks that differ": (
        lambda t: t.update({f"{Q}.lora_A": torch.zeros(4, 32)}),
        "A (4, 32) and B (32, 3)",
    ),
    "no rank": (lambda t: t.update({f"{Q}.lora_B": torch.zeros(32, 0)}), Q),
    "nan": (lambda t: t[f"{Q}.lora_B"].fill_(float("nan")), "not finite"),
    "all gone": (lambda t: t.clear(), "holds no factors"),
    "another layer": (
        lambda t: t.update({k.replace("q_proj", "qproj"): t.pop(k) for k in list(t) if Q in k}),
        "qproj",
    ),
    "no tensors": (lambda t: t.update(model_state_dict={}), "named tensors and nothing else"),
}


@pytest.mark.parametrize("has_config", [True, False])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault, has_config, tmp_path):
    place = tmp_path / "loralib"
    veneer.save(adapted("llama"), place, format="loralib")
    edit_tensors(place / store.WEIGHTS, FAULTS[fault][0])
    path, options = (place, {}) if has_config else (place / store.WEIGHTS, {"alpha": 6})
    assert FAULTS[fault][1] in refusal(tiny("llama"), path, **options)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"format": 2}, "its format is 2"),
        ({"layers": {}}, f"does not say what {Q} is"),
        ({"layers": []}, f"does not say what {Q} is"),
        ({"layers": {Q: 3}}, f"does not say what {Q} is"),
        ({"layers": {Q: {}}}, f"of {Q}, but must say a layer"),
        ({"lora_dropout": 2}, "dropout is 2"),
        ({"lora_dropout": "some"}, "dropout"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(changes, expected, tmp_path):
    place = tmp_path / "loralib"
    veneer.save(adapted("llama"), place, format="loralib")
    edit_json(place / store.CONFIG, **changes)
    assert expected in refusal(tiny("llama"), place)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 3, "lora_alpha": 6},
        {"layer": "Conv2d", "r": 3, "lora_alpha": 6},
        {"layer": "Linear", "r": 3, "lora_alpha": "much"},
        {"layer": "Linear", "r": 3, "lora_alpha": 0},
        {"layer": "Linear", "r": 3, "lora_alpha": 10**400},
        {"layer": "MergedLinear", "r": 3, "lora_alpha": 6},
        {"layer": "MergedLinear", "r": 3, "lora_alpha": 6, "enable_lora": []},
        {"layer": "MergedLinear", "r": 3, "lora_alpha": 6, "enable_lora": [False]},
        {"layer": "MergedLinear", "r": 3, "lora_alpha": 6, "enable_lora": [1, 1]},
        {"layer": "MergedLinear", "r": 3, "lora_alpha": 6, "enable_lora": "yes"},
    ],
    ids=str,
)
def test_settings_of_a_layer_that_cannot_be(settings, tmp_path):
    place = tmp_path / "loralib"
    veneer.save(adapted("llama"), place, format="loralib")
    layers = json.loads((place / store.CONFIG).read_text())["layers"]
    edit_json(place / store.CONFIG, layers=layers | {Q: settings})
    refusal(tiny("llama"), place)


def test_a_pickle_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self) -> Any:
            return (print, ("executed",))

    torch.save({f"{Q}.lora_A": Trap()}, tmp_path / "lora.pt")
    with pytest.raises(veneer.AdapterError, match="more than tensors"):
        veneer.load(tiny("llama"), tmp_path / "lora.pt", alpha=4)
