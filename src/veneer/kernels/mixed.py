"""Where the factors are that each row of a batch has of its own, for kernels that follow them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Addresses:
    """Where each row's A (rank, in) is, and its B (out, rank), or Bᵀ (rank, out); contiguous, and
    all of one dtype.

    A, B, ranks (rows,), int64, on the device; the rank is 0 where nothing acts on a row. most: the
    highest rank. factors: what lies there, which nobody else may hold.
    """

    A: Tensor
    B: Tensor
    ranks: Tensor
    most: int
    factors: tuple[Tensor, ...]
    B_is_transposed: bool = False

    @classmethod
    def of(
        cls,
        pairs: Sequence[tuple[Tensor, Tensor]],
        pair_of_row: Sequence[int | None],
        *,
        B_is_transposed: bool = False,
    ) -> Addresses:
        """Return where the factors of rows are. pairs: A and B, or Bᵀ; pair_of_row: the number of
        each row's pair, or None where nothing acts."""
        pairs = [(A.contiguous(), B.contiguous()) for A, B in pairs]
        places = [(A.data_ptr(), B.data_ptr(), len(A)) for A, B in pairs]
        rows = [(0, 0, 0) if pair is None else places[pair] for pair in pair_of_row]
        table = torch.tensor(rows, dtype=torch.int64).T.contiguous()
        A, B, ranks = table.to(pairs[0][0].device, non_blocking=True)
        most = max(len(A) for A, _ in pairs)
        factors = tuple(factor for pair in pairs for factor in pair)
        return cls(A, B, ranks, most, factors, B_is_transposed)
