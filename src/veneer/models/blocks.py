"""The decoder of a model, and its list of layers."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel


def decoder_of(model: PreTrainedModel) -> Any:
    """Return the part of a model that makes hidden states of tokens.

    That is what transformers calls its decoder, except where it gives another part by that name:
    the head (ModernBERT), or the whole model (Mllama).
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    if not _holds(decoder, head):
        return decoder
    embedding = model.get_input_embeddings()
    others = (module for module in model.modules() if module is not embedding)
    fitting = (x for x in others if _holds(x, embedding) and not _holds(x, head))
    return next(fitting, decoder)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList | None:
    """Return the model's list of decoder layers, or None where it has no such list.

    It is as long as the configuration says, or the only list that lies in no other.
    """
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    decoder = decoder_of(model)
    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList)]
    if (layers := next((x for x in lists if len(x) == count), None)) is not None:
        return layers
    inner = {module for layers in lists for layer in layers for module in layer.modules()}
    outer = [layers for layers in lists if layers not in inner]
    return outer[0] if len(outer) == 1 else None


def _holds(module: nn.Module, inner: nn.Module | None) -> bool:
    return any(each is inner for each in module.modules())
