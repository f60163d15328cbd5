"""Adapters as values, and what they add as whole matrices in float64."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import veneer
from support.random_adapters import same, shake, snapshot, tokenizer, with_new_tokens
from support.tiny_models import tiny
from veneer.adapter.config import LoRA
from veneer.checksums import SUMS
from veneer.formats.capture import capture
from veneer.formats.merged import write_model
from veneer.formats.state import AdapterState


def model_with(architecture: str, *configs: LoRA, seed: int = 1) -> PreTrainedModel:
    """Return a base with adapters "0", "1", ... of random values over it."""
    model = tiny(architecture)
    for name, config in enumerate(configs):
        veneer.attach(model, config, name=str(name), seed=name)
    return shake(model, seed=seed)


def adapted_with_new_tokens() -> PreTrainedModel:
    model = tiny("llama")
    with_new_tokens(model, tokenizer())
    return veneer.attach(model, veneer.LoRA(rank=2))


def states_of(model: PreTrainedModel) -> list[AdapterState]:
    return [capture(model, name) for name in veneer.adapters(model)]


def two_states(targets: str = "all", **settings: Any) -> list[AdapterState]:
    """Return two adapters of random values over one base."""
    return states_of(
        model_with("llama", LoRA(rank=2, targets=targets, **settings), LoRA(rank=3, targets="all"))
    )


def same_state(a: AdapterState, b: AdapterState) -> bool:
    """Return whether two adapters are equal, tensors bit for bit."""
    one, other = a.new_tokens, b.new_tokens
    if (one is None) != (other is None):
        return False
    if one is not None and other is not None:
        heads = [rows.head for rows in (one, other) if rows.head is not None]
        if (
            (one.tokens, one.start, one.head is None)
            != (other.tokens, other.start, other.head is None)
            or not torch.equal(one.embedding, other.embedding)
            or (heads and not torch.equal(*heads))
        ):
            return False
    return same(a.tensors, b.tensors) and (a.config, a.base_name, dict(a.base_fingerprint)) == (
        b.config,
        b.base_name,
        dict(b.base_fingerprint),
    )


def refusal(model: PreTrainedModel, directory: Path, **options: Any) -> str:
    """Return why the adapter in `directory` is refused, having seen that the model stayed as it
    was."""
    before, structure = snapshot(model), repr(model)
    trains = [weight.requires_grad for weight in model.parameters()]
    with pytest.raises(veneer.AdapterError) as caught:
        veneer.load(model, directory, **options)
    assert same(before, snapshot(model))
    assert repr(model) == structure
    assert trains == [weight.requires_grad for weight in model.parameters()]
    assert veneer.adapters(model) == {}
    return str(caught.value)


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def without_key(file: Path, key: str) -> None:
    settings = json.loads(file.read_text())
    del settings[key]
    file.write_text(json.dumps(settings))


def edit_tensors(file: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    is_pt = file.suffix == ".pt"
    tensors = torch.load(file, weights_only=True) if is_pt else load_file(file)
    change(tensors)
    (torch.save if is_pt else save_file)(tensors, file)
    (file.parent / SUMS).unlink(missing_ok=True)  # as whoever changes a file on purpose does


def whole(state: AdapterState) -> dict[str, Tensor]:
    """Return ΔW of each layer, as (out, in)."""
    changes = {}
    for layer in state.layers():
        A, B = layer.A.double(), layer.B.double()
        change = B @ A
        if layer.start is not None:
            change = change - layer.start[1].double() @ layer.start[0].double()
        changes[layer.path] = state.config.scaling_of(layer.path) * change
    return changes


def assert_close(
    changes: dict[str, Tensor], expected: dict[str, Tensor], limit: float = 1e-5
) -> None:
    assert changes.keys() == expected.keys()
    for path, change in expected.items():
        error = float((changes[path] - change).norm())
        assert error <= limit * max(1.0, float(change.norm())), path


def written(model: PreTrainedModel, place: Path) -> Path:
    write_model(model, tokenizer(), place)
    return place


def add_to(model: PreTrainedModel, change: dict[str, Tensor]) -> PreTrainedModel:
    """Add to the weights of these names, in place."""
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, delta in change.items():
            weights[name].add_(delta)
    return model
