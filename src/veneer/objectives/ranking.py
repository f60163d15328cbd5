"""Reward models: a number for a whole row, and a criterion over pairs of such numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from veneer.data.encode import UNLABELLED, Example
from veneer.data.packing import Batch
from veneer.kernels.cross_entropy import CHUNK_LOGITS, Logits, TokenLoss
from veneer.objectives import losses as formulas
from veneer.objectives.config import Objective
from veneer.objectives.criterion import Criterion, Outcome, StepCounts


@dataclass(frozen=True)
class OwnValue:
    """Each labelled token's loss is the one number that the head gives it."""

    step_logits: ClassVar[int] = CHUNK_LOGITS

    def __call__(self, z: Tensor, first: int, out: Tensor, logits: Logits) -> tuple[Tensor, Tensor]:
        """Return z (rows, 1) as (rows,), float32 or wider, and its slope."""
        values = z.detach()[:, 0].to(torch.promote_types(z.dtype, torch.float32), copy=True)
        return values, out.fill_(1)


OWN_VALUE = OwnValue()


def asked_at_its_end(example: Example) -> Example:
    """Return an example whose rows are labelled at their last tokens alone.

    A label stands at the token that it is of, and is asked for one place before: so each row has
    one token more, which no other sees.
    """
    second = example.second or len(example.tokens)
    rows = [row for row in (example.tokens[:second], example.tokens[second:]) if row]
    tokens = [[*row, row[-1]] for row in rows]
    labels = [[UNLABELLED] * len(row) + [row[-1]] for row in rows]
    return replace(
        example,
        tokens=[token for row in tokens for token in row],
        labels=[label for row in labels for label in row],
        second=len(tokens[0]) if example.second else 0,
    )


class Ranking(Criterion):
    """Bradley-Terry over pairs, in their mean. The rows of a pair follow each other.

    metrics: the mean rewards of chosen and rejected answers; the share of pairs whose chosen one
    has the higher, equal ones by half, and by how much.
    """

    metrics: Sequence[str] = ("reward_chosen", "reward_rejected", "accuracy", "margin")

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def counts(self, batch: Batch) -> tuple[int, ...]:
        """Return the pairs of a batch."""
        return (len(batch.rows) // 2,)

    def divisor(self, counts: StepCounts) -> int:
        """Return the pairs of the step."""
        return counts.others[0]

    def token_loss(self, batch: Batch, device: torch.device) -> TokenLoss:
        """Return what takes the head's number as it is."""
        return OWN_VALUE

    def __call__(self, losses: Tensor, batch: Batch, counts: StepCounts) -> Outcome:
        """Return the sum of the pairs' losses; losses (rows,) are the rows' rewards."""
        chosen, rejected = losses.view(-1, 2).unbind(1)
        loss = formulas.bradley_terry(chosen, rejected, centre=self.objective.reward_centre).sum()
        with torch.no_grad():
            wins = (chosen > rejected).to(chosen) + 0.5 * (chosen == rejected)
            measured = (chosen, rejected, wins, chosen - rejected)
            return Outcome(loss, torch.stack([values.sum() for values in measured]))
