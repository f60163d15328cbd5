"""Measure an adapter's changes: their size, their effective rank, and the angle between two."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

import torch

from veneer.adapter.config import LoRA
from veneer.algebra.change import Change, changes_of, not_a_sum
from veneer.errors import AdapterError, joined
from veneer.formats.state import AdapterState
from veneer.lowrank.spectrum import effective_rank, inner, product_directions


@dataclass(frozen=True)
class Measured:
    """ΔW = s B A of one layer (out, in): ‖ΔW‖, its largest singular value, and effective rank.

    Of a stack of experts: ‖ΔW‖ of all, the largest of any, and the mean effective rank.
    """

    path: str
    out: int
    in_: int
    rank: int
    norm: float
    largest: float
    effective_rank: float


@dataclass(frozen=True)
class Pair:
    """One layer of two adapters; None for an adapter that lacks it. inner: ⟨ΔW, ΔW'⟩, else 0."""

    path: str
    one: Measured | None
    other: Measured | None
    inner: float

    @property
    def cosine(self) -> float | None:
        """⟨ΔW, ΔW'⟩ / (‖ΔW‖ ‖ΔW'‖), or None if one of them is missing or zero."""
        if self.one is None or self.other is None:
            return None
        return cosine(self.inner, self.one.norm, self.other.norm)


def inspect(state: AdapterState) -> list[Measured]:
    """Return the measures of what an adapter adds to each layer, from its factors alone.

    For DoRA, which rescales W + B A row by row, only B A is measured. Raises AdapterError for an
    adapter without low-rank factors.
    """
    return [_measured(path, change) for path, change in _changes(state, "This adapter").items()]


def diff(one: AdapterState, other: AdapterState) -> list[Pair]:
    """Return the layers of two adapters side by side, with the angles between their changes.

    Nothing as large as ΔW is made. Raises AdapterError for adapters without low-rank factors, and
    for layers of different shapes.
    """
    left, right = _changes(one, "The first adapter"), _changes(other, "The second adapter")
    problems = [
        f"{path} is {left[path].shape} and {right[path].shape}"
        for path in left
        if path in right and left[path].shape != right[path].shape
    ]
    if problems:
        raise AdapterError(
            f"These adapters belong to bases of different shapes: {joined(problems)}."
        )
    return [
        Pair(
            path,
            _measured(path, left[path]) if path in left else None,
            _measured(path, right[path]) if path in right else None,
            _inner(left[path], right[path]) if path in left and path in right else 0.0,
        )
        for path in dict.fromkeys([*left, *right])
    ]


def total_norm(layers: Iterable[Measured | None]) -> float:
    """Return ‖ΔW‖ over all layers."""
    return sum(layer.norm**2 for layer in layers if layer is not None) ** 0.5


def total_cosine(pairs: list[Pair]) -> float | None:
    """Return the cosine of two adapters as vectors over all layers, None if one is zero."""
    sizes = total_norm(pair.one for pair in pairs), total_norm(pair.other for pair in pairs)
    return cosine(sum(pair.inner for pair in pairs), *sizes)


def cosine(product: float, one: float, other: float) -> float | None:
    """Return product / (one · other), clamped to ±1, or None for 0 / 0."""
    if not one or not other:
        return None
    return max(-1.0, min(1.0, product / (one * other)))


def _changes(state: AdapterState, which: str) -> dict[str, Change]:
    if problems := not_a_sum(state):
        raise AdapterError(f"{which} cannot be measured: {joined(problems)}.")
    return changes_of(state)


def _measured(path: str, change: Change) -> Measured:
    values = [product_directions(*matrix.factors)[1] for matrix in change.matrices()]
    *_, out, in_ = change.shape
    return Measured(
        path,
        out,
        in_,
        change.rank,
        float(torch.stack(values).norm()),
        max(float(S[0]) for S in values),
        fmean(map(effective_rank, values)),
    )


def _inner(one: Change, other: Change) -> float:
    matrices = zip(one.matrices(), other.matrices(), strict=True)
    return sum(inner(ours.factors, theirs.factors) for ours, theirs in matrices)


def is_dora(state: AdapterState) -> bool:
    """Return whether B A is only a part of what an adapter does."""
    return isinstance(state.config, LoRA) and state.config.dora
