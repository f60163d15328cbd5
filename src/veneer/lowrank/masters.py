"""The weights of an adapter that train, beside what a step multiplies with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Masters:
    """A (rank, in) and B (out, rank), of which a step takes A and factor · B in its own dtype.

    Autograd would keep three operations for each; here the function that multiplies returns the
    masters' own gradients. Products with the factor are made in float32 or wider.
    """

    A: Tensor
    B: Tensor
    factor: float

    def rounded(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return A and factor · B in `dtype`, without a graph."""
        A, B = self.A.detach(), self.B.detach()
        return A.to(dtype), (_widened(B, B.dtype) * self.factor).to(dtype)

    def gradients(self, dA: Tensor | None, dB: Tensor | None) -> list[Tensor | None]:
        """Return the gradients of A and B from those of what `rounded` returns."""
        if dA is not None:
            dA = dA.to(self.A.dtype)
        if dB is not None:
            dB = (_widened(dB, self.B.dtype) * self.factor).to(self.B.dtype)
        return [dA, dB]


def _widened(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in `dtype`, or in float32 where that is narrower."""
    return x.to(torch.promote_types(dtype, torch.float32))
