"""Which rows each expert of a mixture gets, and how its outputs become those of the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from veneer.kernels.rows import weighted_sums


class Routing:
    """The rows of a batch, sorted by expert. index (tokens, k): the experts of each token.

    is_whole: whether no index is beyond the experts. `segments` and `longest`, and `routed` unless
    it is whole, ask the device for numbers and wait for it; nothing else does.
    """

    def __init__(self, index: Tensor, experts: int, *, is_whole: bool = False) -> None:
        self.is_whole = is_whole
        flat = index.reshape(-1)
        self.order = flat.argsort(stable=True)  # (rows,)
        self.token = self.order // index.shape[1]  # of each sorted row
        places = torch.empty_like(self.order)
        places[self.order] = torch.arange(len(places), device=index.device)
        self.places = places.view_as(index)  # of each token and choice, among the sorted rows
        self._experts = flat[self.order]
        numbers = torch.arange(experts, device=index.device)
        # Of each expert's rows, (experts,).
        self.ends = torch.searchsorted(self._experts, numbers, right=True, out_int32=True)

    @cached_property
    def segments(self) -> list[tuple[int, slice]]:
        """The rows of each expert that has some."""
        segments, first = [], 0
        for expert, end in enumerate(self.ends.tolist()):
            if end > first:
                segments.append((expert, slice(first, end)))
            first = end
        return segments

    def rows_of(self, tokens: Sequence[slice]) -> list[list[slice]]:
        """Return, for each of `segments`, which of its rows are of each run of tokens."""
        count, device = len(self.places), self.token.device
        bounds = torch.tensor([[own.start, own.stop] for own in tokens], device=device)
        experts = torch.tensor([expert for expert, _ in self.segments], device=device)
        keys = self.expert * count + self.token[: self.routed]  # ascending
        ends = torch.searchsorted(keys, experts[:, None, None] * count + bounds).tolist()
        return [
            [slice(first - own.start, end - own.start) for first, end in pairs]
            for (_, own), pairs in zip(self.segments, ends, strict=True)
        ]

    @property
    def routed(self) -> int:
        """How many rows have an expert; those beyond the experts follow."""
        if self.is_whole:
            return len(self.order)
        return self.segments[-1][1].stop if self.segments else 0

    @property
    def longest(self) -> int:
        return max((rows.stop - rows.start for _, rows in self.segments), default=0)

    @property
    def expert(self) -> Tensor:
        """The expert of each routed row."""
        return self._experts[: self.routed]

    def combined(self, rows: Tensor, weights: Tensor, *, exact: bool = False) -> Tensor:
        """Return Σ_j w_tj · row_tj, (tokens, columns), in the rows' dtype; by transformers' own
        operations if `exact`."""
        if exact:
            return (rows[self.places] * weights.unsqueeze(-1)).sum(1).to(rows.dtype)
        return weighted_sums(rows, self.places, weights)
