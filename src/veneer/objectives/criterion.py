"""What a step asks of an objective, and the plain one: the mean loss of answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from veneer.data.encode import UNLABELLED
from veneer.data.packing import Batch
from veneer.kernels.cross_entropy import TokenLoss
from veneer.kernels.transfer import sent


@dataclass(frozen=True)
class StepCounts:
    """What all batches of a step count together, in all processes: label tokens, and what the
    criterion counts beside."""

    labels: int
    others: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Outcome:
    """What an objective makes of a batch, as sums: the loss, a float32 scalar with a gradient, and
    what is measured beside, (metrics,), without one."""

    loss: Tensor
    metrics: Tensor | None = None


class Criterion(Protocol):
    """An objective over the rows of a run.

    metrics: the names of what it measures beside the loss.
    """

    metrics: Sequence[str]

    def counts(self, batch: Batch) -> tuple[int, ...]:
        """Return what a batch counts beside its label tokens."""
        ...

    def divisor(self, counts: StepCounts) -> int:
        """Return what the sums over a step are divided by."""
        ...

    def token_loss(self, batch: Batch, device: torch.device) -> TokenLoss | None:
        """Return what the losses of the batch's label tokens are, if not −log p."""
        return None

    def __call__(self, losses: Tensor, batch: Batch, counts: StepCounts) -> Outcome:
        """Return what a batch adds to its step, by the losses of its label tokens, (labelled,)."""
        ...


class MeanLoss(Criterion):
    """The mean loss of the label tokens: supervised fine-tuning."""

    metrics: Sequence[str] = ()

    def counts(self, batch: Batch) -> tuple[int, ...]:
        """Return nothing: label tokens are counted already."""
        return ()

    def divisor(self, counts: StepCounts) -> int:
        """Return the label tokens of the step."""
        return counts.labels

    def __call__(self, losses: Tensor, batch: Batch, counts: StepCounts) -> Outcome:
        """Return the sum of the losses."""
        return Outcome(losses.sum())


MEAN_LOSS = MeanLoss()


def label_counts(batch: Batch) -> list[int]:
    """Return how many label tokens each row of a batch has, without what fills it up."""
    ends = np.cumsum(batch.lengths)[: len(batch.rows)]
    labelled = np.concatenate([[0], np.cumsum(batch.labels != UNLABELLED)])[ends]
    return np.diff(labelled, prepend=0).tolist()


def rows_of(losses: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each row's label tokens, (rows,) in float32, and how many they
    are, (rows,); losses (labelled,) are the tokens' −log p."""
    counts = label_counts(batch)
    of_row = sent(np.repeat(np.arange(len(counts)), counts).tolist(), losses.device)
    sums = losses.new_zeros(len(counts)).index_add(0, of_row, losses)
    return -sums, sent([float(count) for count in counts], losses.device).to(losses.dtype)
