"""Embeddings of texts: what the decoder gives for their tokens, as one vector of length 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from veneer.adapter.active import active_adapters_of
from veneer.kernels.transfer import sent
from veneer.models.blocks import decoder_of
from veneer.serve.engine.adapter_cache import row_updates
from veneer.serve.engine.row import Row


class Embedder:
    """Embeds one text at a time by the model's own decoder, a chunk of tokens a call, so that
    answers wait for one chunk at most. Nothing else is computed with it, and so changes it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._row: Row | None = None
        self._cache = DynamicCache()
        self._sum: Tensor | None = None

    @torch.inference_mode()
    def advance(self, row: Row, size: int) -> bool:
        """Compute up to `size` more tokens of a row, and return whether it has its embedding now,
        (dim,)."""
        if row is not self._row:
            self._row, self._cache, self._sum = row, DynamicCache(), None
            row.computed = 0
        tokens, first = row.request.tokens, row.computed
        chunk = tokens[first : row.until(first, first + size)]
        device = self.model.device
        positions = torch.arange(first, first + len(chunk), device=device)[None]
        decoder: Any = decoder_of(self.model)
        active = active_adapters_of(self.model)
        active.row_updates = row_updates([row.adapter_at(first)])
        try:
            out = decoder(
                input_ids=sent([list(chunk)], device),
                position_ids=positions,
                cache=self._cache,
                use_cache=True,
            )
        finally:
            active.row_updates = None
        hidden = out.last_hidden_state[0].float()  # (tokens, dim)
        row.computed += len(chunk)
        if row.request.embedding == "mean":
            total = hidden.sum(0)
            self._sum = total if self._sum is None else self._sum + total
        else:
            self._sum = hidden[-1]
        if row.prefilling:
            return False
        vector, self._row, self._cache, self._sum = self._sum, None, DynamicCache(), None
        row.embedding = tuple(F.normalize(vector, dim=0).tolist())  # a mean has its sum's direction
        return True
