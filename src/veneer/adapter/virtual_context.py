"""How much of a model's context its virtual tokens take."""

from __future__ import annotations

from typing import Any

from torch import nn

from veneer.adapter.active import active_adapters_of
from veneer.adapter.method import Method
from veneer.errors import ConfigError
from veneer.models.context import own_context


def virtual_count(model: nn.Module) -> int:
    """Return how many virtual tokens act, and so how many positions of the context they take."""
    active_adapters = active_adapters_of(model)
    configs = [active_adapters.configs[name] for name in active_adapters.weights]
    return sum(config.virtual_tokens or 0 for config in configs if isinstance(config, Method))


def takes_padding(model: nn.Module, longest: int) -> bool:
    """Return whether rows of up to `longest` tokens may be padded on the left to share a batch."""
    count, window = virtual_count(model), attention_window(model)
    return not (count and window and count + longest > window)


def context_left(config: Any, count: int) -> int | None:
    """Return how many tokens fit into a model's context beside `count` virtual ones, by its config.

    None where the context has no end. Raises ConfigError where fewer than two are left.
    """
    context = own_context(config)
    if context is None:
        return None
    if context - count < 2:
        raise ConfigError(
            f"{count} virtual tokens leave no room in the model's context of {context:,}."
        )
    return context - count


def attention_window(model: Any) -> int | None:
    """Return how many positions back attention reaches, or None where it reaches all."""
    return getattr(model.config, "sliding_window", None)
