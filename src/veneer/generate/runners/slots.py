"""A model on a device that is not to wait: rows in fixed slots, steps as CUDA graphs.

A step is asked for before the tokens of the one before have come to the host: those stay on the
device too, in `newest`. For each step the host sends one small matrix, and it reads the tokens one
step late.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from veneer.adapter.own_rows import joined
from veneer.generate.runners.loaded import LoadedAdapter, row_updates
from veneer.generate.runners.runner import Chunk
from veneer.generate.slots import SlotModel
from veneer.kernels.graphs import NONE_HERE, Graphs, Tensors, length_for, size_for
from veneer.kernels.transfer import sent

log = logging.getLogger("veneer.generate")


class SlotRunner:
    """A runner over a model in slots. Raises NotInSlots for a model that does not suit them."""

    is_exact = False
    cut: int | None = None
    hidden = None

    def __init__(
        self, model: PreTrainedModel, slots: int, context: int, graphs: Graphs | None = None
    ) -> None:
        self.model = SlotModel(model, slots, context)
        self.graphs = Graphs.on(model.device) if graphs is None else graphs
        with torch.no_grad():
            self.newest = torch.zeros(slots, dtype=torch.long, device=model.device)
        self._adapters: tuple[LoadedAdapter, ...] = ()  # of the rows that decode, and earlier ones
        self._updates = row_updates(())

    @torch.no_grad()
    def step(self, chunks: Sequence[Chunk]) -> Tensor:
        decoding = [chunk for chunk in chunks if chunk.decoding]
        logits = [self._decode(decoding)] if decoding else []
        for chunk in chunks:
            if not chunk.decoding:  # always behind those that decode
                logits.append(
                    self.model.prefill(
                        *(chunk.slot, chunk.tokens, chunk.start),
                        keep=chunk.logits,
                        updates=row_updates([chunk.adapter]),
                    )
                )
        return joined(logits)

    @torch.no_grad()
    def take(self, slots: Sequence[int], tokens: Tensor) -> None:
        """Let tokens (rows,) of the device be the newest ones of slots."""
        self.newest.index_copy_(0, sent(slots, tokens.device), tokens)

    def block(self, slot: int, first: int, last: int) -> Tensor:
        return self.model.block(slot, first, last)

    def fill(self, slot: int, blocks: Sequence[Any]) -> None:
        self.model.fill(slot, blocks)

    def begin(self, slot: int, prefix: Tensor) -> None:
        self.fill(slot, [prefix])

    def copy(self, slot: int, other: int, length: int) -> None:
        self.fill(other, [self.block(slot, 0, length)])

    def free(self, slot: int) -> None:
        """Forget a slot's newest token, which may be one that only its adapter has: the slot is
        computed beside others. The next row writes over all else, and sees nothing of it."""
        self.newest[slot].zero_()

    def _decode(self, chunks: Sequence[Chunk]) -> Tensor:
        """Compute the newest token of each decoding row, and return the logits (rows, vocab)."""
        model, slots = self.model, [chunk.slot for chunk in chunks]
        most = max(chunk.start for chunk in chunks) + 1
        model.reserve(most)
        rows = size_for(max(slots) + 1, model.slots)
        seen = length_for(most, model.places)
        numbers = self._numbers([chunk.adapter for chunk in chunks])
        where = [[0] * rows, [model.unread] * rows, [-1] * rows]
        for chunk, number in zip(chunks, numbers, strict=True):
            for row, value in zip(where, (chunk.start, chunk.start, number), strict=True):
                row[chunk.slot] = value
        updates = self._updates

        def decode(inputs: Tensors) -> Tensors:
            # The newest tokens are read where they are, so that nobody copies them.
            logits = model.decode(self.newest[:rows], inputs["where"], seen, updates)
            return {"logits": logits}

        inputs = {"where": sent(where, model.device)}
        # The cache has moved where it has other places, be it for a row here or for a prompt.
        key = (rows, seen, model.places, self._adapters)
        logits = self.graphs(key, decode, inputs)["logits"]
        if self.graphs.why_not != NONE_HERE and (notice := self.graphs.notice()):
            log.warning(notice)
        if slots == list(range(rows)):
            return logits
        return logits.index_select(0, sent(slots, model.device))

    def _numbers(self, adapters: Sequence[LoadedAdapter | None]) -> list[int]:
        """Return the number of each row's adapter among those that graphs compute with, -1 for
        none. They stay the same, in the same order, while no other comes: other adapters are other
        addresses, and so another graph."""
        needed = list(dict.fromkeys(adapter for adapter in adapters if adapter is not None))
        if not {*needed} <= {*self._adapters}:
            both = [*self._adapters, *(each for each in needed if each not in self._adapters)]
            self._adapters = tuple(both if len(both) <= self.model.slots else needed)
            self._updates = row_updates(self._adapters)
        return [-1 if each is None else self._adapters.index(each) for each in adapters]
