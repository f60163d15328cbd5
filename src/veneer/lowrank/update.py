"""What adapters add to a layer, as one value, and which of several act on each row of a batch."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from veneer.lowrank.formula import total_gain


@dataclass(frozen=True)
class LowRankUpdate:
    """All adapters that act on a layer as one: gain ∘ (W x + B A x) + b.

    A (rank, in) and B (out, rank), scaled, in the dtype of computing; gain (out,) in float32 or
    wider, or None for 1. Over a stack of experts, A may be (experts, rank, in), and B is (experts,
    out, rank).
    """

    A: Tensor
    B: Tensor
    gain: Tensor | None

    @property
    def rank(self) -> int:
        return self.A.shape[-2]


def mixed(
    updates: Sequence[LowRankUpdate],
    weights: Sequence[float],
    scalings: Sequence[float] | None = None,
) -> LowRankUpdate:
    """Return updates that each act alone, mixed by weights, as one: W + Σ w ΔW, differentiably.

    scalings: what each B is still to be multiplied with; None where all are scaled already. The
    result has the dtype of A. Products are made in float32 or wider.
    """
    gain, shares = total_gain([update.gain for update in updates], weights)
    Bs = []
    for number, (update, share) in enumerate(zip(updates, shares, strict=True)):
        factor = weights[number] * (1.0 if scalings is None else scalings[number])
        B = update.B.to(torch.promote_types(update.B.dtype, torch.float32)) * factor
        Bs.append(B if share is None else B * share[:, None])
    A, B = side_by_side([update.A for update in updates], Bs)
    return LowRankUpdate(A, B.to(A.dtype), gain)


def side_by_side(As: Sequence[Tensor], Bs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return A (Σ rank, in) and B (out, Σ rank) of several, or of each expert where one A is."""
    if len(As) == 1:
        return As[0], Bs[0]
    if any(A.ndim > 2 for A in As):
        As = [A.expand(len(B), *A.shape[-2:]) for A, B in zip(As, Bs, strict=True)]
    return torch.cat(list(As), -2), torch.cat(list(Bs), -1)


@dataclass(frozen=True)
class StackedUpdates:
    """The updates of all rows of a batch side by side: gain ∘ (W x + B (mask ∘ A x)) + b.

    A (Σ rank, in) and B (out, Σ rank); mask (rows, 1, Σ rank): 1 for a row's own update, 0 for the
    others; gain (rows, 1, out), or None where all are 1.
    """

    A: Tensor
    B: Tensor
    mask: Tensor
    gain: Tensor | None


RowsOfUpdate = tuple[LowRankUpdate, tuple[int, ...]]  # an update, and the rows that it acts on


@dataclass(frozen=True)
class RowUpdates:
    """Which updates act on each row of a batch.

    mixes: the different adapters, or mixes of some, each as its update by layer. mix_of_row: for
    each row the number of its mix, or None for the base alone. What is stacked for a layer is
    cached here, so that one value serves many steps.
    """

    mixes: Sequence[Mapping[Any, LowRankUpdate]]
    mix_of_row: tuple[int | None, ...]
    _stacked: dict[Hashable, StackedUpdates] = field(default_factory=dict, repr=False)

    def on(self, layer: Hashable) -> list[RowsOfUpdate]:
        """Return each update that acts on a layer, with its rows."""
        updates = []
        for number, mix in enumerate(self.mixes):
            rows = tuple(row for row, own in enumerate(self.mix_of_row) if own == number)
            if rows and (update := mix.get(layer)) is not None:
                updates.append((update, rows))
        return updates

    def stacked(self, layer: Hashable, updates: Sequence[RowsOfUpdate]) -> StackedUpdates:
        """Return the updates that act on a layer side by side."""
        if (cached := self._stacked.get(layer)) is not None:
            return cached
        A, B = side_by_side([each.A for each, _ in updates], [each.B for each, _ in updates])
        mask = A.new_zeros(len(self.mix_of_row), 1, len(A))
        first = 0
        for update, rows in updates:
            mask[list(rows), :, first : first + update.rank] = 1
            first += update.rank
        stacked = self._stacked[layer] = StackedUpdates(A, B, mask, self.gains(updates))
        return stacked

    def gains(self, updates: Sequence[RowsOfUpdate]) -> Tensor | None:
        """Return the gain of each row, (rows, 1, out), or None where all are 1."""
        like = next((update.gain for update, _ in updates if update.gain is not None), None)
        if like is None:
            return None
        gains = like.new_ones(len(self.mix_of_row), 1, len(like))
        for update, rows in updates:
            if update.gain is not None:
                gains[list(rows), 0] = update.gain
        return gains
