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
from veneer.adapter.use import adapters, in_use
from veneer.models.fingerprint import base_parameters, fingerprint
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
    """Return the weights that should train, found by their names and kinds alone."""
    own = base_parameters(model)
    if which == "full":
        return set(own)
    last = model.config.get_text_config().num_hidden_layers - 1
    found = {name for name in own if f".{last}." in name}
    if which == "blocks and norms":
        found |= {name for name in own if re.search(NORMS, name)}
    if which == "blocks and head":
        head = {name for name in own if name.startswith(("lm_head.", "embed_out."))}
        found |= head or {name for name in own if re.search(r"(embed_tokens|wte|word_emb)", name)}
    return found


@pytest.mark.parametrize("which", METHODS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_what_is_named_changes(architecture, which):
    model = attached(which, architecture)
    assert torch.equal(logits(model), logits(tiny(architecture)))
    wanted = named(which, model)
    before = {n: w.detach().clone() for n, w in base_parameters(model).items()}
    trained(model)
    changed = {n for n, w in base_parameters(model).items() if not torch.equal(w, before[n])}
    assert changed == wanted
    assert (len(wanted) == len(before)) == (which == "full")


@pytest.mark.parametrize("which", METHODS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "minigpt"])
def test_what_is_saved_loads_and_merges(architecture, which, tmp_path):
    model = trained(attached(which, architecture))
    said = logits(model)
    plain = veneer.merge(model)
    assert torch.equal(logits(plain), said)
    assert not hasattr(plain, "veneer_active_adapters")
    assert not hasattr(plain, "veneer_marks")
    veneer.save(model, tmp_path / "a")
    kind = method(which).method
    files = {path.name for path in (tmp_path / "a").iterdir()}
    assert files == {f"{kind}_weights.pt", f"{kind}_config.json"}
    again = veneer.load(tiny(architecture), tmp_path / "a")
    assert torch.equal(logits(again), said)
    assert adapters(again) == {"default": method(which)}
    veneer.write_model(plain, tokenizer(), tmp_path / "merged")
    merged = veneer.load_base(tmp_path / "merged", dtype="float32").model
    assert torch.equal(logits(merged), said)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", ["full", "blocks and head"])
def test_a_resumed_run_equals_the_undisturbed_one(which, dtype, tmp_path):
    def run(where: str, *, stop: int | None = None, resume: bool = False) -> Any:
        model, seen = attached(which, dtype=dtype), iter(range(1, 9))
        course = TrainConfig(steps=4, lr=1e-3, tokens_per_step=16, save_every=1)
        events = veneer.train(
            model,
            ROWS,
            course,
            directory=tmp_path / where,
            resume=resume,
            should_stop=lambda: next(seen) == stop,
        )
        for _ in events:
            pass
        return snapshot(model)

    whole = run("whole")
    run("parts", stop=2)
    assert same(run("parts", resume=True), whole)


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


def test_new_words_train_beside_the_blocks(tmp_path):
    model, words = tiny("qwen2"), tokenizer(90)
    with_new_tokens(model, words)
    veneer.attach(model, method("one block"))
    said = logits(model, ids(vocabulary=90))
    veneer.save(model, tmp_path / "a", tokenizer=words)
    other = tokenizer(90)
    again = veneer.load(tiny("qwen2"), tmp_path / "a", tokenizer=other)
    assert torch.equal(logits(again, ids(vocabulary=90)), said)
    assert len(other) == len(words)


@pytest.mark.parametrize("which", ["full", "one block"])
def test_the_base_is_told_by_what_it_was(which, tmp_path):
    model = trained(attached(which))
    assert fingerprint(model) == fingerprint(tiny("llama"))
    veneer.save(model, tmp_path / "a")
    with pytest.raises(veneer.AdapterError, match="another base"):
        veneer.load(tiny("llama", seed=1), tmp_path / "a")


def test_what_replaced_weights_cannot_be_put_aside():
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
    with pytest.raises(veneer.AdapterError, match="adapters that lie over it"):
        veneer.attach(adapted, method("full"), name="more")


def test_what_cannot_be_is_named(tmp_path):
    with pytest.raises(veneer.ConfigError, match="3 blocks of 2"):
        veneer.attach(tiny("llama"), veneer.Method("freeze", trained_blocks=3))
    with pytest.raises(veneer.ConfigError, match="leave bits out"):
        veneer.attach(quantized("llama"), veneer.Method("full"))
    with pytest.raises(veneer.ConfigError) as error:
        veneer.Method("freeze", trained_blocks=0, virtual_tokens=3, prompt_text="x")
    for part in ("trained_blocks is 0", "virtual_tokens would", "prompt_text would"):
        assert part in str(error.value)
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
    with pytest.raises(veneer.AdapterError) as error:
        veneer.load(tiny("llama"), tmp_path / "a")
    for part in (
        f"weights are missing: {first}",
        "none of the weights that train: model.nowhere.weight",
        f"{second} is (3,)",
    ):
        assert part in str(error.value)
