"""What an adapter has for itself of embedding and head, and before each text: new tokens, modules
to save, single tokens' rows, virtual tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.adapter.method import Method
from veneer.adapter.modules_to_save import owner_of
from veneer.adapter.own_rows import OwnRows
from veneer.adapter.targets import adaptable_layers
from veneer.adapter.weight_access import Place
from veneer.adapter.wrapper import unwrapped
from veneer.formats.state import AdapterState
from veneer.formats.validate import shared_tokens

Rows = tuple[Tensor, Tensor]  # ids (rows,), and their rows (rows, dim)


@dataclass(frozen=True)
class Ends:
    """A model's embedding and head without adapters, and their paths."""

    embedding: nn.Module
    head: nn.Module
    embedding_path: str
    head_path: str

    @property
    def weights(self) -> tuple[str, str]:
        """The paths of both weights."""
        return f"{self.embedding_path}.weight", f"{self.head_path}.weight"

    @classmethod
    def of(cls, model: PreTrainedModel) -> Ends:
        modules = (model.get_input_embeddings(), model.get_output_embeddings())
        paths = {id(module): path for path, module in model.named_modules()}
        return cls(*map(unwrapped, modules), *(paths[id(module)] for module in modules))


def vocab_of(model: PreTrainedModel) -> int:
    """Return how many logits the base gives for a token."""
    vocab: int = model.config.get_text_config().vocab_size
    return vocab


def size_of(state: AdapterState, vocab: int) -> int:
    """Return how many logits a token has with an adapter, over a base of `vocab`."""
    new = state.new_tokens
    return vocab if new is None else max(vocab, new.start + len(new.tokens))


def virtual_count(state: AdapterState) -> int:
    """Return how many virtual tokens stand before each text."""
    config = state.config
    return (config.virtual_tokens or 0) if isinstance(config, Method) else 0


def shared_by_all(model: PreTrainedModel, state: AdapterState) -> list[str]:
    """Return the weights of the base that an adapter replaces, and that cannot differ from row to
    row: all but those of embedding and head, and biases of linear layers."""
    if not state.modules_to_save:
        return []
    ends = Ends.of(model)
    own = {*ends.weights} | {f"{path}.bias" for path in biases_of_layers(model, state)}
    if f"{ends.head_path}.weight" in state.modules_to_save:
        own.add(f"{ends.head_path}.bias")
    return sorted(state.modules_to_save.keys() - own)


def biases_of_layers(model: PreTrainedModel, state: AdapterState) -> dict[str, Tensor]:
    """Return the biases (out,) that an adapter has in place of those of linear layers, by path; not
    that of a head that it replaces, nor of a layer whose weight the model's code computes with
    itself, so that nothing of a row could come between."""
    biases = {
        name.removesuffix(".bias"): tensor
        for name, tensor in state.modules_to_save.items()
        if name.endswith(".bias")
    }
    if not biases:
        return {}
    linear = {layer.path for layer in adaptable_layers(model) if layer.is_linear}
    head = Ends.of(model).head_path
    if f"{head}.weight" in state.modules_to_save:
        linear.discard(head)
    return {
        path: bias
        for path, bias in biases.items()
        if path in linear and not _is_computed_by_code(model, path)
    }


def _is_computed_by_code(model: PreTrainedModel, path: str) -> bool:
    owner, name = owner_of(model, path)
    return Place(type(owner), name).is_never_called


def why_not_mixed(state: AdapterState) -> str:
    """Return why an adapter acts alone or not at all, or nothing where it can be mixed."""
    if virtual_count(state):
        return "has virtual tokens"
    if state.modules_to_save or state.trained_tokens:
        return "replaces weights of the base"
    return ""


def own_rows(model: PreTrainedModel, state: AdapterState) -> OwnRows | None:
    """Return the rows that an adapter has for itself, None where it has none."""
    vocab, virtual, ends = vocab_of(model), virtual_count(state), Ends.of(model)
    replaces = not state.modules_to_save.keys().isdisjoint(ends.weights)
    has_rows = state.new_tokens is not None or replaces or state.trained_tokens
    if not has_rows and not virtual:
        return None
    size = size_of(state, vocab)
    embedding, head = list(_of_embedding(model, state, ends)), list(_of_head(model, state, ends))
    options: dict[str, Any] = {}
    if embedding:
        ids, rows = _last_of_each(embedding)
        places = torch.full((size + virtual,), -1)
        places[ids] = torch.arange(len(ids))
        options |= {"places": places, "embedding": rows}
    if head:
        options["head_ids"], options["head"] = _last_of_each(head)
        options["bias"] = _bias(state, ends, options["head_ids"])
    dtype, device = model.dtype, model.device
    moved = {
        name: None if x is None else x.to(device, dtype if x.is_floating_point() else x.dtype)
        for name, x in options.items()
    }
    return OwnRows(vocab, size, **moved)


def _of_embedding(model: PreTrainedModel, state: AdapterState, ends: Ends) -> Iterator[Rows]:
    scale = getattr(ends.embedding, "embed_scale", 1.0)  # Gemma's multiply their rows

    def scaled(rows: Tensor) -> Tensor:
        return (rows.to(model.device, model.dtype) * scale).to(model.dtype)

    path = ends.embedding_path
    if (weight := state.modules_to_save.get(f"{path}.weight")) is not None:
        yield torch.arange(len(weight)), scaled(weight)
    if (tokens := state.trained_tokens.get(path)) is not None and tokens.rows is not None:
        yield torch.tensor(tokens.ids), scaled(tokens.rows)
    if (new := state.new_tokens) is not None:
        yield new.start + torch.arange(len(new.tokens)), scaled(new.embedding)
    if (prompt := state.tensors.get("prompt")) is not None and virtual_count(state):
        size = size_of(state, vocab_of(model))
        # They are what the embedding gives, not its rows.
        yield size + torch.arange(len(prompt)), prompt.to(model.device, model.dtype)


def _of_head(model: PreTrainedModel, state: AdapterState, ends: Ends) -> Iterator[Rows]:
    path = ends.head_path
    if (weight := state.modules_to_save.get(f"{path}.weight")) is not None:
        yield torch.arange(len(weight)), weight.to(model.dtype)
    shared = shared_tokens(model, state.trained_tokens).get(path, path)
    if (tokens := state.trained_tokens.get(shared)) is not None and tokens.rows is not None:
        yield torch.tensor(tokens.ids), tokens.rows.to(model.dtype)
    if (new := state.new_tokens) is not None:
        rows = new.embedding if new.head is None else new.head
        yield new.start + torch.arange(len(new.tokens)), rows.to(model.dtype)


def _bias(state: AdapterState, ends: Ends, ids: Tensor) -> Tensor | None:
    """Return the head's bias of tokens (rows,); new tokens have none. None where no token has."""
    own = state.modules_to_save.get(f"{ends.head_path}.bias", ends.head.bias)
    if own is None:
        return None
    assert isinstance(own, Tensor)
    bias = torch.zeros(len(ids), dtype=own.dtype)
    new = state.new_tokens
    first, last = (0, 0) if new is None else (new.start, new.start + len(new.tokens))
    is_base = (ids < len(own)) & ~((ids >= first) & (ids < last))
    bias[is_base] = own.detach().cpu()[ids[is_base]]
    return bias


def _last_of_each(groups: Sequence[Rows]) -> Rows:
    """Return rows of several groups as one; of an id that several have, the last one's."""
    ids = torch.cat([ids for ids, _ in groups])
    row_of = {token: row for row, token in enumerate(ids.tolist())}
    rows = torch.tensor(list(row_of.values()))
    return ids[rows], torch.cat([own for _, own in groups])[rows]
