"""Rows of an embedding or head for single tokens, which an adapter has instead of the base's."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TrainedTokens(nn.Module):
    """Rows T for the tokens `ids`, instead of the base's rows E: E[i] + w (T[i] - E[i]).

    As changes of E, the rows of several adapters with weights w add up.
    """

    ids: Tensor  # (rows,)
    base: Tensor  # (rows, dim), float32: the base's own rows
    places: Tensor  # (vocab,): the row of each token, counted from 1; 0 for a token without a row

    def __init__(self, ids: Tensor, rows: Tensor, base: Tensor, *, vocab: int) -> None:
        super().__init__()
        assert rows.shape == base.shape == (len(ids), rows.shape[1])
        self.rows = nn.Parameter(rows.to(torch.float32))  # (rows, dim)
        self.register_buffer("ids", ids)
        self.register_buffer("base", base.detach().to(torch.float32))
        places = torch.zeros(vocab, dtype=torch.long, device=ids.device)
        places[ids] = torch.arange(1, len(ids) + 1, device=ids.device)
        self.register_buffer("places", places)

    def change(self) -> Tensor:
        """Return T - E, (rows, dim)."""
        return self.rows - self.base

    def change_of(self, ids: Tensor, *, padding: int | None) -> Tensor:
        """Return T - E for each of `ids`, (..., dim), or zero for a token that has no row.

        The row of the token `padding` gets no gradient, as an embedding's own would get none.
        """
        change = F.pad(self.change(), (0, 0, 1, 0))  # (1 + rows, dim)
        without_gradient = None if padding is None else int(self.places[padding])
        return F.embedding(self.places[ids], change, padding_idx=without_gradient)

    def onto_logits(self, logits: Tensor, x: Tensor, weight: float) -> Tensor:
        """Return logits (..., vocab) of x (..., dim), with w x (T - E)ᵀ added to those of `ids`."""
        added = F.linear(x, (weight * self.change()).to(x.dtype))  # (..., rows)
        return logits.index_add(-1, self.ids, added.to(logits.dtype))

    def extra_repr(self) -> str:
        return f"{len(self.ids)} rows"
