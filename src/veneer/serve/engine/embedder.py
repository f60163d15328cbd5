"""Embeddings of texts by the model's own decoder, where a runner does not give what they need."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from veneer.adapter.own_rows import acting
from veneer.generate.runners.loaded import row_updates
from veneer.kernels.transfer import sent
from veneer.models.blocks import decoder_of
from veneer.serve.engine.row import Row


class Embedder:
    """Embeds one text at a time by the model's own decoder, a chunk of tokens a call, so that
    answers wait for one chunk at most. Nothing else is computed with it, and so changes it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._row: Row | None = None
        self._cache = DynamicCache()

    @torch.inference_mode()
    def advance(self, row: Row, size: int) -> bool:
        """Compute up to `size` more tokens of a row, and return whether it has its embedding now,
        (dim,)."""
        if row is not self._row:
            self._row, self._cache = row, DynamicCache()
            row.computed, row.pooled = self._begin(row), None
        tokens, first = row.tokens, row.computed
        chunk = tokens[first : row.until(first, first + size)]
        device = self.model.device
        positions = torch.arange(first, first + len(chunk), device=device)[None]
        decoder: Any = decoder_of(self.model)
        with acting(self.model, row_updates([row.adapter_at(first)])):
            out = decoder(
                input_ids=sent([list(chunk)], device),
                position_ids=positions,
                cache=self._cache,
                use_cache=True,
            )
        row.computed += len(chunk)
        row.take_hidden(out.last_hidden_state[0].float(), first)
        if not row.prefilling:
            self._row, self._cache = None, DynamicCache()
        return not row.prefilling

    def _begin(self, row: Row) -> int:
        """Write a row's prefix into the cache, and return how many tokens that has now."""
        prefix = None if row.adapter is None else row.adapter.prefix
        for layer, (keys, values) in enumerate(() if prefix is None else prefix):
            self._cache.update(keys[None], values[None], layer)
        return 0 if prefix is None else len(row.virtual)
