"""Adapters as values, and what they add as whole matrices in float64."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

import veneer
from support.random_adapters import shake, tokenizer
from support.tiny_models import tiny
from veneer.adapter.config import LoRA
from veneer.formats.capture import capture
from veneer.formats.merged import write_model
from veneer.formats.state import AdapterState


def model_with(architecture: str, *configs: LoRA, seed: int = 1) -> PreTrainedModel:
    """Return a base with adapters "0", "1", ... of random values over it."""
    model = tiny(architecture)
    for name, config in enumerate(configs):
        veneer.attach(model, config, name=str(name), seed=name)
    return shake(model, seed=seed)


def states_of(model: PreTrainedModel) -> list[AdapterState]:
    return [capture(model, name) for name in veneer.adapters(model)]


def whole(state: AdapterState) -> dict[str, Tensor]:
    """Return ΔW of each layer, as (out, in)."""
    found = {}
    for layer in state.layers():
        A, B = layer.A.double(), layer.B.double()
        change = B @ A
        if layer.start is not None:
            change = change - layer.start[1].double() @ layer.start[0].double()
        found[layer.path] = state.config.scaling_of(layer.path) * change
    return found


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], limit: float = 1e-5) -> None:
    assert found.keys() == wanted.keys()
    for path, change in wanted.items():
        error = float((found[path] - change).norm())
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
