"""The decoder blocks of a model, found by their number."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList | None:
    """Return the model's list of decoder layers, or None where it has no such list."""
    decoder: Any = model.get_decoder()
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = (module for module in decoder.modules() if isinstance(module, nn.ModuleList))
    return next((layers for layers in lists if len(layers) == count), None)
