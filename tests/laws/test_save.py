"""Law 5: what is saved, loads, and says the same to the bit."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import veneer
from support.kinds import each_kind, in_share, is_first
from support.random_adapters import NEW_TOKENS, tokenizer
from support.tiny_models import tiny
from veneer.adapter.new_tokens import extend_tokenizer


@each_kind(fast=in_share(2))
def test_what_is_saved_loads(kind, tmp_path):
    model = kind.shaken()
    expected = kind.says(model)
    ours, theirs = tokenizer(), tokenizer()
    if kind.new_tokens:
        extend_tokenizer(ours, NEW_TOKENS)
    names = [*veneer.in_use(model)]
    for name in names:
        veneer.save(model, tmp_path / name, name=name, tokenizer=ours)
    again = kind.base()
    for name in names:
        veneer.load(again, tmp_path / name, name=name, tokenizer=theirs)
    assert len(theirs) == len(ours)
    veneer.use(again, veneer.in_use(model))
    assert torch.equal(kind.says(again), expected)
    assert alike(again, model)
    for name in names:
        veneer.save(again, tmp_path / "again" / name, name=name, tokenizer=theirs)
        for file in (tmp_path / name).iterdir():
            assert (tmp_path / "again" / name / file.name).read_bytes() == file.read_bytes()


def alike(a: Any, b: Any) -> bool:
    """Return whether adapters are the same, but for what a file states in another way: which layers
    they adapt, and that an MLP made the prefix."""
    neutral = {"targets": ("x",), "layers": None, "prefix_mlp": None}
    return _but(a, neutral) == _but(b, neutral)


def _but(model: Any, neutral: dict[str, Any]) -> dict[str, Any]:
    return {
        name: replace(config, **{k: v for k, v in neutral.items() if hasattr(config, k)})
        for name, config in veneer.adapters(model).items()
    }


@each_kind(lambda kind: is_first(kind) and not kind.bits and not kind.new_tokens, fast=in_share(3))
def test_another_base_is_refused(kind, tmp_path):
    model = kind.shaken()
    veneer.save(model, tmp_path, name="default")
    with pytest.raises(veneer.AdapterError, match="another base"):
        veneer.load(tiny(kind.architecture, seed=5), tmp_path)


@each_kind(lambda kind: kind.bits, fast=in_share(4))
def test_trained_over_a_quantized_base_it_belongs_to_the_base(kind, tmp_path):
    model = kind.shaken()
    veneer.save(model, tmp_path, name="default")
    dense = veneer.load(kind.dense(), tmp_path)
    assert veneer.adapters(dense).keys() == {"default"}
    with pytest.raises(veneer.AdapterError, match="another base"):
        veneer.load(tiny(kind.architecture, seed=5), tmp_path)
