"""What acts on a layer, as one value, and which of several act on each row of a batch."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRankUpdate:
    """All adapters that act on a layer as one: gain ∘ (W x + B A x) + b.

    A (rank, in) and B (out, rank), scaled, in the dtype of computing; gain (out,) in float32 or
    wider, or None for 1.
    """

    A: Tensor
    B: Tensor
    gain: Tensor | None

    @property
    def rank(self) -> int:
        return self.A.shape[0]


def total_gain(
    gains: Sequence[Tensor | None], weights: Sequence[float]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the gain of W, (out,), and of each adapter's B A beside it, or None for 1.

    W + Σ w ΔW = G ∘ (W + Σ w (g / G) ∘ s B A) with G = 1 + Σ w (g − 1), g = 1 for plain LoRA.
    """
    if all(gain is None for gain in gains):
        return None, [None] * len(gains)
    if len(gains) == 1 and weights[0] == 1.0:
        return gains[0], [None]
    parts = [w * (g - 1.0) for g, w in zip(gains, weights, strict=True) if g is not None]
    total = 1.0 + torch.stack(parts).sum(0)
    # Where nothing of W is left, the others are left still. A power of two rounds nothing.
    total = total.masked_fill(total == 0, 2.0**-20)
    return total, [(1.0 if gain is None else gain) / total for gain in gains]


def mixed(parts: Sequence[tuple[LowRankUpdate, float]]) -> LowRankUpdate:
    """Return adapters that each act alone, mixed by weights: W + Σ w ΔW as one."""
    gain, shares = total_gain([one.gain for one, _ in parts], [weight for _, weight in parts])
    Bs = []
    for (one, weight), share in zip(parts, shares, strict=True):
        B = one.B.to(torch.promote_types(one.B.dtype, torch.float32)) * weight
        Bs.append((B if share is None else B * share[:, None]).to(one.B.dtype))
    return LowRankUpdate(torch.cat([one.A for one, _ in parts]), torch.cat(Bs, 1), gain)


@dataclass(frozen=True)
class Stacked:
    """What acts on the rows of a batch, side by side: gain ∘ (W x + B (mask ∘ A x)) + b.

    A (Σ rank, in) and B (out, Σ rank); mask (rows, 1, Σ rank), 1 where a row has that part of
    them; gain (rows, 1, out), or None where all are 1.
    """

    A: Tensor
    B: Tensor
    mask: Tensor
    gain: Tensor | None


@dataclass(frozen=True)
class Rows:
    """Which adapters act on each row of a batch.

    parts: different adapters, or mixes, as what each of them lays over which layer; which: for
    each row the number of its part, or None for the base alone. Layers keep here what they put
    together from it, so that the same value serves many steps.
    """

    parts: Sequence[Mapping[Any, LowRankUpdate]]
    which: tuple[int | None, ...]
    kept: dict[Hashable, Stacked] = field(default_factory=dict)

    def over(self, layer: Hashable) -> list[tuple[LowRankUpdate, tuple[int, ...]]]:
        """Return each part that acts on a layer, with its rows."""
        found = []
        for number, part in enumerate(self.parts):
            rows = tuple(row for row, own in enumerate(self.which) if own == number)
            if rows and (acting := part.get(layer)) is not None:
                found.append((acting, rows))
        return found

    def stacked(
        self, layer: Hashable, parts: Sequence[tuple[LowRankUpdate, tuple[int, ...]]]
    ) -> Stacked:
        """Return the parts that act on a layer side by side."""
        if (known := self.kept.get(layer)) is not None:
            return known
        A = torch.cat([one.A for one, _ in parts])
        B = torch.cat([one.B for one, _ in parts], 1)
        mask = A.new_zeros(len(self.which), 1, len(A))
        first = 0
        for one, rows in parts:
            mask[list(rows), :, first : first + one.rank] = 1
            first += one.rank
        stacked = self.kept[layer] = Stacked(A, B, mask, self.gains(parts))
        return stacked

    def gains(self, parts: Sequence[tuple[LowRankUpdate, tuple[int, ...]]]) -> Tensor | None:
        """Return the gain of each row, (rows, 1, out), or None where all are 1."""
        some = next((one.gain for one, _ in parts if one.gain is not None), None)
        if some is None:
            return None
        gains = some.new_ones(len(self.which), 1, len(some))
        for one, rows in parts:
            if one.gain is not None:
                gains[list(rows), 0] = one.gain
        return gains
