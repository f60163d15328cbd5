"""What every criterion over a step's samples knows: how its numbers lie beside those of the sampler
that drew them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from veneer.data.packing import Batch
from veneer.kernels.transfer import sent
from veneer.objectives.criterion import Criterion, label_counts


@dataclass(eq=False)
class OverSamples(Criterion):
    """A criterion over the samples of a step, in each of its updates.

    The first update notes what the weights that drew the samples give their tokens, `old`, by the
    number of the sample. largest_gap: the largest distance of these log-probabilities from the
    sampler's, a scalar on the device, which nobody waits for.
    """

    largest_gap: Tensor | None = field(default=None, init=False)
    old: dict[int, Tensor] = field(default_factory=dict, init=False)

    def counts(self, batch: Batch) -> tuple[int, ...]:
        """Return the samples of a batch."""
        return (len(batch.rows),)

    def by_the_old(self, log_p: Tensor, batch: Batch) -> Tensor:
        """Return what the weights that drew a batch's samples give their tokens, (labelled,), which
        is log_p in the first update."""
        rows = batch.rows.tolist()
        if rows[0] not in self.old:
            own = log_p.detach()
            self.old |= dict(zip(rows, own.split(label_counts(batch)), strict=True))
        return torch.cat([self.old[row] for row in rows])

    def gap_sums(self, old: Tensor, sampled: Tensor) -> Tensor:
        """Return the sum of the distances of both, without their signs and with them, (2,)."""
        bias = old - sampled
        gap = bias.abs()
        most, before = gap.max(), self.largest_gap
        self.largest_gap = most if before is None else torch.maximum(before, most)
        return torch.stack([gap.sum(), bias.sum()])


def of_tokens(values: Sequence[Sequence[float]], batch: Batch, like: Tensor) -> Tensor:
    """Return the numbers of a batch's tokens, (labelled,), of those of each sample."""
    numbers = [value for row in batch.rows.tolist() for value in values[row]]
    return sent(numbers, like.device).to(like.dtype)
