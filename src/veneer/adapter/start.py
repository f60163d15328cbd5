"""Starts that take more than the weight: its gradient, or what packing took from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.adapter.active import active_adapters_of
from veneer.adapter.adapter import Adapter
from veneer.adapter.config import LoRA
from veneer.adapter.layers import AdaptedLayer, lora_layers
from veneer.adapter.linear import LoRALinear
from veneer.errors import ConfigError, TrainingError
from veneer.lowrank.formula import Factors
from veneer.lowrank.initial import from_gradient, nearest_factors
from veneer.models.load import open_base
from veneer.quant.weight import quantized_layers

NOT_FINITE = (
    "LoRA-GA starts from the gradient of the first rows, which is not finite; take cleaner rows, "
    "or another --init."
)


def start_from_gradients(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    """Start the acting adapters that ask for `lora_ga` from the gradient of `loss()`, in place.

    The model still says what the base does. `loss` must compute each adapted layer by the layer's
    own forward. One gradient of a whole weight is held at a time, beside the head's, whose rows
    come in several parts. Raises TrainingError where the loss or a gradient is not finite,
    ConfigError where another layer is used several times.
    """
    waiting = dict(_waiting(model))
    if not waiting:
        return

    def note(layer: LoRALinear, args: tuple[Tensor], y: Tensor) -> None:
        x = args[0].detach().flatten(0, -2)  # (tokens, in)
        y.register_hook(lambda dy: add(layer, dy.flatten(0, -2).T @ x))

    def add(layer: LoRALinear, gradient: Tensor) -> None:
        if layer is head:
            of_head.append(of_head.pop() + gradient if of_head else gradient)
        elif found.keys() & set(waiting[layer]):
            raise ConfigError(
                "lora_ga needs layers that are used once in a pass; take another init."
            )
        else:
            find(layer, gradient)

    def find(layer: LoRALinear, gradient: Tensor) -> None:
        if not bool(torch.isfinite(gradient).all()):
            raise TrainingError(NOT_FINITE)
        for adapter in waiting[layer]:
            found[adapter] = from_gradient(gradient, adapter.rank, adapter.scaling)

    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    of_head: list[Tensor] = []
    found: dict[Adapter, Factors] = {}
    hooks = [layer.register_forward_hook(note) for layer in waiting]
    try:
        total = loss()
    finally:
        for hook in hooks:
            hook.remove()
    if not bool(torch.isfinite(total)):
        raise TrainingError(NOT_FINITE)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    torch.autograd.grad(total, trained, allow_unused=True)
    for gradient in of_head:
        find(head, gradient)
    for adapter in chain.from_iterable(waiting.values()):
        # Not before, for the way back looked at them. Without a gradient, they start as they are.
        adapter.start_at(*found.get(adapter, (adapter.lora_A, adapter.lora_B)))


def start_from_rounding(
    model: PreTrainedModel, name: str, generator: torch.Generator | None
) -> None:
    """Start the adapter called `name` as what packing took from the base, as far as its rank can
    hold it, in place: W ≈ Ŵ + s B A (LoftQ, Li et al. 2023, section 3, with Ŵ as it is).

    The base's own weights are read again, one at a time. Raises ConfigError where the model names
    no place that they came from, ModelError where there are none.
    """
    packed = quantized_layers(model)
    if not model.config._name_or_path:
        raise ConfigError("loftq reads the base as it was before packing: load it from a place.")
    source, _, _ = open_base(model.config._name_or_path)
    for path, layer in lora_layers(model):
        if not isinstance(layer, AdaptedLayer) or name not in layer.adapters:
            continue
        if f"{path}.original" not in packed:
            continue
        weight = source.read(f"{path}.weight").to(layer.base_weight.device, torch.float32)
        own = weight.T if packed[f"{path}.original"].transposed else weight
        adapter: Any = layer.adapters[name]
        lost = own - layer.dense_base_weight.to(torch.float32)
        A, B = nearest_factors(lost, adapter.rank, adapter.scaling, generator)
        with torch.no_grad():
            adapter.lora_A.copy_(A)
            adapter.lora_B.copy_(B)
        if adapter.magnitude is not None:
            layer.start_magnitude(adapter)


def _waiting(model: nn.Module) -> Iterator[tuple[LoRALinear, list[Adapter]]]:
    """Yield layers with those of their acting adapters that have yet to start from a gradient."""
    active_adapters = active_adapters_of(model)
    acting = {name: active_adapters.configs[name] for name in active_adapters.weights}
    names = [n for n, c in acting.items() if isinstance(c, LoRA) and c.init == "lora_ga"]
    for _, layer in lora_layers(model):
        parts = [layer.adapters[name] for name in names if name in layer.adapters]
        found = [part for part in parts if isinstance(part, Adapter) and part.start is None]
        if found and isinstance(layer, LoRALinear):
            yield layer, found
