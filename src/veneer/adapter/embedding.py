"""LoRA over an embedding."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.adapter.active import Segments
from veneer.adapter.adapter import Adapter
from veneer.adapter.config import LoRA
from veneer.adapter.layers import AdaptedLayer
from veneer.kernels.gain import apply_gain
from veneer.lowrank.update import LowRankUpdate, RowUpdates


class LoRAEmbedding(AdaptedLayer):
    """Return gain ∘ (E[ids] + Σ scaling · B A[:, ids]), over nn.Embedding.

    Here A (rank, vocab) starts at zero and B (dim, rank) is random, as in loralib: the rows of
    tokens that the data never shows then stay exactly where they were. As W, E is (dim, vocab).
    """

    def by_outputs(self, weight: Tensor) -> Tensor:
        return weight.T

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.promote_types(self.base_weight.dtype, torch.float32)

    def base_weight_times(self, A: Tensor) -> Tensor:
        E = self.dense_base_weight
        return E.T @ A.to(E.dtype).T

    def add(self, name: str, config: LoRA, path: str, generator: torch.Generator | None) -> None:
        vocab, dim = self.base_weight.shape
        rank = config.rank_of(path)
        A = torch.zeros(rank, vocab)
        B = torch.randn(dim, rank, generator=generator)
        adapter = Adapter(A, B, scaling=config.scaling_of(path))
        adapter.lora_B.requires_grad_(not config.lora_fa)
        self._attach_fresh(name, adapter, config)

    def forward(self, ids: Tensor) -> Tensor:
        if (segments := self.active_adapters.segments) is not None:
            return self._with_segments(ids, segments)
        if self.active_adapters.row_updates is not None:
            return self._by_rows(ids, self.active_adapters.row_updates)
        y = self._adapted(ids)
        for tokens, weight in self.active_tokens():
            padding: int | None = self.original.padding_idx  # type: ignore[assignment]
            change = tokens.change_of(ids, padding=padding)  # (..., dim)
            y = (y + change * (weight * self._embed_scale)).to(y.dtype)
        return y

    def _adapted(self, ids: Tensor) -> Tensor:
        y = self.original(ids)
        active = self.active()
        if not active:
            return y
        return self._changed(y, ids, self.low_rank_update(active, active[0][0].lora_A.dtype))

    def _with_segments(self, ids: Tensor, segments: Segments) -> Tensor:
        """Return rows of the embedding for the ids of a packed batch, one for each token."""
        y, flat = self.original(ids), ids.reshape(-1)
        segments.check(flat, "an adapted embedding")
        rows = y.reshape(-1, y.shape[-1])
        for name, tokens, _ in segments.of_adapters:
            if pairs := self.named([(name, 1.0)]):
                update = self.low_rank_update(pairs, pairs[0][0].lora_A.dtype)
                rows[tokens] = self._changed(rows[tokens].clone(), flat[tokens], update)
        return rows.view_as(y)

    def _by_rows(self, ids: Tensor, row_updates: RowUpdates) -> Tensor:
        """Return rows of the embedding for ids (rows, tokens), each row with its own adapters; one
        row of ids is all rows', as positions are in GPT-2."""
        ids = ids.expand(len(row_updates.mix_of_row), -1)
        y = self.original(ids)
        updates = row_updates.on(self)
        if row_updates.numbers is None:
            for each in updates:
                rows = row_updates.rows_on(each, ids.device)
                y[rows] = self._changed(y[rows], ids[rows], each.update)
            return y
        for each in updates:  # of which no one knows here which rows they act on
            own = (row_updates.numbers == each.mix)[:, None, None]
            y = torch.where(own, self._changed(y, ids, each.update), y)
        return y

    def _changed(self, y: Tensor, ids: Tensor, update: LowRankUpdate) -> Tensor:
        delta = F.linear(F.embedding(ids, update.A.T), update.B)  # (..., dim)
        y = y + delta.to(y.dtype) * self._embed_scale
        return y if update.gain is None else apply_gain(y, update.gain, None).to(y.dtype)

    @property
    def _embed_scale(self) -> float | Tensor:
        """What the original multiplies its rows with (Gemma's and MiniGPT's do)."""
        return getattr(self.original, "embed_scale", 1.0)
