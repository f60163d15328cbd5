"""Adapters that train beside each other over one base."""

from __future__ import annotations

from torch import nn

from veneer.adapter.active import active_adapters_of
from veneer.adapter.adapter import Adapter
from veneer.adapter.embedding import LoRAEmbedding
from veneer.adapter.layers import lora_layers
from veneer.adapter.linear import LoRALinear
from veneer.adapter.method import Method
from veneer.adapter.parameters import AdaptedParameter


def why_alone_of(model: nn.Module, name: str) -> str | None:
    """Return why an adapter cannot act on some tokens of a batch alone in training, or None."""
    active_adapters = active_adapters_of(model)
    config = active_adapters.configs[name]
    if isinstance(config, Method):
        return f"{config.method} has no low-rank factors"
    if name in active_adapters.modules_to_save:
        return "it has modules to save"
    for path, layer in lora_layers(model):
        if name in layer.tokens:
            return f"it trains single tokens of {path}"
        if name not in layer.adapters:
            continue
        if isinstance(layer, AdaptedParameter):
            if why := layer.why_not_by_segments():
                return f"it changes {path}: {why}"
        elif not isinstance(layer, LoRALinear | LoRAEmbedding):
            return f"{path} is a convolution"
        adapter = layer.adapters[name]
        assert isinstance(adapter, Adapter)
        if adapter.lora_bias is not None:
            return f"it has a bias of its own on {path}"
    return None
