"""Starts of A and B that need more than the weight: its gradient, or its quantization error."""

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
from veneer.models.block_buffers import whole
from veneer.models.load import open_base
from veneer.quant.weight import QuantizedLinear

NOT_FINITE = (
    "LoRA-GA starts from the gradient of the first rows, which is not finite; take cleaner rows, "
    "or another --init."
)


def start_from_gradients(
    model: nn.Module,
    loss: Callable[[], Tensor],
    *,
    add_up: Callable[[Tensor], None] | None = None,
) -> None:
    """Start the adapters in use that ask for `lora_ga` from the gradient of `loss()`, in place.

    The model's outputs stay the base's. `loss` must call each adapted layer by its own
    forward. One gradient of a whole weight is held at a time, beside the head's, which comes in
    several summands. add_up: adds what other processes have to a tensor, where `loss` is of this
    one's tokens alone. Raises TrainingError where the loss or a gradient is not finite, ConfigError
    where another layer is used several times.
    """
    waiting = dict(_waiting(model))
    if not waiting:
        return

    def forward_hook(layer: LoRALinear, args: tuple[Tensor], y: Tensor) -> None:
        x = args[0].detach().flatten(0, -2)  # (tokens, in)
        y.register_hook(lambda dy: take(layer, dy.flatten(0, -2).T @ x))

    def take(layer: LoRALinear, gradient: Tensor) -> None:
        if layer is head:
            head_gradient.append(head_gradient.pop() + gradient if head_gradient else gradient)
        elif starts.keys() & set(waiting[layer]):
            raise ConfigError(
                "lora_ga needs layers that are used once in a pass; take another init."
            )
        else:
            decompose(layer, gradient)

    def decompose(layer: LoRALinear, gradient: Tensor) -> None:
        if add_up is not None:
            add_up(gradient)
        if not bool(torch.isfinite(gradient).all()):
            raise TrainingError(NOT_FINITE)
        for adapter in waiting[layer]:
            starts[adapter] = from_gradient(gradient, adapter.rank, adapter.scaling)

    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    head_gradient: list[Tensor] = []  # the sum so far, if any
    starts: dict[Adapter, Factors] = {}
    hooks = [layer.register_forward_hook(forward_hook) for layer in waiting]
    try:
        total = loss()
    finally:
        for hook in hooks:
            hook.remove()
    whole = total.detach().clone()
    if add_up is not None:
        add_up(whole)
    if not bool(torch.isfinite(whole)):
        raise TrainingError(NOT_FINITE)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    torch.autograd.grad(total, trained, allow_unused=True)
    if add_up is not None and head in waiting and not head_gradient:  # no label here, but elsewhere
        W = head.base_weight
        head_gradient.append(torch.zeros(*W.shape, dtype=W.dtype, device=total.device))
    for gradient in head_gradient:
        decompose(head, gradient)
    # Only now, because the backward pass needed A and B. Without a gradient they stay as they are.
    for adapter in chain.from_iterable(waiting.values()):
        adapter.start_at(*starts.get(adapter, (adapter.lora_A, adapter.lora_B)))


def start_from_rounding(
    model: PreTrainedModel, name: str, generator: torch.Generator | None
) -> None:
    """Start the adapter called `name` as the quantization error, cut to its rank, in place:
    W ≈ Ŵ + s B A (LoftQ, Li et al. 2023, section 3, with a fixed Ŵ).

    The base's own weights are read again, one at a time. Raises ConfigError where the model does
    not say where they are, ModelError where there are none.
    """
    if not model.config._name_or_path:
        raise ConfigError(
            "loftq reads the base as it was before quantizing; load it from a directory or the hub."
        )
    source, _, _ = open_base(model.config._name_or_path)
    for path, layer in lora_layers(model):
        if not isinstance(layer, AdaptedLayer) or name not in layer.adapters:
            continue
        if not isinstance(layer.original, QuantizedLinear):
            continue
        weight = source.read(f"{path}.weight").to(layer.base_weight.device, torch.float32)
        W = weight.T if layer.original.transposed else weight
        adapter: Any = layer.adapters[name]
        with whole(layer):
            error = W - layer.dense_base_weight.to(torch.float32)
        A, B = nearest_factors(error, adapter.rank, adapter.scaling, generator)
        with torch.no_grad():
            adapter.lora_A.copy_(A)
            adapter.lora_B.copy_(B)
        if adapter.magnitude is not None:
            with whole(layer):
                layer.start_magnitude(adapter)


def _waiting(model: nn.Module) -> Iterator[tuple[LoRALinear, list[Adapter]]]:
    """Yield layers with those adapters in use that have yet to start from a gradient."""
    active_adapters = active_adapters_of(model)
    configs = {name: active_adapters.configs[name] for name in active_adapters.weights}
    names = [n for n, c in configs.items() if isinstance(c, LoRA) and c.init == "lora_ga"]
    for _, layer in lora_layers(model):
        adapters = [layer.adapters[name] for name in names if name in layer.adapters]
        unstarted = [a for a in adapters if isinstance(a, Adapter) and a.start is None]
        if unstarted and isinstance(layer, LoRALinear):
            yield layer, unstarted
