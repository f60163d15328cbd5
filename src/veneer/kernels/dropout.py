"""Dropout (Srivastava et al. 2014) whose masks are not kept: both ways make them from a seed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from veneer.kernels import choice
from veneer.kernels.native import adjacent, kernel

LEVELS = 2**16  # probabilities are multiples of 1 / LEVELS
SEEDS = 2**62
GOLDEN = 0x9E3779B97F4A7C15  # between the keys of two rows, as splitmix64 has it
STRIDE = 0xD1342543DE82EF95  # between the seeds of two masks; odd and no small multiple of it


@dataclass(frozen=True)
class Mask:
    """m: for each element of a matrix 0, with probability p, or 1.

    The bits of an element depend on the seed, its row and its column alone: dropout.h has the
    functions. What is multiplied with m has to be multiplied with `scale` = 1 / (1 − p) somewhere,
    where that is cheapest.
    """

    p: float
    seed: int

    @classmethod
    def drawn(cls, p: float, generator: torch.Generator | None = None) -> Mask:
        """Return a mask whose seed comes from a generator on the CPU, torch's own unless given."""
        return cls(p, int(torch.randint(SEEDS, (), device="cpu", generator=generator)))

    def numbered(self, number: int) -> Mask:
        """Return one of many masks that are independent of each other."""
        return replace(self, seed=(self.seed + number * STRIDE) % SEEDS)

    @property
    def scale(self) -> float:
        return LEVELS / (LEVELS - self._dropped)

    def apply(self, x: Tensor) -> Tensor:
        """Return x ∘ m for x (rows, columns)."""
        return self._write(x, torch.empty_like(x, memory_format=torch.contiguous_format))

    def apply_(self, x: Tensor) -> Tensor:
        """Multiply x (rows, columns), contiguous, with m, and return it."""
        return self._write(x, x)

    def add_(self, y: Tensor, x: Tensor) -> Tensor:
        """Add x ∘ m to y, both (rows, columns), y contiguous, and return y."""
        return self._write(x, y, adds=True)

    def _write(self, x: Tensor, y: Tensor, *, adds: bool = False) -> Tensor:
        native = kernel("dropout", x, y)
        if native is None and choice.uses_triton(x, y):
            from veneer.kernels import triton_dropout

            x = adjacent(x)
            return triton_dropout.write(x, y, seed=self.seed, dropped=self._dropped, adds=adds)
        if native is None:
            x = x.masked_fill(self._bits(x) < self._dropped, 0)
            return y.add_(x) if adds else y.copy_(x)
        native(x.contiguous(), y, self.seed, self._dropped, adds, *x.shape)
        return y

    @property
    def _dropped(self) -> int:
        return min(round(self.p * LEVELS), LEVELS - 1)

    def _bits(self, x: Tensor) -> Tensor:
        """Return 16 random bits for each element of x (rows, columns), as int64."""
        rows, columns = x.shape
        # splitmix64 of the row; integers of 64 bits wrap around as unsigned ones do.
        key = _signed(self.seed + GOLDEN) + torch.arange(rows, device=x.device) * _signed(GOLDEN)
        key = (key ^ _shifted(key, 30)) * _signed(0xBF58476D1CE4E5B9)
        key = (key ^ _shifted(key, 27)) * _signed(0x94D049BB133111EB)
        key = (key ^ _shifted(key, 31))[:, None]
        pair = torch.arange((columns + 1) // 2, device=x.device)
        z = pair ^ (key & 0xFFFFFFFF)  # (rows, pairs), 32 bits
        z = ((z ^ (z >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
        z = z ^ _shifted(key, 32)
        z = ((z ^ (z >> 15)) * 0x846CA68B) & 0xFFFFFFFF
        z = z ^ (z >> 16)
        return torch.stack([z & 0xFFFF, z >> 16], 2).flatten(1)[:, :columns]


def _signed(x: int) -> int:
    """Return the lowest 64 bits of x as a signed integer."""
    return (x + 2**63) % 2**64 - 2**63


def _shifted(x: Tensor, by: int) -> Tensor:
    """Return x, int64, as unsigned integers shifted to the right."""
    return (x >> by) & ((1 << (64 - by)) - 1)
