"""What an adapter consists of in a model, under the names that it is stored by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.adapter.active import active_adapters_of
from veneer.adapter.adapted import Adapted
from veneer.adapter.adapter import Adapter
from veneer.adapter.config import LoRA
from veneer.adapter.conv import LoRAConv2d
from veneer.adapter.embedding import LoRAEmbedding
from veneer.adapter.layers import lora_layers
from veneer.adapter.new_tokens import is_tied
from veneer.adapter.parameters import AdaptedParameter
from veneer.adapter.tokens import TrainedTokens

if TYPE_CHECKING:
    from veneer.formats.state import AdapterState, Tokens

LINEAR, EMBEDDING = ("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")
PARAMETER = ("lora_parameter_A", "lora_parameter_B")
MAGNITUDE, BIAS, START = "magnitude", "lora_bias", ("start_A", "start_B")
TOKENS = "token_rows"


def factors_of(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return the live A and B of each layer that the adapter called `name` lies on, and what else
    it has there, shaped as they are stored."""
    tensors: dict[str, Tensor] = {}
    for path, layer in lora_layers(model):
        if name in layer.adapters:
            part = layer.adapters[name]
            assert isinstance(part, Adapter)
            A = part.lora_A
            if isinstance(layer, LoRAConv2d):
                window = layer.original.weight.shape[1:]  # type: ignore[index]
                A = A.unflatten(1, window)
            values = (A, part.lora_B, part.magnitude, part.lora_bias, *(part.start or ()))
            keys = (*_names(layer), MAGNITUDE, BIAS, *START)
            for key, tensor in zip(keys, values, strict=False):
                if tensor is not None:
                    tensors[f"{path}.{key}"] = tensor
    return tensors


def saved_of(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Return the live weights that an adapter has in the place of the base's, by their paths."""
    return active_adapters_of(model).saved.get(name, {})


def tokens_of(model: nn.Module, name: str) -> dict[str, TrainedTokens]:
    """Return the live rows of single words, by the path of the embedding or head; those that both
    share, by the first."""
    found: dict[str, TrainedTokens] = {}
    for path, layer in lora_layers(model):
        if name in layer.tokens:
            tokens = layer.tokens[name]
            assert isinstance(tokens, TrainedTokens)
            if not any(tokens is other for other in found.values()):
                found[path] = tokens
    return found


def adapters_from(state: AdapterState, config: LoRA) -> dict[str, Adapter]:
    """Return a stored adapter's parts for each layer, float32."""
    parts = {}
    for layer in state.layers():
        A, B, magnitude, bias, A0, B0 = (
            None if tensor is None else tensor.to(torch.float32)
            for tensor in (
                layer.A.flatten(1) if layer.A.ndim == 4 else layer.A,
                layer.B,
                layer.magnitude,
                layer.bias,
                *(layer.start or (None, None)),
            )
        )
        assert A is not None
        assert B is not None
        parts[layer.path] = Adapter(
            A,
            B,
            scaling=config.scaling_of(layer.path),
            dropout=0.0 if layer.is_embedding else config.dropout,
            magnitude=magnitude,
            bias=bias,
            start=None if A0 is None or B0 is None else (A0, B0),
        )
    return parts


def tokens_from(model: PreTrainedModel, tokens: Mapping[str, Tokens]) -> dict[str, TrainedTokens]:
    """Return stored rows of single words for each layer that they lie on.

    Where embedding and head are one weight, rows of the embedding are the head's too, unless it
    has some of its own.
    """
    laid: dict[str, TrainedTokens] = {}
    for path, one in tokens.items():
        if one.rows is not None:
            weight: Tensor = model.get_submodule(path).weight  # type: ignore[assignment]
            ids = torch.tensor(one.ids, device=weight.device)
            base = weight[ids]
            rows = one.rows.to(weight.device)
            laid[path] = TrainedTokens(ids, rows, base, vocab=len(weight))
    for path, shared in shared_tokens(model, tokens).items():
        laid[path] = laid[shared]
    return laid


def shared_tokens(model: PreTrainedModel, tokens: Mapping[str, Tokens]) -> dict[str, str]:
    """Return the head's path to the embedding's, where its rows are those of the embedding."""
    if not tokens:
        return {}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is None or head is None or not is_tied(embedding, head):
        return {}
    paths = {id(module): path for path, module in model.named_modules()}
    here, there = paths[id(embedding)], paths[id(head)]
    own = tokens.get(there)
    return {there: here} if here in tokens and (own is None or own.rows is None) else {}


def _names(layer: Adapted) -> tuple[str, str]:
    if isinstance(layer, AdaptedParameter):
        return PARAMETER
    return EMBEDDING if isinstance(layer, LoRAEmbedding) else LINEAR
