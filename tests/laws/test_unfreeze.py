"""Full fine-tuning and layer freezing: only what is named trains, and it is saved like the rest."""

import copy
import re
from typing import Any

import pytest
import torch

import veneer
from support.random_adapters import (
    examples,
    ids,
    logits,
    same,
    snapshot,
    tokenizer,
    with_new_tokens,
)
from support.tiny_models import ARCHITECTURES, quantized, tiny
from veneer.adapter.use import in_use
from veneer.checksums import SUMS
from veneer.models.fingerprint import base_parameters
from veneer.training.config import TrainConfig

ROWS = examples([9, 14, 6, 11])
METHODS = {
    "full": {},
    "one block": {"trained_blocks": 1},
    "blocks and head": {"trained_blocks": 1, "train_head": True},
    "blocks and norms": {"trained_blocks": 1, "train_norms": True},
}


def method(which: str) -> veneer.Method:
    if which == "full":
        return veneer.Method("full")
    return veneer.Method("freeze", **METHODS[which])


def attached(which: str, architecture: str = "llama", **options: Any) -> Any:
    return veneer.attach(tiny(architecture, **options), method(which))


def trained(model: Any, steps: int = 2, **options: Any) -> Any:
    for _ in veneer.train(model, ROWS, TrainConfig(steps=steps, lr=1e-2), **options):
        pass
    return model


NORMS = r"norm|\bln_|layernorm"


def named(which: str, model: Any) -> set[str]:
    """Return the weights that should train, names by their names and kinds alone."""
    own = base_parameters(model)
    if which == "full":
        return set(own)
    last = model.config.get_text_config().num_hidden_layers - 1
    names = {name for name in own if f".{last}." in name}
    if which == "blocks and norms":
        names |= {name for name in own if re.search(NORMS, name)}
    if which == "blocks and head":
        head = {name for name in own if name.startswith(("lm_head.", "embed_out."))}
        names |= head or {name for name in own if re.search(r"(embed_tokens|wte|word_emb)", name)}
    return names


@pytest.mark.parametrize("which", METHODS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_what_is_named_trains(architecture, which):
    model = attached(which, architecture)
    own = base_parameters(model)
    trained = {name for name, weight in own.items() if weight.requires_grad}
    assert trained == named(which, model)
    assert (len(trained) == len(own)) == (which == "full")


@pytest.mark.parametrize("which", ["full", "one block"])
def test_its_files_are_called_after_the_method(which, tmp_path):
    model = attached(which)
    veneer.save(model, tmp_path / "a")
    name = method(which).method
    files = {path.name for path in (tmp_path / "a").iterdir()}
    assert files == {f"{name}_weights.pt", f"{name}_config.json", SUMS}
    merged = veneer.merge(model)
    assert not hasattr(merged, "veneer_marks")
    assert torch.equal(logits(merged), logits(model))


def test_steps_too_small_for_bfloat16_add_up():
    """2e-5 is less than bfloat16 can tell a weight of 0.1 apart by; twenty of them are not."""
    model = attached("full", dtype=torch.bfloat16)
    before = snapshot(model)
    course = TrainConfig(steps=40, lr=2e-5, schedule="constant", warmup=0)
    for _ in veneer.train(model, ROWS, course):
        pass
    after = snapshot(model)
    large = torch.cat([v.flatten()[v.flatten().abs() > 0.05] for v in before.values()])
    moved = torch.cat(
        [(after[n].flatten() != v.flatten())[v.flatten().abs() > 0.05] for n, v in before.items()]
    )
    assert len(large) > 1000
    assert moved.float().mean() > 0.2


def test_new_tokens_train_beside_the_blocks(tmp_path):
    model, ours = tiny("qwen2"), tokenizer(90)
    with_new_tokens(model, ours)
    veneer.attach(model, method("one block"))
    expected = logits(model, ids(vocabulary=90))
    veneer.save(model, tmp_path / "a", tokenizer=ours)
    other = tokenizer(90)
    again = veneer.load(tiny("qwen2"), tmp_path / "a", tokenizer=other)
    assert torch.equal(logits(again, ids(vocabulary=90)), expected)
    assert len(other) == len(ours)


def test_what_replaced_weights_cannot_be_taken_off():
    model = trained(attached("one block"))
    before = snapshot(model)
    for attempt in (
        lambda: veneer.use(model, None),
        lambda: veneer.detach(model),
        lambda: veneer.attach(model, veneer.LoRA()),
        lambda: veneer.attach(model, method("full"), name="more"),
    ):
        with pytest.raises(veneer.AdapterError, match=r"replaced weights|attached already"):
            attempt()
    assert same(snapshot(model), before)
    assert in_use(model) == {"default": 1.0}
    adapted = veneer.attach(tiny("llama"), veneer.LoRA())
    with pytest.raises(veneer.AdapterError, match="adapters that are attached"):
        veneer.attach(adapted, method("full"), name="more")


def test_what_cannot_be_is_named(tmp_path):
    with pytest.raises(veneer.ConfigError, match="3 blocks of 2"):
        veneer.attach(tiny("llama"), veneer.Method("freeze", trained_blocks=3))
    with pytest.raises(veneer.ConfigError, match="leave bits out"):
        veneer.attach(quantized("llama"), veneer.Method("full"))
    with pytest.raises(veneer.ConfigError) as error:
        veneer.Method("freeze", trained_blocks=0, virtual_tokens=3, prompt_text="x")
    for problem in ("trained_blocks is 0", "virtual_tokens would", "prompt_text would"):
        assert problem in str(error.value)
    veneer.save(attached("one block"), tmp_path / "a")
    with pytest.raises(veneer.AdapterError, match="PEFT has no format for freeze"):
        veneer.save(attached("one block"), tmp_path / "b", format="peft")
    path = tmp_path / "a" / "freeze_weights.pt"
    tensors = torch.load(path)
    first, second, *_ = tensors
    damaged = copy.copy(tensors) | {"model.nowhere.weight": torch.ones(2)}
    del damaged[first]
    damaged[second] = torch.full((3,), torch.nan)
    torch.save(damaged, path)
    (tmp_path / "a" / SUMS).unlink()
    with pytest.raises(veneer.AdapterError) as error:
        veneer.load(tiny("llama"), tmp_path / "a")
    for problem in (
        f"weights are missing: {first}",
        "none of the weights that train: model.nowhere.weight",
        f"{second} is (3,)",
    ):
        assert problem in str(error.value)
