"""Which rows each expert of a mixture gets, and how its outputs become those of the tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.kernels.rows import weighted_sums


class Routing:
    """The rows of a batch, sorted by expert. index (tokens, k): the experts of each token."""

    def __init__(self, index: Tensor, experts: int) -> None:
        flat = index.reshape(-1)
        self.order = flat.argsort(stable=True)  # (rows,)
        self.token = self.order // index.shape[1]  # of each sorted row
        places = torch.empty_like(self.order)
        places[self.order] = torch.arange(len(places), device=index.device)
        self.places = places.view_as(index)  # of each token and choice, among the sorted rows
        counts = torch.bincount(flat, minlength=experts)[:experts]
        self.ends = counts.cumsum(0, dtype=torch.int32)  # of each expert's rows
        self.segments: list[tuple[int, slice]] = []  # of each expert that has rows
        first = 0
        for expert, count in enumerate(counts.tolist()):
            if count:
                self.segments.append((expert, slice(first, first + count)))
                first += count
        self.routed = first  # rows of an expert; those beyond the experts follow
        self.longest = max((rows.stop - rows.start for _, rows in self.segments), default=0)
        self.expert = flat[self.order[:first]]  # of each routed row

    def combined(self, rows: Tensor, weights: Tensor, *, exact: bool = False) -> Tensor:
        """Return Σ_j w_tj · row_tj, (tokens, columns), in the rows' dtype; by transformers' own
        operations if `exact`."""
        if exact:
            return (rows[self.places] * weights.unsqueeze(-1)).sum(1).to(rows.dtype)
        return weighted_sums(rows, self.places, weights)
