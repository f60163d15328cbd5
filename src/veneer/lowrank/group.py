"""Linear layers that share an input, as they act in one step, and the segments of a batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from veneer.kernels.dropout import Mask
from veneer.kernels.segments import SegmentTable, SegmentUpdate
from veneer.lowrank.masters import Masters
from veneer.quant.weight import QuantizedWeight

# For each of the adapters stacked in A and B its rank, and what it multiplies x with in a step of
# training, None for 1. No masks at all where all are None.
Masks = tuple[tuple[int, Mask | None], ...]


@dataclass(frozen=True, eq=False)
class Projection:
    """A linear layer as it acts in one step, in the dtype of computing: gain ∘ (W x + B A x) + b.

    weight (out, in), frozen; a quantized one is dequantized for each product. bias (out,), frozen,
    or None. A (rank, in) and B (out, rank): those of all adapters, stacked and scaled, with rank 0
    where nothing acts. gain (out,), float32 or wider: DoRA's factor of each output, or None for 1.
    With masks, each adapter adds B A (x ∘ mask). masters: what trains in place of A and B, or None
    where they do so themselves. acts_on (tokens, rank), or (tokens, 1) for all ranks: 1 where a
    token has A x added and 0 where not, in x's dtype; None for 1.

    segments: where adapters act on some rows of x each, these rows and the projection as it acts on
    them, in the same order in all projections of a pass. Then A and B here are of rank 0, and rows
    that are in no segment are the base's own.
    """

    weight: Tensor | QuantizedWeight
    bias: Tensor | None
    A: Tensor
    B: Tensor
    gain: Tensor | None = None
    masks: Masks = ()
    masters: Masters | None = None
    acts_on: Tensor | None = None
    segments: tuple[tuple[slice, Projection], ...] = ()

    @classmethod
    def plain(cls, weight: Tensor | QuantizedWeight, bias: Tensor | None) -> Projection:
        """Return the projection on which no adapter acts."""
        out, in_ = weight.shape
        nothing = torch.empty(0, dtype=weight.dtype, device=weight.device)
        return cls(weight, bias, nothing.view(0, in_), nothing.view(out, 0))

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def has_gain(self) -> bool:
        """Whether some of its outputs have a gain."""
        return self.gain is not None or any(own.gain is not None for _, own in self.segments)

    def trained(self) -> list[Tensor]:
        """Return A, B and gain, as far as there are some, of each segment: what gradients are
        for."""
        if self.segments:
            return [tensor for _, own in self.segments for tensor in own.trained()]
        if not self.rank:
            return []
        factors = self if self.masters is None else self.masters
        return [factors.A, factors.B] if self.gain is None else [factors.A, factors.B, self.gain]


@dataclass(frozen=True, eq=False)
class Segment:
    """Rows of a batch on which the same adapters act, and the projections as they act there.

    start: where A x of the segment begins in the matrix that holds that of all. in_table: whether
    the group's table has the products of its adapters.
    """

    rows: slice
    tokens: int
    group: Sequence[Projection]
    start: int
    in_table: bool = False

    @cached_property
    def rank(self) -> int:
        return sum(p.rank for p in self.group)


class Group(tuple[Projection, ...]):
    """Projections that share an input."""

    def segments(self, tokens: int) -> Sequence[Segment]:
        """Return the segments of a batch; one where the same adapters act on all rows."""
        if tokens not in self._layouts:
            self._layouts[tokens] = self._layout(tokens)
        return self._layouts[tokens][0]

    def table(self, tokens: int) -> SegmentTable | None:
        """Return the products of all segments that are `in_table`, or None where none is."""
        self.segments(tokens)
        return self._layouts[tokens][1]

    @cached_property
    def _layouts(self) -> dict[int, tuple[Sequence[Segment], SegmentTable | None]]:
        return {}  # by tokens: always the same number, in all that is computed with a group

    def _layout(self, tokens: int) -> tuple[Sequence[Segment], SegmentTable | None]:
        cut = next((p.segments for p in self if p.segments), ())
        if not cut:
            # A list: a segment that held the group would keep it until the collector runs.
            return [Segment(slice(None), tokens, [*self], 0)], None
        segments: list[Segment] = []
        start = 0
        for number, (rows, _) in enumerate(cut):
            own = [p.segments[number][1] if p.segments else p for p in self]
            segment = Segment(rows, len(range(tokens)[rows]), own, start)
            segments.append(segment)
            start += segment.tokens * segment.rank
        plain = [segment for segment in segments if _is_plain(segment)]
        updates = [update for segment in plain for update in _updates(segment, tokens)]
        table = SegmentTable.of(updates)
        if table is not None:
            segments = [replace(each, in_table=each in plain) for each in segments]
        return segments, table


def _is_plain(segment: Segment) -> bool:
    """Return whether the segment's adapters act on all that they read, and on all its rows."""
    return bool(segment.tokens) and not any(p.masks or p.acts_on is not None for p in segment.group)


def _updates(segment: Segment, tokens: int) -> Iterable[SegmentUpdate]:
    start = segment.start
    first = range(tokens)[segment.rows].start
    for number, p in enumerate(segment.group):
        if not p.rank:
            continue
        A, B, *_ = p.trained()
        factor = 1.0 if p.masters is None else p.masters.factor
        trains = A.requires_grad, B.requires_grad
        yield SegmentUpdate(
            *(first, segment.tokens, number, p.A, p.B, start, segment.rank),
            factor=factor,
            trains=trains,
        )
        start += p.rank
