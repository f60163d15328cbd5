"""A run that starts from an adapter: with its values and settings, and all of it trains on."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import veneer
from support import peft_cases
from support.random_adapters import logits, same, shake, targets_named, tokenizer, with_new_tokens
from support.tiny_models import VOCAB, tiny
from veneer.errors import ConfigError
from veneer.formats import adapters
from veneer.formats.merged import write_model
from veneer.training import tune as running
from veneer.training.events import Notice, Trained

ROW = {"prompt": "veneer is thin", "completion": "walnut lacquer on a board"}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("bases")
    for seed, name in enumerate(("base", "other")):
        write_model(tiny("llama", seed=seed), tokenizer(), place / name)
    (place / "rows.jsonl").write_text("\n".join([json.dumps(ROW)] * 3))
    return place


def lora(model: Any, place: Path, *, form: str = "native", new: bool = False, **settings: Any):
    words = tokenizer()
    if new:
        with_new_tokens(model, words)
    targets = targets_named(model, "everything")
    config = veneer.LoRA(**({"rank": 3, "targets": targets} | settings))
    shake(veneer.attach(model, config, seed=0))
    adapters.save(model, place, format=form, tokenizer=words if form == "native" else None)


def prefix(model: Any, place: Path):
    shake(veneer.attach(model, veneer.Method(method="prefix", virtual_tokens=3), seed=0))
    adapters.save(model, place, format="peft")


def of_peft(model: Any, place: Path):
    """Modules to save, and rows for tokens of the base's own, which only PEFT's files bring."""
    ids = tokenizer()("ae")["input_ids"]
    options = {"modules_to_save": ["norm", "1.mlp"], "trainable_token_indices": ids}
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM", **options)
    peft_cases.written(peft.get_peft_model(model, config), place)


STARTS: dict[str, Any] = {
    "DoRA and new tokens": lambda m, p: lora(m, p, dora=True, new=True, targets=["all"]),
    "PiSSA": lambda m, p: lora(m, p, init="pissa"),
    "mlx": lambda m, p: lora(m, p, form="mlx", targets=["mlp"]),
    "peft": of_peft,
    "prefix": prefix,
}


def recipe(home: Path, out: Path, adapter: Path, **settings: Any) -> Any:
    return veneer.Recipe(
        **{
            "model": str(home / "base"),
            "data": home / "rows.jsonl",
            "training": veneer.TrainConfig(steps=2, lr=0.01),
            "dtype": "float32",
            "out": out,
            "start_from": adapter,
        }
        | settings
    )


def values(state: Any) -> dict[str, Any]:
    """Return all tensors of an adapter, by name."""
    tokens = {path: stored.rows for path, stored in state.trained_tokens.items()}
    new = {} if state.new_tokens is None else {"new tokens": state.new_tokens.embedding}
    return dict(state.tensors) | dict(state.modules_to_save) | tokens | new


@pytest.mark.parametrize("start", STARTS)
def test_it_starts_where_the_adapter_is_and_all_of_it_trains(start, home, tmp_path, monkeypatch):
    dtype = "bf16" if start == "peft" else "float32"  # in which modules to save are copied
    adapter = tmp_path / "start"
    STARTS[start](veneer.load_base(home / "base", dtype="float32").model, adapter)
    base = veneer.load_base(home / "base", dtype=dtype)
    veneer.load(base.model, adapter, tokenizer=base.tokenizer)
    before = adapters.capture(base.model)
    first = []

    def watched(model: Any, rows: Any, *rest: Any, train: Any = running.train, **options: Any):
        first.extend((logits(model), max(rows[0].tokens)))
        return train(model, rows, *rest, **options)

    monkeypatch.setattr(running, "train", watched)
    events = list(veneer.tune(recipe(home, tmp_path / "out", adapter, dtype=dtype)))
    assert torch.equal(first[0], logits(base.model))
    assert (first[1] >= VOCAB) == (before.new_tokens is not None)  # the rows are read with them
    assert any(isinstance(event, Trained) for event in events)
    (result,) = (tmp_path / "out").glob("*_adapter")
    after = adapters.read(result, base.model)
    assert (after.config, {*values(after)}) == (before.config, {*values(before)})
    unchanged = {key for key, v in values(before).items() if torch.equal(values(after)[key], v)}
    assert unchanged == {key for key in before.tensors if "start" in key}


def test_settings_that_are_not_the_adapters_are_refused_at_once(home, tmp_path):
    model = veneer.load_base(home / "base", dtype="float32").model
    lora(model, tmp_path / "start", targets=["qv"])

    def refused(match: str, **settings: Any) -> None:
        with pytest.raises(veneer.VeneerError, match=match):
            list(veneer.tune(recipe(home, tmp_path / "out", tmp_path / "start", **settings)))

    other = veneer.LoRA(rank=4, dora=True, targets=["mlp"])
    refused(
        r"dora \(False there, True here\); rank \(3 there, 4 here\); "
        r"targets \(\('q_proj', 'v_proj'\) there, \('mlp',\) here\)\. Leave them out",
        lora=other,
    )
    refused(r"layers \(all there, '1:' here\)", lora=veneer.LoRA(rank=3, targets="qv", layers="1:"))
    refused("method .*lora.*there.*prefix.*here", method=veneer.Method(method="prefix"))
    refused("another base.*force", model=str(home / "other"))
    assert not (tmp_path / "out").exists()
    one = recipe(home, tmp_path / "out", tmp_path / "start", lora=veneer.LoRA(3, targets="qv"))
    assert Notice(f"Starts from {tmp_path / 'start'}: rank 3, alpha 6, over q_proj, v_proj.") in [
        *veneer.tune(one)
    ]
    quantized = veneer.tune(replace(one, bits=8, start_from=tmp_path / "out", out=tmp_path / "8"))
    texts = (event.text for event in quantized if isinstance(event, Notice))
    assert any("trained over its base in 32 bits" in text for text in texts)
    quantized.close()
    # Of what trained the base's own weights, the merged model is the start.
    full = replace(one, method=veneer.Method(method="freeze"), lora=veneer.LoRA(), start_from=None)
    list(veneer.tune(replace(full, out=tmp_path / "freeze")))
    frozen = replace(one, start_from=tmp_path / "freeze/freeze_adapter", out=tmp_path / "again")
    with pytest.raises(ConfigError, match="merged model"):
        list(veneer.tune(frozen))


def test_a_run_from_an_adapter_resumes_to_the_bit(home, tmp_path):
    model = veneer.load_base(home / "base", dtype="float32").model
    lora(model, tmp_path / "start", dora=True, new=True, targets=["qv"])
    results = []
    for name, stops in (("whole", [False]), ("parts", [True, False])):
        one = recipe(home, tmp_path / name, tmp_path / "start", lora=veneer.LoRA(dropout=0.2))
        for stop in stops:
            resume = name == "parts" and not stop
            list(veneer.tune(one, resume=resume, should_stop=lambda stop=stop: stop))
        results.append(values(adapters.read(tmp_path / name / "lora_adapter")))
    assert same(*results)
