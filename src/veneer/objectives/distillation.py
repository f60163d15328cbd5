"""Distillation: what a teacher gives each label token, and how far the student is from it.

Of the teacher's distribution its k likeliest tokens count one by one, and all others together, as
one bucket. The divergence between such distributions over k + 1 buckets is at most that over the
whole vocabulary, and zero where the two models agree; with k the whole vocabulary it is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from veneer.data.packing import Batch
from veneer.kernels.cross_entropy import CHUNK_LOGITS, Logits, TokenLoss
from veneer.kernels.transfer import sent
from veneer.objectives.config import Objective
from veneer.objectives.criterion import Criterion, Outcome, StepCounts, label_counts

# A chunk's logits are held about four times, in float32.
STEP_LOGITS = CHUNK_LOGITS // 4


def forward_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Return Σ p (log p − log q), (rows,), of the student's q and the teacher's p, (rows, buckets):
    the student covers all that the teacher may say.

    Hinton et al. 2015 (arXiv:1503.02531), section 2, less the teacher's entropy.
    """
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Return Σ q (log q − log p), (rows,), as `forward_kl`: the student keeps to what the teacher
    is likely to say.

    Gu et al. 2023 (arXiv:2306.08543), section 2.1, of single tokens.
    """
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def jensen_shannon(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """Return β KL(p ‖ m) + (1 − β) KL(q ‖ m), (rows,), where m is β p + (1 − β) q, as `forward_kl`.

    Agarwal et al. 2023 (arXiv:2306.13649), equation 1.
    """
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * forward_kl(log_m, log_p) + (1 - beta) * forward_kl(log_m, log_q)


def divergence_of(objective: Objective) -> Callable[[Tensor, Tensor], Tensor]:
    """Return what an objective measures between the student's log q and the teacher's log p."""
    if objective.divergence == "jsd":
        return partial(jensen_shannon, beta=objective.jsd_beta)
    return reverse_kl if objective.divergence == "reverse" else forward_kl


@dataclass(frozen=True, eq=False)
class DistanceFromTeacher:
    """The divergence of each label token's distribution from the teacher's, times temperature², by
    which gradients stay as large as without one (Hinton et al. 2015, section 2).

    tokens  (labelled, k)      the teacher's likeliest, int64
    log_p   (labelled, k + 1)  their log-probabilities at the temperature, and that of all others
                               together: −∞ where k is the whole vocabulary
    """

    tokens: Tensor
    log_p: Tensor
    divergence: Callable[[Tensor, Tensor], Tensor] = forward_kl
    temperature: float = 1.0
    step_logits: ClassVar[int] = STEP_LOGITS

    def __call__(self, z: Tensor, first: int, out: Tensor, logits: Logits) -> tuple[Tensor, Tensor]:
        """Return the divergences of a chunk's rows, (rows,), and the gradient of their sum with
        respect to z, in `out`."""
        here = slice(first, first + len(z))
        tokens = self.tokens[here]
        y = logits(z.to(torch.promote_types(z.dtype, torch.float32)))
        slope = logits.slope(y)
        buckets, shares = _buckets(y / self.temperature, tokens)
        with torch.enable_grad():
            buckets.requires_grad_()
            log_q = buckets.log_softmax(-1)
            log_p = self.log_p[here, : log_q.shape[1]].to(log_q.dtype)
            losses = self.divergence(log_q, log_p)
            (of_buckets,) = torch.autograd.grad(losses.sum(), buckets)
        # Without others, each token is a bucket of its own.
        gradient = torch.empty_like(y) if shares is None else shares.mul_(of_buckets[:, -1:])
        gradient.scatter_(1, tokens, of_buckets[:, : tokens.shape[1]])
        gradient.mul_(slope * self.temperature)
        return losses.detach() * self.temperature**2, out.copy_(gradient)


def _buckets(y: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the logits of these tokens, (rows, k), and behind them that of all others together;
    and the share of each token in the others' probability, (rows, vocab), 0 for these tokens.
    Where there are no others, there is neither."""
    own = y.gather(1, tokens)
    if tokens.shape[1] == y.shape[1]:
        return own, None
    others = y.scatter(1, tokens, -math.inf)
    together = others.logsumexp(-1, keepdim=True)
    return torch.cat([own, together], dim=1), others.sub_(together).exp_()


@dataclass(eq=False)
class Likeliest:
    """Notes what a model gives its `count` likeliest tokens at each labelled row of a pass, on the
    host: int32 tokens and float32 log-probabilities, shaped as DistanceFromTeacher has them. It
    stands where a token loss does, and is zero."""

    count: int
    temperature: float = 1.0
    step_logits: ClassVar[int] = STEP_LOGITS
    tokens: list[Tensor] = field(default_factory=list)
    log_p: list[Tensor] = field(default_factory=list)

    def __call__(self, z: Tensor, first: int, out: Tensor, logits: Logits) -> tuple[Tensor, Tensor]:
        """Note a chunk's rows."""
        y = logits(z.to(torch.promote_types(z.dtype, torch.float32))) / self.temperature
        tokens = y.topk(min(self.count, y.shape[1])).indices
        buckets, _ = _buckets(y, tokens)
        log_p = buckets.log_softmax(-1)
        if buckets.shape[1] == tokens.shape[1]:
            log_p = torch.cat([log_p, log_p.new_full((len(log_p), 1), -math.inf)], dim=1)
        self.tokens.append(tokens.int().cpu())
        self.log_p.append(log_p.float().cpu())
        return y.new_zeros(len(y)), out.zero_()


@dataclass(frozen=True, eq=False)
class TeacherRows:
    """What a teacher gives the rows of a run.

    values (slots,)  a record for each label token, mapped from a file: `tokens` (k,) and `log_p`
                     (k + 1,)
    ends (rows,)     where the slots of each row end
    """

    values: NDArray[np.void]
    ends: NDArray[np.int64]

    def of(self, batch: Batch) -> NDArray[np.void]:
        """Return the records of a batch's label tokens, in their order."""
        pairs = zip(self.ends[batch.rows].tolist(), label_counts(batch), strict=True)
        return np.concatenate([self.values[end - count : end] for end, count in pairs])


class Distillation(Criterion):
    """The mean divergence of the label tokens from a teacher."""

    def __init__(self, objective: Objective, teacher: TeacherRows) -> None:
        self.objective, self.teacher = objective, teacher
        self.metrics = ()

    def counts(self, batch: Batch) -> tuple[int, ...]:
        """Return nothing: label tokens are counted already."""
        return ()

    def divisor(self, counts: StepCounts) -> int:
        """Return the label tokens of the step."""
        return counts.labels

    def token_loss(self, batch: Batch, device: torch.device) -> TokenLoss:
        """Return how far the batch's label tokens are from what the teacher gives them."""
        records = self.teacher.of(batch)
        tokens, log_p = (torch.from_numpy(records[name].copy()) for name in ("tokens", "log_p"))
        return DistanceFromTeacher(
            sent(tokens.long(), device),
            sent(log_p, device),
            divergence_of(self.objective),
            self.objective.distill_temperature,
        )

    def __call__(self, losses: Tensor, batch: Batch, counts: StepCounts) -> Outcome:
        """Return the sum of the divergences, losses (labelled,)."""
        return Outcome(losses.sum())
