"""Criteria over pairs of a chosen and a rejected answer, and over answers judged one by one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from veneer.data.encode import Example
from veneer.data.packing import Batch
from veneer.kernels.transfer import sent
from veneer.objectives import losses as formulas
from veneer.objectives.config import Objective
from veneer.objectives.criterion import (
    MEAN_LOSS,
    Criterion,
    Outcome,
    StepCounts,
    label_counts,
    rows_of,
)
from veneer.objectives.ranking import Ranking

LogProbabilities = NDArray[np.float32]  # (examples, 2): of both rows of each


def criterion_of(
    objective: Objective, examples: Sequence[Example], reference: LogProbabilities | None = None
) -> Criterion:
    """Return an objective over these examples; reference: what the reference gives their rows, for
    objectives that have one."""
    if objective.objective == "sft":
        return MEAN_LOSS
    assert (reference is not None) == objective.has_reference
    if objective.is_ranking:
        return Ranking(objective)
    if objective.objective == "kto":
        assert reference is not None
        return Judged(objective, examples, reference)
    return Pairs(objective, reference)


class Pairs(Criterion):
    """DPO, IPO, SimPO, ORPO and CPO, in the mean over pairs. The rows of a pair follow each other.

    metrics: the mean rewards, β times what the loss compares; the share of pairs whose chosen
    answer has the higher one, equal ones by half, and by how much; and the loss of a chosen
    answer's token.
    """

    metrics: Sequence[str] = ("reward_chosen", "reward_rejected", "accuracy", "margin", "nll")

    def __init__(self, objective: Objective, reference: LogProbabilities | None = None) -> None:
        self.objective, self.reference = objective, reference

    def counts(self, batch: Batch) -> tuple[int, ...]:
        """Return the pairs of a batch, and the label tokens of its chosen answers."""
        return len(batch.rows) // 2, sum(label_counts(batch)[::2])

    def divisor(self, counts: StepCounts) -> int:
        """Return the pairs of the step."""
        return counts.others[0]

    def __call__(self, losses: Tensor, batch: Batch, counts: StepCounts) -> Outcome:
        """Return the sum of the pairs' losses; losses (labelled,)."""
        objective, name = self.objective, self.objective.objective
        beta = objective.strength
        log_p, tokens = rows_of(losses, batch)
        compared = log_p
        if self.reference is not None:
            compared = compared - _at(self.reference[batch.rows[::2]].ravel(), losses)
        if name in ("ipo", "simpo", "orpo"):
            compared = compared / tokens
        chosen, rejected = compared.view(-1, 2).unbind(1)  # (pairs,) each
        nll = -log_p[::2].sum()
        share = counts.others[0] / counts.others[1]  # of a pair in a mean over chosen tokens
        match name:
            case "dpo":
                smoothing = objective.label_smoothing
                loss = formulas.dpo(chosen, rejected, beta=beta, label_smoothing=smoothing).sum()
            case "ipo":
                loss = formulas.ipo(chosen, rejected, beta=beta).sum()
            case "simpo":
                margin = objective.simpo_margin
                loss = formulas.simpo(chosen, rejected, beta=beta, margin=margin).sum()
            case "orpo":
                loss = beta * formulas.odds_ratio(chosen, rejected).sum() + share * nll
            case _:
                smoothing = objective.label_smoothing
                loss = formulas.cpo(chosen, rejected, beta=beta, label_smoothing=smoothing).sum()
                loss = loss + objective.nll_weight * share * nll
        with torch.no_grad():
            good, bad = beta * chosen, beta * rejected
            wins = (good > bad).to(good) + 0.5 * (good == bad)  # as at the first step, by DPO
            measured = (good, bad, wins, good - bad)
            sums = torch.stack([*(values.sum() for values in measured), share * nll])
        return Outcome(loss, sums)


class Judged(Criterion):
    """KTO, in the mean over answers. Behind each answer's row is one of the same prompt with
    another prompt's answer, by which the distance from the reference is measured: of the answers
    that share a pass.

    metrics: the mean rewards of desirable and of undesirable answers, each as its share of all; the
    distance.
    """

    metrics: Sequence[str] = ("reward_desirable", "reward_undesirable", "kl")

    def __init__(
        self, objective: Objective, examples: Sequence[Example], reference: LogProbabilities
    ) -> None:
        self.objective, self.examples, self.reference = objective, examples, reference

    def counts(self, batch: Batch) -> tuple[int, ...]:
        """Return the judged answers of a batch."""
        return (len(batch.rows) // 2,)

    def divisor(self, counts: StepCounts) -> int:
        """Return the judged answers of the step."""
        return counts.others[0]

    def __call__(self, losses: Tensor, batch: Batch, counts: StepCounts) -> Outcome:
        """Return the sum of the answers' losses; losses (labelled,)."""
        objective = self.objective
        log_p, _ = rows_of(losses, batch)
        ratios = log_p - _at(self.reference[batch.rows[::2]].ravel(), losses)
        answers, others = ratios.view(-1, 2).unbind(1)
        kl = others.detach().mean().clamp(min=0)
        judged = [self.examples[i].desirable for i in batch.rows[::2].tolist()]
        desirable = sent(judged, losses.device)
        loss = formulas.kto(
            answers,
            desirable,
            kl,
            beta=objective.strength,
            desirable_weight=objective.desirable_weight,
            undesirable_weight=objective.undesirable_weight,
        )
        with torch.no_grad():
            rewards = objective.strength * answers
            good, bad = (rewards * desirable).sum(), (rewards * ~desirable).sum()
            sums = torch.stack([good, bad, kl * len(judged)])
        return Outcome(loss.sum(), sums)


def _at(values: NDArray[np.float32], like: Tensor) -> Tensor:
    """Return numbers of the host as a tensor on the device and in the dtype of another."""
    return sent(torch.from_numpy(values), like.device).to(like.dtype)
