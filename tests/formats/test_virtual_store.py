"""Law 5, for virtual tokens: what is saved, loads, natively and in PEFT; nothing else does."""

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
from support.random_adapters import (
    distance,
    logits,
    same,
    shake,
    snapshot,
    tokenizer,
    with_new_tokens,
)
from support.tiny_models import ARCHITECTURES, quantized, tiny
from veneer.formats.adapters import read
from veneer.formats.capture import capture
from veneer.formats.peft.directory import CONFIG, WEIGHTS

METHODS = ("prefix", "prompt")
COUNT = 5
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
OURS = {"num_layers": 2, "token_dim": 32, "num_attention_heads": 4}
# Settings of their shape that PEFT does not find by itself: those of our own configuration, and
# how many heads the keys of Falcon have.
KNOWN: dict[tuple[str, str], dict[str, int]] = {
    ("minigpt", "prefix"): OURS,
    ("minigpt", "prompt"): OURS,
    ("falcon", "prefix"): {"token_dim": 8, "num_attention_heads": 1},
}
each_method = pytest.mark.parametrize("method", METHODS)
each_model = pytest.mark.parametrize("architecture", ARCHITECTURES)


def new_model(architecture: str = "llama", method: str = "prefix", **options: Any) -> Any:
    config = veneer.Method(method, **({"virtual_tokens": COUNT} | options))
    return shake(veneer.attach(tiny(architecture), config, seed=3))


@pytest.mark.parametrize("options", [{}, {"prefix_mlp": 6}], ids=["plain", "mlp"])
@each_model
def test_a_prefix_goes_round(architecture, options, tmp_path):
    model = new_model(architecture, "prefix", **options)
    goes_round(model, architecture, tmp_path)
    config = json.loads((tmp_path / "first" / "prefix_config.json").read_text())
    assert config["prefix_mlp"] is None


@pytest.mark.parametrize("options", [{}, {"prompt_text": "so"}], ids=["plain", "text"])
@each_model
def test_a_prompt_goes_round(architecture, options, tmp_path):
    config = veneer.Method("prompt", virtual_tokens=COUNT, **options)
    model = shake(veneer.attach(tiny(architecture), config, tokenizer=tokenizer()))
    goes_round(model, architecture, tmp_path)
    assert read(tmp_path / "first").config == config


def goes_round(model: Any, architecture: str, place: Path) -> None:
    """See that what is saved of a model loads over a fresh base, and is saved so again."""
    veneer.save(model, place / "first")
    fresh = tiny(architecture)
    veneer.load(fresh, place / "first", name="again")
    assert veneer.in_use(fresh) == {"again": 1.0}
    assert not any(weight.requires_grad for weight in fresh.parameters())
    torch.testing.assert_close(logits(fresh), logits(model), rtol=1e-6, atol=1e-6)
    veneer.save(fresh, place / "second")
    first, second = read(place / "first"), read(place / "second")
    assert same(first.tensors, second.tensors)
    assert first.config == second.config
    (value,) = first.tensors.values()
    assert value.dtype == torch.float32
    veneer.use(fresh, None)
    assert torch.equal(logits(fresh), logits(tiny(architecture)))


@each_method
def test_saved_by_name_while_another_acts(method, tmp_path):
    model = new_model("llama", method)
    said = logits(model)
    veneer.attach(model, veneer.Method("prompt", virtual_tokens=2), name="other", seed=9)
    veneer.save(model, tmp_path / "out", name="default")
    assert torch.equal(logits(veneer.load(tiny("llama"), tmp_path / "out")), said)


@each_method
def test_trained_over_a_packed_base_it_belongs_to_the_base(method, tmp_path):
    config = veneer.Method(method, virtual_tokens=COUNT)
    model = shake(veneer.attach(quantized("llama"), config, seed=1))
    veneer.save(model, tmp_path / "out")
    assert torch.equal(logits(veneer.load(quantized("llama"), tmp_path / "out")), logits(model))
    veneer.load(tiny("llama"), tmp_path / "out")
    with pytest.raises(veneer.AdapterError, match="another base"):
        veneer.load(tiny("llama", seed=1), tmp_path / "out")
    veneer.load(tiny("llama", seed=1), tmp_path / "out", force=True)


# PEFT.


def theirs(architecture: str, method: str, place: Path, **options: Any) -> Tensor:
    """Let PEFT write virtual tokens of random values to `place`; return its own logits."""
    kind = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}[method]
    settings = {"task_type": "CAUSAL_LM", "num_virtual_tokens": COUNT}
    config = kind(**(settings | KNOWN.get((architecture, method), {}) | options))
    torch.manual_seed(7)
    model = peft.get_peft_model(tiny(architecture), config).eval()
    with torch.no_grad():
        for weight in model.prompt_encoder.parameters():
            weight.normal_(std=0.5)
    model.save_pretrained(place)
    return logits(model)


def opened(architecture: str, place: Path) -> Tensor:
    """Return the logits of PEFT over a fresh base, with the adapter in `place`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(?i).*(missing|unexpected|not found)")
        model = peft.PeftModel.from_pretrained(tiny(architecture), place)
    return logits(model.eval())


def text_of(found: Tensor) -> Tensor:
    """Return the logits of the text itself, where PEFT gives the prompt's too."""
    return found[:, -12:]


@each_model
@each_method
def test_what_peft_writes_we_read(architecture, method, tmp_path):
    wanted = text_of(theirs(architecture, method, tmp_path / "peft"))
    model = tiny(architecture)
    base = logits(model)
    veneer.load(model, tmp_path / "peft")
    torch.testing.assert_close(logits(model), wanted, **CLOSE)
    assert distance(wanted, base) > 0.01
    veneer.save(model, tmp_path / "back", format="peft")
    found = text_of(opened(architecture, tmp_path / "back"))
    torch.testing.assert_close(found, wanted, **CLOSE)
    ours, its = (load_file(tmp_path / name / WEIGHTS) for name in ("back", "peft"))
    assert same(ours, its)


@each_model
@each_method
def test_what_we_write_peft_reads(architecture, method, tmp_path):
    model = new_model(architecture, method)
    veneer.save(model, tmp_path / "peft", format="peft")
    found = text_of(opened(architecture, tmp_path / "peft"))
    torch.testing.assert_close(found, logits(model), **CLOSE)
    again = veneer.load(tiny(architecture), tmp_path / "peft")
    assert torch.equal(logits(again), logits(model))
    assert same(capture(again).tensors, capture(model).tensors)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_mlp_of_pefts_is_folded_away(architecture, tmp_path):
    made = {"prefix_projection": True, "encoder_hidden_size": 6}
    wanted = theirs(architecture, "prefix", tmp_path / "peft", **made)
    model = veneer.load(tiny(architecture), tmp_path / "peft")
    torch.testing.assert_close(logits(model), wanted, **CLOSE)
    ours = new_model(architecture, "prefix", prefix_mlp=6)
    veneer.save(ours, tmp_path / "ours", format="peft")
    torch.testing.assert_close(opened(architecture, tmp_path / "ours"), logits(ours), **CLOSE)


def test_the_text_that_a_prompt_started_from_is_told(tmp_path):
    theirs("llama", "prompt", tmp_path / "peft")
    edit(tmp_path / "peft", CONFIG, {"prompt_tuning_init_text": "so"})
    assert read(tmp_path / "peft").config == veneer.Method(
        "prompt", virtual_tokens=COUNT, prompt_text="so"
    )


# Refusals.


def edit(place: Path, name: str, changes: dict[str, Any]) -> None:
    config = json.loads((place / name).read_text())
    (place / name).write_text(json.dumps(config | changes))


def refusal(place: Path, architecture: str = "llama") -> str:
    """Return why what is there is refused, having seen that the model stayed as it was."""
    model = tiny(architecture)
    before, looks = snapshot(model), repr(model)
    with pytest.raises(veneer.AdapterError) as caught:
        veneer.load(model, place)
    assert same(before, snapshot(model))
    assert repr(model) == looks
    assert veneer.adapters(model) == {}
    return str(caught.value)


@pytest.fixture(params=METHODS)
def native(request, tmp_path) -> tuple[str, Path]:
    """A method, and where an adapter of it was written."""
    veneer.save(new_model("llama", request.param), tmp_path / "native")
    return request.param, tmp_path / "native"


def rewrite(place: tuple[str, Path], change: Any) -> str:
    method, directory = place
    file = directory / f"{method}_weights.pt"
    tensors = torch.load(file, weights_only=True)
    change(tensors)
    torch.save(tensors, file)
    return refusal(directory)


def test_all_that_is_wrong_is_named_at_once(native):
    method, directory = native
    edit(directory, f"{method}_config.json", {"virtual_tokens": 4})

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[method].view(-1)[0] = float("nan")
        tensors["more"] = torch.zeros(2)

    said = rewrite(native, spoil)
    assert f"{method} has values that are not finite numbers" in said
    assert "none of the weights that train: more" in said
    shape = {"prefix": "(2, 2, 2, 4, 8)", "prompt": "(4, 32)"}[method]
    assert f"but needs to be {shape}" in said


def test_a_missing_tensor(native):
    assert f"weights are missing: {native[0]}" in rewrite(native, lambda tensors: tensors.clear())


def test_more_tokens_than_the_context_holds(native):
    method, directory = native
    edit(directory, f"{method}_config.json", {"virtual_tokens": 63})
    assert "63 virtual tokens leave no room" in refusal(directory)


def test_another_architecture(native):
    said = refusal(native[1], "gpt2")
    assert "another base" in said
    if native[0] == "prefix":  # of which GPT-2 has four heads, and none fewer for keys
        assert "but needs to be (2, 2, 4, 5, 8)" in said


@pytest.fixture(params=METHODS)
def foreign(request, tmp_path) -> Path:
    theirs("llama", request.param, tmp_path / "peft")
    return tmp_path / "peft"


def test_all_that_is_not_read_of_pefts_is_named_at_once(foreign):
    edit(foreign, CONFIG, {"modules_to_save": ["lm_head"], "num_transformer_submodules": 2})
    tensors = load_file(foreign / WEIGHTS)
    tensors["prompts"] = tensors.pop("prompt_embeddings")
    save_file(tensors, foreign / WEIGHTS)
    said = refusal(foreign)
    for word in (
        "modules_to_save is not read",
        "num_transformer_submodules is not 1",
        "'prompts' is unknown",
        "prompt_embeddings is missing",
    ):
        assert word in said


@pytest.mark.parametrize("count", [4, 0, None, "five"])
def test_a_number_of_tokens_that_is_not_theirs(foreign, count):
    edit(foreign, CONFIG, {"num_virtual_tokens": count})
    refusal(foreign)


@pytest.mark.parametrize(
    "changes",
    [{"num_layers": 3}, {"num_attention_heads": 3}, {"token_dim": 8}, {"token_dim": None}],
    ids=str,
)
def test_a_prefix_of_another_shape(changes, tmp_path):
    theirs("llama", "prefix", tmp_path / "peft")
    edit(tmp_path / "peft", CONFIG, changes)
    (name,) = changes
    assert f"{name} {changes[name]!r}" in refusal(tmp_path / "peft")


@each_method
def test_new_words_are_not_written_for_peft(method, tmp_path):
    model = tiny("llama")
    with_new_tokens(model, tokenizer())
    veneer.attach(model, veneer.Method(method, virtual_tokens=2))
    with pytest.raises(veneer.AdapterError, match="new tokens"):
        veneer.save(model, tmp_path / "peft", format="peft")
    assert not (tmp_path / "peft").exists()
