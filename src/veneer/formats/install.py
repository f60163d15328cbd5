"""Put an AdapterState onto a model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from veneer.adapter.active import active_adapters_of
from veneer.adapter.adapter import Adapter
from veneer.adapter.attach import attach_adapter, attach_method, check_name
from veneer.adapter.config import LoRA
from veneer.adapter.new_tokens import attach_token_rows, extend_tokenizer
from veneer.adapter.tokens import TrainedTokens
from veneer.adapter.unfreeze import replaced_weights, unfreeze
from veneer.adapter.virtual import stored_virtual_tokens
from veneer.errors import AdapterError, joined
from veneer.formats.state import AdapterState, StoredLayer, StoredTokens
from veneer.formats.validate import shared_tokens, validate
from veneer.models.block_buffers import whole
from veneer.models.score import SCORE_WEIGHT, add_score, is_own


def install(
    model: PreTrainedModel,
    state: AdapterState,
    *,
    name: str = "default",
    tokenizer: PreTrainedTokenizerBase | None = None,
    force: bool = False,
) -> None:
    """Install a stored adapter on `model`, frozen and in use; `tokenizer` gets its new tokens.

    Raises AdapterError with everything that `validate` finds.
    """
    check_name(model, name)
    if problems := validate(model, state, tokenizer, force=force):
        raise AdapterError(f"This adapter does not fit the model: {joined(problems)}.")
    if SCORE_WEIGHT in state.modules_to_save and not is_own(model):
        add_score(model)
    if isinstance(state.config, LoRA):
        attach_adapter(
            model,
            name,
            state.config,
            layer_adapters(state, state.config),
            tokens=_trained_tokens(model, state.trained_tokens),
            modules_to_save=state.modules_to_save,
        )
    elif not state.config.replaces_weights:
        attach_method(model, name, state.config, stored_virtual_tokens(state.config, state.tensors))
    else:
        unfreeze(model, state.config)
        with torch.no_grad():
            for key, weight in replaced_weights(model, state.config).items():
                weight.copy_(state.tensors[key])
        attach_method(model, name, state.config)
    active_adapters_of(model).notes[name] = state.training
    model.requires_grad_(False)
    if (new := state.new_tokens) is not None:
        attach_token_rows(model, new.tokens, new.embedding, new.head, start=new.start)
        model.requires_grad_(False)
        if tokenizer is not None:
            extend_tokenizer(tokenizer, new.tokens)


def layer_adapters(state: AdapterState, config: LoRA) -> dict[str, Adapter]:
    """Return the float32 adapter of each stored layer, by path."""
    return {layer.path: _adapter(layer, config) for layer in state.layers()}


def _adapter(layer: StoredLayer, config: LoRA) -> Adapter:
    start = layer.start
    return Adapter(
        _wide(layer.A.flatten(1) if layer.A.ndim == 4 else layer.A),
        _wide(layer.B),
        scaling=config.scaling_of(layer.path),
        dropout=0.0 if layer.is_embedding else config.dropout,
        magnitude=None if layer.magnitude is None else _wide(layer.magnitude),
        bias=None if layer.bias is None else _wide(layer.bias),
        start=None if start is None else (_wide(start[0]), _wide(start[1])),
    )


def _trained_tokens(
    model: PreTrainedModel, stored_tokens: Mapping[str, StoredTokens]
) -> dict[str, TrainedTokens]:
    """Return the trained rows for embedding and head, by path.

    A tied head gets the embedding's rows, unless it has rows of its own.
    """
    by_path: dict[str, TrainedTokens] = {}
    for path, tokens in stored_tokens.items():
        if tokens.rows is not None:
            module = model.get_submodule(path)
            weight: Tensor = module.weight  # type: ignore[assignment]
            ids = torch.tensor(tokens.ids, device=weight.device)
            rows = tokens.rows.to(weight.device)
            with whole(module):
                by_path[path] = TrainedTokens(ids, rows, weight[ids], vocab=len(weight))
    for head, embedding in shared_tokens(model, stored_tokens).items():
        by_path[head] = by_path[embedding]
    return by_path


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32)
