"""What adapters add to a layer, as one value, and which of several act on each row of a batch."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from veneer.kernels.mixed import FactorTable
from veneer.kernels.transfer import sent
from veneer.lowrank.formula import total_gain


@dataclass(frozen=True)
class LowRankUpdate:
    """All adapters that act on a layer as one: gain ∘ (W x + B A x) + b + bias.

    A (rank, in) and B (out, rank), scaled, in the dtype of computing; gain (out,) in float32 or
    wider, or None for 1; bias (out,) likewise, or None for 0: what they add to the layer's own b.
    Over a stack of experts, A may be (experts, rank, in), and B is (experts, out, rank).
    """

    A: Tensor
    B: Tensor
    gain: Tensor | None
    bias: Tensor | None = None

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
    biases = [
        update.bias * weight
        for update, weight in zip(updates, weights, strict=True)
        if update.bias is not None
    ]
    return LowRankUpdate(A, B.to(A.dtype), gain, torch.stack(biases).sum(0) if biases else None)


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
    others, or None where all rows have the same; gain (rows, 1, out), or None where all are 1.
    """

    A: Tensor
    B: Tensor
    mask: Tensor | None
    gain: Tensor | None


@dataclass(frozen=True)
class RowsOfUpdate:
    """An update, the number of its mix, and the rows on which it acts."""

    update: LowRankUpdate
    mix: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class _Stack:
    """What does not depend on which row has which mix: the factors side by side, the mix of each
    rank (Σ rank,), and the gain of no mix and of each mix, (mixes + 1, out), or None for 1."""

    A: Tensor
    B: Tensor
    mix_of_rank: Tensor
    gains: Tensor | None


_Table = tuple[FactorTable, Tensor | None]  # of all mixes, and their gains as in `_Stack`


@dataclass(frozen=True, eq=False)
class RowUpdates:
    """Which updates act on each row of a batch.

    mixes: the different adapters, or mixes of some, each as its update by layer. mix_of_row: for
    each row the number of its mix, or None for the base alone. What is stacked for a layer is
    cached here, so that one value serves many steps.

    numbers (rows,): `mix_of_row` on the device, −1 for None, where the next calls have other rows
    of the same mixes (`with_numbers`). Nothing may then depend on which rows are whose but through
    `numbers`: all updates count as acting, and `mix_of_row` says only how many rows there are.
    """

    mixes: Sequence[Mapping[Any, LowRankUpdate]]
    mix_of_row: tuple[int | None, ...]
    numbers: Tensor | None = None
    _stacks: dict[Hashable, _Stack] = field(default_factory=dict, repr=False)
    _tables: dict[Hashable, _Table] = field(default_factory=dict, repr=False)
    # Those of one value serve all layers that have the same adapters with the same ranks.
    _masks: dict[Hashable, Tensor] = field(default_factory=dict, init=False, repr=False)
    _gains: dict[Hashable, Tensor | None] = field(default_factory=dict, init=False, repr=False)
    _indices: dict[tuple[int, ...], Tensor] = field(default_factory=dict, init=False, repr=False)

    def with_numbers(self, numbers: Tensor) -> RowUpdates:
        """Return the updates for as many rows as `numbers` has, whose mixes it says."""
        return replace(self, mix_of_row=(None,) * len(numbers), numbers=numbers)

    def on(self, layer: Hashable) -> list[RowsOfUpdate]:
        """Return each update that acts on a layer, with its rows."""
        updates = []
        for number, mix in enumerate(self.mixes):
            if (update := mix.get(layer)) is None:
                continue
            rows = tuple(row for row, own in enumerate(self.mix_of_row) if own == number)
            if rows or self.numbers is not None:
                updates.append(RowsOfUpdate(update, number, rows))
        return updates

    def numbers_on(self, device: torch.device) -> Tensor:
        """Return the number of each row's mix, (rows,), −1 for the base alone."""
        if self.numbers is not None:
            return self.numbers
        return self._index(tuple(-1 if mix is None else mix for mix in self.mix_of_row), device)

    def rows_on(self, of: RowsOfUpdate, device: torch.device) -> Tensor:
        """Return the rows on which an update acts as an index."""
        assert self.numbers is None
        return self._index(of.rows, device)

    def stacked(self, layer: Hashable, updates: Sequence[RowsOfUpdate]) -> StackedUpdates:
        """Return the updates that act on a layer side by side."""
        if (stack := self._stacks.get(layer)) is None:
            stack = self._stacks[layer] = _stack(updates, len(self.mixes))
        if layer not in self._gains:
            self._gains[layer] = self._of_rows(stack.gains)
        return StackedUpdates(stack.A, stack.B, self._mask(stack, updates), self._gains[layer])

    def addressed(
        self, layer: Hashable, updates: Sequence[RowsOfUpdate]
    ) -> tuple[FactorTable, Tensor | None]:
        """Return where the factors are of each mix, by its number, and the gain of each row,
        (rows, 1, out), or None where all are 1."""
        if layer not in self._tables:
            every = [mix.get(layer) for mix in self.mixes]
            # Bᵀ is how the adapter cache keeps B: no copy.
            pairs = [None if own is None else (own.A, own.B.mT) for own in every]
            table = FactorTable.of(pairs, B_is_transposed=True)
            self._tables[layer] = table, _gains(updates, len(self.mixes))
        table, gains = self._tables[layer]
        return table, self._of_rows(gains)

    def gains(self, updates: Sequence[RowsOfUpdate]) -> Tensor | None:
        """Return the gain of each row, (rows, 1, out), or None where all are 1."""
        return self._of_rows(_gains(updates, len(self.mixes)))

    def biases(self, updates: Sequence[RowsOfUpdate]) -> Tensor | None:
        """Return what is added to the bias for each row, (rows, 1, out), or None where nothing."""
        own = {each.mix: each.update.bias for each in updates}
        return self._of_rows(_of_mixes(own, len(self.mixes), without=0.0))

    def _mask(self, stack: _Stack, updates: Sequence[RowsOfUpdate]) -> Tensor | None:
        if len(updates) == 1 and len(updates[0].rows) == len(self.mix_of_row):
            return None
        key = (stack.A.dtype, *((each.mix, each.update.rank) for each in updates))
        if (mask := self._masks.get(key)) is None:
            numbers = self.numbers_on(stack.A.device)
            own = numbers[:, None] == stack.mix_of_rank  # (rows, Σ rank)
            mask = self._masks[key] = own.to(stack.A.dtype)[:, None]
        return mask

    def _of_rows(self, of_mixes: Tensor | None) -> Tensor | None:
        """Return what belongs to the mix of each row, (rows, 1, out)."""
        if of_mixes is None:
            return None
        return of_mixes.index_select(0, self.numbers_on(of_mixes.device) + 1)[:, None]

    def _index(self, values: tuple[int, ...], device: torch.device) -> Tensor:
        if (index := self._indices.get(values)) is None:
            index = self._indices[values] = sent(values, device)
        return index


def _stack(updates: Sequence[RowsOfUpdate], mixes: int) -> _Stack:
    every = [each.update for each in updates]
    A, B = side_by_side([each.A for each in every], [each.B for each in every])
    mix_of_rank = [
        torch.full((each.update.rank,), each.mix, dtype=torch.long, device=A.device)
        for each in updates
    ]
    return _Stack(A, B, torch.cat(mix_of_rank), _gains(updates, mixes))


def _gains(updates: Sequence[RowsOfUpdate], mixes: int) -> Tensor | None:
    """Return the gain of no mix and of each, (mixes + 1, out), or None where all are 1."""
    return _of_mixes({each.mix: each.update.gain for each in updates}, mixes, without=1.0)


def _of_mixes(own: Mapping[int, Tensor | None], mixes: int, *, without: float) -> Tensor | None:
    """Return what no mix and each has, (mixes + 1, out), or None where none has any."""
    known = {mix: tensor for mix, tensor in own.items() if tensor is not None}
    if not known:
        return None
    neutral = torch.full_like(next(iter(known.values())), without)
    return torch.stack([neutral, *(known.get(mix, neutral) for mix in range(mixes))])
