"""Which of the attached adapters act: on whole batches, or row by row."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from veneer.adapter.active import active_adapters_of
from veneer.adapter.config import LoRA
from veneer.adapter.embedding import LoRAEmbedding
from veneer.adapter.layers import AdaptedLayer, lora_layers
from veneer.adapter.linear import LoRALinear
from veneer.adapter.method import Method, is_virtual
from veneer.adapter.modules_to_save import switch_modules_to_save
from veneer.adapter.parameters import AdaptedParameter
from veneer.errors import AdapterError
from veneer.lowrank.update import LowRankUpdate, RowUpdates


def adapters(model: nn.Module) -> dict[str, LoRA | Method]:
    """Return the attached adapters, by name, with their configurations."""
    return dict(active_adapters_of(model).configs)


def in_use(model: nn.Module) -> dict[str, float]:
    """Return the names of the adapters that act, with their weights."""
    return dict(active_adapters_of(model).weights)


def replacing(model: nn.Module) -> list[str]:
    """Return the names of what trained the base's own weights, and so cannot be switched off."""
    configs = adapters(model).items()
    return [name for name, c in configs if isinstance(c, Method) and c.replaces_weights]


def use(model: nn.Module, which: str | Mapping[str, float] | None) -> None:
    """Let adapters act: one by its name, several as a mapping to weights, or none with None.

    Raises AdapterError for a name that is not attached, for a mix with virtual tokens or with
    modules to save of an adapted layer, and where weights of the base itself were trained.
    """
    active_adapters = active_adapters_of(model)
    weights = active_adapters.checked(which)
    virtual = [name for name in weights if is_virtual(active_adapters.configs[name])]
    if virtual and weights != {virtual[0]: 1.0}:
        raise AdapterError(
            f"{', '.join(virtual)} {'has' if len(virtual) == 1 else 'have'} virtual tokens, which "
            "act alone or not at all, and cannot be mixed."
        )
    if names := [name for name in replacing(model) if weights.get(name) != 1.0]:
        raise AdapterError(
            f"{', '.join(names)} replaced weights of the base, and cannot be switched off; load "
            "the base anew."
        )
    before = active_adapters.weights
    active_adapters.use(weights)
    try:
        switch_modules_to_save(model)
    except AdapterError:
        active_adapters.weights = before
        raise


@contextmanager
def base_alone(model: nn.Module) -> Iterator[None]:
    """Let no adapter act while the context lasts; weights that trained themselves are the base."""
    with acting(model, dict.fromkeys(replacing(model), 1.0)):
        yield


@contextmanager
def acting(model: nn.Module, which: str | Mapping[str, float] | None) -> Iterator[None]:
    """Let these adapters act while the context lasts, as `use` takes them."""
    before = in_use(model)
    use(model, which)
    try:
        yield
    finally:
        use(model, before)


def use_rows(model: nn.Module, rows: Sequence[str | Mapping[str, float] | None]) -> None:
    """Let each row of the next batches have adapters of its own: a name, names with weights, or
    None for the base alone. `use` ends it. For inference, with (rows, tokens) inputs.

    Raises AdapterError for a name that is not attached, or whose adapter is more than low-rank
    factors of linear layers, embeddings and recognised experts.
    """
    active_adapters = active_adapters_of(model)
    mixes = [tuple(active_adapters.checked(which).items()) for which in rows]
    names = {name for mix in mixes for name, _ in mix}
    if unsuited := sorted(name for name in names if not _acts_by_rows(model, name)):
        raise AdapterError(
            f"{', '.join(unsuited)} has no low-rank factors, or more than these (an invocation, "
            "say), and acts on whole batches."
        )
    different = list(dict.fromkeys(mix for mix in mixes if mix))
    updates: list[dict[Hashable, LowRankUpdate]] = [{} for _ in different]
    with torch.no_grad():
        for _, layer in lora_layers(model):
            for mix, by_layer in zip(different, updates, strict=True):
                if (pairs := layer.named(mix)) and isinstance(
                    layer, AdaptedLayer | AdaptedParameter
                ):
                    by_layer[layer] = layer.low_rank_update(pairs, layer.compute_dtype)
    numbers = tuple(different.index(mix) if mix else None for mix in mixes)
    active_adapters.row_updates = RowUpdates(updates, numbers)


def _acts_by_rows(model: nn.Module, name: str) -> bool:
    """Return whether an adapter is no more than what a row of a batch can have alone."""
    active_adapters = active_adapters_of(model)
    is_method = isinstance(active_adapters.configs[name], Method)
    by_position = name in active_adapters.acts_on
    if is_method or by_position or name in active_adapters.modules_to_save:
        return False
    for _, layer in lora_layers(model):
        if name in layer.tokens:
            return False
        if name in layer.adapters:
            if isinstance(layer, AdaptedParameter):
                suited = layer.acts_by_rows()
            else:
                suited = isinstance(layer, LoRALinear | LoRAEmbedding)
            if not suited or layer.adapters[name].lora_bias is not None:
                return False
    return True
