"""Sparse changes of weights, and changes that agree on signs: the steps of TIES and DARE."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

LOW = 16  # bits of a float32 that the second count of magnitudes uses; the first uses those above


def threshold(tensors: Callable[[], Iterable[Tensor]], density: float) -> float:
    """Return the magnitude that the largest `density` of all entries have at least.

    Each call of `tensors` yields the pieces of one vector, float32, one at a time, so that the
    whole vector is never in memory. The bits of positive floats sort as the floats do, so two
    counts, of the upper and of the lower halves of the bits, find the magnitude.
    """
    high = torch.zeros(2**15, dtype=torch.int64)
    for tensor in tensors():
        high += torch.bincount(_bits(tensor) >> LOW, minlength=len(high))
    top, place = _bin_of(high, _count(density, int(high.sum())))
    low = torch.zeros(2**LOW, dtype=torch.int64)
    for tensor in tensors():
        bits = _bits(tensor)
        low += torch.bincount(bits[bits >> LOW == top] & (2**LOW - 1), minlength=len(low))
    bottom, _ = _bin_of(low, place)
    return float(torch.tensor((top << LOW) | bottom, dtype=torch.int32).view(torch.float32))


def trimmed(change: Tensor, least: float) -> Tensor:
    """Return a change without the entries whose magnitude is below `least`."""
    return change.where(change.abs() >= least, 0.0)


def pruned(change: Tensor, density: float) -> Tensor:
    """Return a change with only the largest `density` of its entries; the others are 0."""
    flat = change.flatten()
    largest = flat.abs().topk(_count(density, len(flat)), sorted=False).indices
    return torch.zeros_like(flat).index_copy_(0, largest, flat[largest]).view_as(change)


def dropped(change: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Return a change with a random `density` of its entries, each divided by the density (Yu et
    al. 2023, section 3.2), so that the mean over all draws is the change itself."""
    keep = torch.bernoulli(torch.full_like(change, density), generator=generator)
    return change * keep / density


def agreed(changes: Sequence[Tensor]) -> Tensor:
    """Return, for each entry, the mean of those changes that have the sign of their total.

    TIES (Yadav et al. 2023, section 3): elect γ = sgn(Σ τ), and take the mean over {τ: sgn τ = γ}.
    Zeros take no part, and where the total is zero, so is the result.
    """
    stack = torch.stack(list(changes))  # (changes, out, in)
    agree = stack.sign() == stack.sum(0).sign()
    return (stack * agree).sum(0) / agree.sum(0).clamp(min=1)


def _count(density: float, entries: int) -> int:
    return max(1, int(density * entries))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.abs().to(torch.float32).flatten().view(torch.int32).to(torch.int64)


def _bin_of(counts: Tensor, place: int) -> tuple[int, int]:
    """Return the bin that holds the entry at `place` (from 1), counted from the last bin down, and
    the entry's place within that bin."""
    totals = counts.flip(0).cumsum(0)
    bin_ = int((totals < place).sum())
    before = int(totals[bin_ - 1]) if bin_ else 0
    return len(counts) - 1 - bin_, place - before
