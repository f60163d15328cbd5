"""Rows of embedding and head that adapters have for themselves, where each row of a batch has its
own adapters: instead of the base's rows, and for tokens that the base does not have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from veneer.adapter.active import active_adapters_of
from veneer.kernels.transfer import sent
from veneer.lowrank.update import RowUpdates


@dataclass(frozen=True, eq=False)
class OwnRows:
    """The rows of embedding and head that one adapter has for itself.

    vocab, size: logits of a token, of the base and with the adapter. places (ids,): which of the
    rows `embedding` (n, dim) each id has, -1 for the base's own; ids from `size` on are those of a
    prompt's virtual tokens. head (m, dim), bias (m,): the rows that give the logits `head_ids`
    (m,).
    """

    vocab: int
    size: int
    places: Tensor | None = None
    embedding: Tensor | None = None
    head_ids: Tensor | None = None
    head: Tensor | None = None
    bias: Tensor | None = None


def tensors_of(own: OwnRows) -> dict[str, Tensor]:
    """Return the tensors of own rows, by the names of their fields."""
    return {name: x for name, x in vars(own).items() if isinstance(x, Tensor)}


@dataclass(frozen=True, eq=False)
class BatchUpdates(RowUpdates):
    """Which adapters act on each row of a batch, with the rows that each mix has for itself."""

    own: Sequence[OwnRows | None] = ()
    # By device, so that a step that is recorded as a graph sends nothing.
    _sizes: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    @property
    def vocab(self) -> int | None:
        """Logits of a token by the base, None where no mix has rows of its own."""
        return next((own.vocab for own in self.own if own is not None), None)

    def embedded(self, ids: Tensor, y: Tensor) -> Tensor:
        """Return embeddings y (rows, tokens, dim) of ids (rows, tokens) with own rows in them."""
        numbers = self.numbers_on(y.device)[:, None]
        for number, own in enumerate(self.own):
            if own is None or own.embedding is None:
                continue
            assert own.places is not None
            place = own.places[ids.clamp(max=len(own.places) - 1)]
            is_own = (numbers == number) & (place >= 0)
            rows = F.embedding(place.clamp(min=0), own.embedding)
            y = torch.where(is_own[..., None], rows.to(y.dtype), y)
        return y

    def with_own_logits(self, x: Tensor, z: Tensor) -> Tensor:
        """Return what the head gives for x (rows, tokens, dim), z (rows, tokens, vocab), with the
        logits of own rows in it; (rows, tokens, size) with the largest size of all."""
        numbers = self.numbers_on(z.device)[:, None, None]
        z = padded(z, max(own.size for own in self.own if own is not None))
        for number, own in enumerate(self.own):
            if own is None or own.head is None:
                continue
            assert own.head_ids is not None
            logits = F.linear(x.to(own.head.dtype), own.head, own.bias).to(z.dtype)
            changed = z.index_copy(-1, own.head_ids, logits)
            z = torch.where(numbers == number, changed, z)
        return z

    def limited(self, logits: Tensor) -> Tensor:
        """Return logits (rows, tokens, size), -∞ for the tokens that a row's adapter has not."""
        if self.vocab is None or logits.shape[-1] == self.vocab:
            return logits
        if (sizes := self._sizes.get(logits.device)) is None:
            each = [self.vocab, *(self.vocab if own is None else own.size for own in self.own)]
            sizes = self._sizes[logits.device] = sent(each, logits.device)
        ends = sizes.index_select(0, self.numbers_on(logits.device) + 1)
        columns = torch.arange(logits.shape[-1], device=logits.device)
        return logits.masked_fill(columns >= ends[:, None, None], -torch.inf)


def padded(logits: Tensor, size: int) -> Tensor:
    """Return logits (..., vocab) as (..., size), -∞ for the tokens that are more."""
    more = size - logits.shape[-1]
    return F.pad(logits, (0, more), value=-torch.inf) if more > 0 else logits


def joined(logits: Sequence[Tensor]) -> Tensor:
    """Return logits (rows, vocab) of different vocabularies as one matrix."""
    size = max(each.shape[-1] for each in logits)
    return torch.cat([padded(each, size) for each in logits])


@contextmanager
def acting(model: PreTrainedModel, updates: RowUpdates | None) -> Iterator[None]:
    """Let each row of a batch have its own adapters while the context lasts. None: as before."""
    active_adapters = active_adapters_of(model)
    active_adapters.row_updates = updates
    hooks: Sequence[RemovableHandle] = ()
    if isinstance(updates, BatchUpdates) and updates.vocab is not None:
        hooks = _hooks(model, updates, updates.vocab)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        active_adapters.row_updates = None


def _hooks(model: PreTrainedModel, updates: BatchUpdates, vocab: int) -> list[RemovableHandle]:
    """Let embedding and head give the own rows of adapters too."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, nn.Module)
    assert isinstance(head, nn.Module)
    asked: list[Tensor] = []

    def before(_module: nn.Module, args: Any) -> Any:
        asked.append(args[0])
        return args[0].clamp(max=vocab - 1), *args[1:]

    def after(_module: nn.Module, _args: Any, y: Tensor) -> Tensor:
        return updates.embedded(asked.pop(), y)

    def behind(_module: nn.Module, args: Any, z: Tensor) -> Tensor:
        return updates.with_own_logits(args[0], z)

    return [
        embedding.register_forward_pre_hook(before),
        embedding.register_forward_hook(after),
        head.register_forward_hook(behind),
    ]
