"""Law 5, for virtual tokens: what is saved, loads, natively and in PEFT; nothing else does."""

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import veneer
from support.adapter_states import edit_json, edit_tensors, refusal
from support.closeness import assert_same_logits
from support.random_adapters import (
    distance,
    logits,
    same,
    shake,
    tokenizer,
    with_new_tokens,
)
from support.tiny_models import quantized, tiny
from veneer.formats.adapters import read
from veneer.formats.capture import capture
from veneer.formats.peft.directory import CONFIG, WEIGHTS

METHODS = ("prefix", "prompt")
COUNT = 5
OURS = {"num_layers": 2, "token_dim": 32, "num_attention_heads": 4}
# Settings of their shape that PEFT does not find by itself: those of our own configuration, and
# how many heads the keys of Falcon have.
KNOWN: dict[tuple[str, str], dict[str, int]] = {
    ("minigpt", "prefix"): OURS,
    ("minigpt", "prompt"): OURS,
    ("falcon", "prefix"): {"token_dim": 8, "num_attention_heads": 1},
}
each_method = pytest.mark.parametrize("method", METHODS)
# Their caches have fewer heads than queries, one, and as many; Gemma scales its embeddings.
ARCHITECTURES = ("llama", "falcon", "gpt2", "minigpt", "gemma")
each_model = pytest.mark.parametrize("architecture", ARCHITECTURES)


def new_model(architecture: str = "llama", method: str = "prefix", **options: Any) -> Any:
    config = veneer.Method(method, **({"virtual_tokens": COUNT} | options))
    return shake(veneer.attach(tiny(architecture), config, seed=3))


@pytest.mark.parametrize("options", [{}, {"prefix_mlp": 6}], ids=["plain", "mlp"])
@each_model
def test_a_prefix_round_trip(architecture, options, tmp_path):
    model = new_model(architecture, "prefix", **options)
    round_trip(model, architecture, tmp_path)
    config = json.loads((tmp_path / "first" / "prefix_config.json").read_text())
    assert config["prefix_mlp"] is None


@pytest.mark.parametrize("options", [{}, {"prompt_text": "so"}], ids=["plain", "text"])
@each_model
def test_a_prompt_round_trip(architecture, options, tmp_path):
    config = veneer.Method("prompt", virtual_tokens=COUNT, **options)
    model = shake(veneer.attach(tiny(architecture), config, tokenizer=tokenizer()))
    round_trip(model, architecture, tmp_path)
    assert read(tmp_path / "first").config == config


def round_trip(model: Any, architecture: str, place: Path) -> None:
    """See that what is saved of a model loads over a fresh base, and is saved so again."""
    veneer.save(model, place / "first")
    fresh = tiny(architecture)
    veneer.load(fresh, place / "first", name="again")
    assert veneer.in_use(fresh) == {"again": 1.0}
    assert not any(weight.requires_grad for weight in fresh.parameters())
    assert_same_logits(logits(fresh), model, logits)
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
    message = logits(model)
    veneer.attach(model, veneer.Method("prompt", virtual_tokens=2), name="other", seed=9)
    veneer.save(model, tmp_path / "out", name="default")
    assert torch.equal(logits(veneer.load(tiny("llama"), tmp_path / "out")), message)


@each_method
def test_trained_over_a_quantized_base_it_belongs_to_the_base(method, tmp_path):
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


def text_of(logits: Tensor) -> Tensor:
    """Return the logits of the text itself, where PEFT gives the prompt's too."""
    return logits[:, -12:]


@each_model
@each_method
@pytest.mark.thinned
def test_what_peft_writes_we_read(architecture, method, tmp_path):
    peer = text_of(theirs(architecture, method, tmp_path / "peft"))
    model = veneer.load(tiny(architecture), tmp_path / "peft")
    assert distance(logits(model), logits(tiny(architecture))) > 0.01
    veneer.save(model, tmp_path / "back", format="peft")
    for others in (peer, text_of(opened(architecture, tmp_path / "back"))):
        assert_same_logits(others, model, logits)
    ours, its = (load_file(tmp_path / name / WEIGHTS) for name in ("back", "peft"))
    assert same(ours, its)


@each_model
@each_method
def test_what_we_write_peft_reads(architecture, method, tmp_path):
    model = new_model(architecture, method)
    veneer.save(model, tmp_path / "peft", format="peft")
    assert_same_logits(text_of(opened(architecture, tmp_path / "peft")), model, logits)
    again = veneer.load(tiny(architecture), tmp_path / "peft")
    assert torch.equal(logits(again), logits(model))
    assert same(capture(again).tensors, capture(model).tensors)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_mlp_of_pefts_is_folded_away(architecture, tmp_path):
    made = {"prefix_projection": True, "encoder_hidden_size": 6}
    peer = theirs(architecture, "prefix", tmp_path / "peft", **made)
    model = veneer.load(tiny(architecture), tmp_path / "peft")
    assert_same_logits(peer, model, logits)
    ours = new_model(architecture, "prefix", prefix_mlp=6)
    veneer.save(ours, tmp_path / "ours", format="peft")
    assert_same_logits(opened(architecture, tmp_path / "ours"), ours, logits)


def test_the_text_that_a_prompt_started_from_is_read(tmp_path):
    theirs("llama", "prompt", tmp_path / "peft")
    edit_json(tmp_path / "peft" / CONFIG, **{"prompt_tuning_init_text": "so"})
    assert read(tmp_path / "peft").config == veneer.Method(
        "prompt", virtual_tokens=COUNT, prompt_text="so"
    )


# Refusals.


@pytest.fixture(params=METHODS)
def native(request, tmp_path) -> tuple[str, Path]:
    """A method, and where an adapter of it was written."""
    veneer.save(new_model("llama", request.param), tmp_path / "native")
    return request.param, tmp_path / "native"


def rewrite(place: tuple[str, Path], change: Any) -> str:
    method, directory = place
    edit_tensors(directory / f"{method}_weights.pt", change)
    return refusal(tiny("llama"), directory)


def test_all_that_is_wrong_is_named_at_once(native):
    method, directory = native
    edit_json(directory / f"{method}_config.json", virtual_tokens=4)

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[method].view(-1)[0] = float("nan")
        tensors["more"] = torch.zeros(2)

    message = rewrite(native, spoil)
    assert f"{method} has values that are not finite numbers" in message
    assert "none of the weights that train: more" in message
    shape = {"prefix": "(2, 2, 2, 4, 8)", "prompt": "(4, 32)"}[method]
    assert f"but needs to be {shape}" in message


def test_a_missing_tensor(native):
    assert f"weights are missing: {native[0]}" in rewrite(native, lambda tensors: tensors.clear())


def test_more_tokens_than_the_context_holds(native):
    method, directory = native
    edit_json(directory / f"{method}_config.json", **{"virtual_tokens": 63})
    assert "63 virtual tokens leave no room" in refusal(tiny("llama"), directory)


def test_another_architecture(native):
    message = refusal(tiny("gpt2"), native[1])
    assert "another base" in message
    if native[0] == "prefix":  # of which GPT-2 has four heads, and none fewer for keys
        assert "but needs to be (2, 2, 4, 5, 8)" in message


@pytest.fixture(params=METHODS)
def foreign(request, tmp_path) -> Path:
    theirs("llama", request.param, tmp_path / "peft")
    return tmp_path / "peft"


def test_all_that_is_not_read_of_pefts_is_named_at_once(foreign):
    edit_json(foreign / CONFIG, **{"modules_to_save": ["lm_head"], "num_transformer_submodules": 2})
    edit_tensors(foreign / WEIGHTS, lambda t: t.update(prompts=t.pop("prompt_embeddings")))
    message = refusal(tiny("llama"), foreign)
    for problem in (
        "modules_to_save is not read",
        "num_transformer_submodules is not 1",
        "'prompts' is unknown",
        "prompt_embeddings is missing",
    ):
        assert problem in message


@pytest.mark.parametrize("count", [4, 0, None, "five"])
def test_a_number_of_tokens_that_is_not_theirs(foreign, count):
    edit_json(foreign / CONFIG, **{"num_virtual_tokens": count})
    refusal(tiny("llama"), foreign)


@pytest.mark.parametrize(
    "changes",
    [{"num_layers": 3}, {"num_attention_heads": 3}, {"token_dim": 8}, {"token_dim": None}],
    ids=str,
)
def test_a_prefix_of_another_shape(changes, tmp_path):
    theirs("llama", "prefix", tmp_path / "peft")
    edit_json(tmp_path / "peft" / CONFIG, **changes)
    (name,) = changes
    assert f"{name} {changes[name]!r}" in refusal(tiny("llama"), tmp_path / "peft")


@each_method
def test_new_tokens_are_not_written_for_peft(method, tmp_path):
    model = tiny("llama")
    with_new_tokens(model, tokenizer())
    veneer.attach(model, veneer.Method(method, virtual_tokens=2))
    with pytest.raises(veneer.AdapterError, match="new tokens"):
        veneer.save(model, tmp_path / "peft", format="peft")
    assert not (tmp_path / "peft").exists()
