"""The head of a reward model as a module that an adapter brings its own weight for."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from veneer.adapter.active import active_adapters_of
from veneer.adapter.use import in_use, use
from veneer.models.score import SCORE_WEIGHT, add_score, is_own, score_size


def attach_score(model: PreTrainedModel, name: str, *, seed: int) -> None:
    """Give an adapter that acts a head of its own, which trains, unless it has one.

    It begins as transformers' heads do: normal, with the model's `initializer_range`.
    """
    weights = active_adapters_of(model).modules_to_save.get(name, {})
    if SCORE_WEIGHT in weights:
        return
    add_score(model)
    spread = float(getattr(model.config.get_text_config(), "initializer_range", 0.02))
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(1, score_size(model), generator=generator) * spread
    weight = nn.Parameter(start.to(model.device, model.dtype), True)
    active_adapters_of(model).modules_to_save[name] = {**weights, SCORE_WEIGHT: weight}
    use(model, in_use(model))


def scores(model: nn.Module, name: str) -> bool:
    """Return whether an adapter is a reward model."""
    weights = active_adapters_of(model).modules_to_save.get(name, {})
    return SCORE_WEIGHT in weights and not is_own(model)
