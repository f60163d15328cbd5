"""Where the factors of several adapters are, for kernels in which each row finds its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FactorTable:
    """Where each pair's A (rank, in) is, and its B (out, rank), or Bᵀ (rank, out): contiguous, and
    all of one dtype.

    A, B, ranks (pairs,), int64, on the device. The rank is 0 where a pair adds nothing. most: the
    highest rank. factors: what lies there, kept for as long as the table.
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
        pairs: Sequence[tuple[Tensor, Tensor] | None],
        *,
        experts: int = 1,
        B_is_transposed: bool = False,
    ) -> FactorTable:
        """Return the table of pairs of A and B; None adds nothing. With experts each pair is as
        many of the table: B has them in a dimension before its own, and so has A unless they share
        it.

        The device writes the table itself, so that a CUDA graph may be recorded meanwhile: it would
        read a copy's source again at each replay.
        """
        own = [pair and (pair[0].contiguous(), pair[1].contiguous()) for pair in pairs]
        factors = tuple(factor for pair in own if pair for factor in pair)
        nothing = torch.zeros(3, experts, dtype=torch.int64, device=factors[0].device)
        columns = [nothing if pair is None else _places(*pair, experts) for pair in own]
        A, B, ranks = torch.cat(columns, 1)
        most = max(A.shape[-2] for A in factors[::2])
        return cls(A, B, ranks, most, factors, B_is_transposed)


def _places(A: Tensor, B: Tensor, experts: int) -> Tensor:
    """Return the addresses of A and B and the rank, (3, experts)."""
    each = torch.arange(experts, device=A.device)
    addresses = [x.data_ptr() + each * (x[0].nbytes if x.ndim > 2 else 0) for x in (A, B)]
    return torch.stack([*addresses, torch.full_like(each, A.shape[-2])])
