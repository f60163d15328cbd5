"""Changes that keep a part of their entries, and changes that agree on signs: TIES and DARE."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

LOW = 16  # bits of a float32 that the second look at a magnitude counts; the first has those above


def threshold(tensors: Callable[[], Iterable[Tensor]], density: float) -> float:
    """Return the magnitude that the largest `density` of all entries have at least.

    `tensors` gives the parts of one vector, float32, one at a time and each time anew, so that the
    whole need not stand in memory: bits of positive floats are in the order of the floats, and two
    counts of their halves find the one that is wanted.
    """
    high = torch.zeros(2**15, dtype=torch.int64)
    for tensor in tensors():
        high += torch.bincount(_bits(tensor) >> LOW, minlength=len(high))
    wanted = _count(density, int(high.sum()))
    top, wanted = _reached(high, wanted)
    low = torch.zeros(2**LOW, dtype=torch.int64)
    for tensor in tensors():
        bits = _bits(tensor)
        low += torch.bincount(bits[bits >> LOW == top] & (2**LOW - 1), minlength=len(low))
    rest, _ = _reached(low, wanted)
    return float(torch.tensor((top << LOW) | rest, dtype=torch.int32).view(torch.float32))


def trimmed(change: Tensor, least: float) -> Tensor:
    """Return a change without the entries whose magnitude is below `least`."""
    return change.where(change.abs() >= least, 0.0)


def pruned(change: Tensor, density: float) -> Tensor:
    """Return a change with the largest `density` of its entries alone."""
    flat = change.flatten()
    kept = flat.abs().topk(_count(density, len(flat)), sorted=False).indices
    return torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).view_as(change)


def dropped(change: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Return a change of whose entries a random `density` stays, divided by it (Yu et al. 2023,
    section 3.2), so that the mean over all draws is the change itself."""
    keep = torch.bernoulli(torch.full_like(change, density), generator=generator)
    return change * keep / density


def agreed(changes: Sequence[Tensor]) -> Tensor:
    """Return, for each entry, the mean of those changes that have the sign of their total.

    TIES (Yadav et al. 2023, section 3): elect γ = sgn(Σ τ), and take the mean over {τ: sgn τ = γ}.
    Zeros take no part, and where the total is zero, so is the result.
    """
    all_ = torch.stack(list(changes))  # (changes, out, in)
    agree = all_.sign() == all_.sum(0).sign()
    return (all_ * agree).sum(0) / agree.sum(0).clamp(min=1)


def _count(density: float, entries: int) -> int:
    return max(1, int(density * entries))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.abs().to(torch.float32).flatten().view(torch.int32).to(torch.int64)


def _reached(counts: Tensor, wanted: int) -> tuple[int, int]:
    """Return the bin, seen from the last, in which the `wanted`-th entry lies, and as the how
    manieth of it."""
    above = counts.flip(0).cumsum(0)
    bin_ = int((above < wanted).sum())
    before = int(above[bin_ - 1]) if bin_ else 0
    return len(counts) - 1 - bin_, wanted - before
