"""Train weights of the base itself: all of them, or the last blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from veneer.adapter.layers import lora_layers
from veneer.adapter.method import Method
from veneer.adapter.virtual_forward import virtual_tokens_of
from veneer.errors import AdapterError, ConfigError
from veneer.models.block_buffers import passes_of
from veneer.models.blocks import decoder_layers
from veneer.models.description import is_norm
from veneer.models.fingerprint import base_parameters, fingerprint
from veneer.quant.stack import quantized_modules


def unfreeze(model: PreTrainedModel, config: Method) -> None:
    """Let the weights train that `config` names, and no others, in place.

    Raises ConfigError where the model has no such blocks or is quantized, AdapterError where
    adapters are attached: their base would change.
    """
    if quantized_modules(model):
        raise ConfigError(
            f"{config.method} trains weights, which quantized ones cannot; leave bits out, or give "
            "bits=16 for a file's own blocks."
        )
    if (passes := passes_of(model)) is not None:
        raise ConfigError(
            f"{config.method} trains weights of the base, but {passes.why_not_whole}."
        )
    if next(lora_layers(model), None) is not None or virtual_tokens_of(model) is not None:
        raise AdapterError(
            f"{config.method} would change the base of the adapters that are attached."
        )
    trained = replaced_weights(model, config)
    # The fingerprint of the base as it was, before its weights change.
    model.veneer_marks = fingerprint(model)  # type: ignore[assignment]
    model.requires_grad_(False)
    for weight in trained.values():
        weight.requires_grad_(True)


def replaced_weights(model: PreTrainedModel, config: Method) -> Mapping[str, Any]:
    """Return the base's weights that `config` trains, by path.

    freeze: the last blocks; with `train_norms` all norms; with `train_head` the head. Raises
    ConfigError where there are fewer blocks.
    """
    weights = base_parameters(model)
    if config.method == "full":
        return weights
    assert config.trained_blocks is not None
    blocks = decoder_layers(model)
    if blocks is None or config.trained_blocks > len(blocks):
        there = "a model whose blocks are not recognised" if blocks is None else len(blocks)
        raise ConfigError(f"freeze cannot train {config.trained_blocks} blocks of {there}.")
    modules: list[nn.Module | None] = list(blocks[-config.trained_blocks :])
    if config.train_norms:
        modules += [module for module in model.modules() if is_norm(module)]
    if config.train_head:
        modules.append(model.get_output_embeddings())
    trained = {id(w) for module in modules if module is not None for w in module.parameters()}
    return {path: weight for path, weight in weights.items() if id(weight) in trained}
