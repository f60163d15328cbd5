"""Single rows of an embedding or head that an adapter has in the place of the base's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TrainedTokens(nn.Module):
    """Rows T of the words `ids`, in the place of the base's rows E: E[i] + (T[i] - E[i]).

    Said like this, several adapters add up, and those of weight w are taken w times.
    """

    ids: Tensor  # (rows,)
    base: Tensor  # (rows, dim), float32: the base's own
    places: Tensor  # (words,): where among the rows a word stands, counted from 1; 0 for no place

    def __init__(self, ids: Tensor, rows: Tensor, base: Tensor, *, words: int) -> None:
        super().__init__()
        assert rows.shape == base.shape == (len(ids), rows.shape[1])
        self.rows = nn.Parameter(rows.to(torch.float32))  # (rows, dim)
        self.register_buffer("ids", ids)
        self.register_buffer("base", base.detach().to(torch.float32))
        places = torch.zeros(words, dtype=torch.long, device=ids.device)
        places[ids] = torch.arange(1, len(ids) + 1, device=ids.device)
        self.register_buffer("places", places)

    def change(self) -> Tensor:
        """Return T - E, (rows, dim)."""
        return self.rows - self.base

    def of_words(self, ids: Tensor, *, padding: int | None) -> Tensor:
        """Return T - E for each of `ids`, (..., dim), or zero for a word that has no row.

        The row of the word `padding` gets no gradient, as an embedding's own would get none.
        """
        change = F.pad(self.change(), (0, 0, 1, 0))  # (1 + rows, dim)
        unmoved = None if padding is None else int(self.places[padding])
        return F.embedding(self.places[ids], change, padding_idx=unmoved)

    def onto_logits(self, logits: Tensor, x: Tensor, weight: float) -> Tensor:
        """Return logits (..., words) of x (..., dim), with those of `ids` as T has them."""
        added = F.linear(x, (weight * self.change()).to(x.dtype))  # (..., rows)
        return logits.index_add(-1, self.ids, added.to(logits.dtype))

    def extra_repr(self) -> str:
        return f"{len(self.ids)} rows"
