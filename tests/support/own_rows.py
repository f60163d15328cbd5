"""Adapters that have more than low-rank factors for themselves, on disk: tokens of their own, rows
of embedding and head, virtual tokens, biases."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import veneer
from support.random_adapters import shake, targets_named, tokenizer, with_new_tokens
from support.serving_bases import write_adapter
from support.tiny_models import VOCAB, tiny
from veneer.adapter.targets import adaptable_layers
from veneer.formats.adapters import write
from veneer.formats.capture import capture
from veneer.formats.state import AdapterState, StoredTokens
from veneer.generate.runners.adapter_rows import Ends

KINDS = ("tokens", "prompt", "prefix", "modules", "rows", "dora", "embedding", "biases")
VIRTUAL = 20  # more than a block of the engines that serve them
Make = Callable[[str], PreTrainedModel]


def write_every_kind(
    home: Path, architecture: str = "llama", make: Make = tiny, *, start: int = VOCAB
) -> dict[str, Path]:
    """Write an adapter of each kind over one base. start: the id of the first new token."""
    homes = {name: home / name for name in KINDS}
    own = {"rank": 2, "targets": "attention"}
    write_adapter(homes["dora"], architecture, seed=2, make=make, **own, dora=True)
    positions = ["wpe"] if architecture == "gpt2" else []
    targets = targets_named(make(architecture), "everything") + positions
    more = {"rank": 2, "targets": targets}
    write_adapter(homes["embedding"], architecture, seed=4, make=make, **more)
    model, larger = make(architecture), tokenizer(start)
    with_new_tokens(model, larger)
    shake(veneer.attach(model, veneer.LoRA(**own)), size=0.3)
    veneer.save(model, homes["tokens"], tokenizer=larger)
    for method in ("prompt", "prefix"):
        model = veneer.attach(make(architecture), veneer.Method(method, virtual_tokens=VIRTUAL))
        veneer.save(shake(model, seed=4, size=0.3), homes[method])
    model = shake(veneer.attach(make(architecture), veneer.LoRA(**own)), size=0.3)
    ends, state = Ends.of(model), capture(model)
    changed = {
        path: _moved(module.weight)
        for path, module in ((ends.embedding_path, ends.embedding), (ends.head_path, ends.head))
    }
    weights = {f"{path}.weight": weight for path, weight in changed.items()}
    write(replace(state, modules_to_save=weights), homes["modules"])
    ids = (7, 30, 9)
    rows = {path: StoredTokens(ids, weight[list(ids)]) for path, weight in changed.items()}
    write(replace(state, trained_tokens=rows), homes["rows"])
    write(_with_biases(model, state), homes["biases"])
    return homes


def _with_biases(model: PreTrainedModel, state: AdapterState) -> AdapterState:
    """Return an adapter that has a lora_bias, and biases in place of all that linear layers of the
    base have."""
    linear = {layer.path: layer.module for layer in adaptable_layers(model) if layer.is_linear}
    tensors = dict(state.tensors)
    for layer in state.layers():
        tensors[f"{layer.path}.lora_bias"] = _moved(torch.zeros(len(layer.B)))
    biases = {
        f"{path}.bias": _moved(bias)
        for path, module in linear.items()
        if (bias := getattr(getattr(module, "original", module), "bias", None)) is not None
    }
    return replace(state, tensors=tensors, modules_to_save=biases)


def installed(base: Any, home: Path | None) -> PreTrainedModel:
    """Return a base's model, and its tokenizer, with an adapter put onto both."""
    model: PreTrainedModel = base.model
    if home is not None:
        veneer.load(model, home, tokenizer=base.tokenizer)
    return model


def _moved(weight: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(8)
    return weight.detach() + 0.3 * torch.randn(weight.shape, generator=generator)
