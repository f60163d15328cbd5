"""Distillation on the student's own answers: a teacher gives all of its logits for each token that
the student drew, while a pass is computed.

Agarwal et al. 2023 (arXiv:2306.13649), section 3, with λ = 1: no gradient goes through the draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from veneer.data.encode import UNLABELLED
from veneer.data.packing import Batch
from veneer.kernels.cross_entropy import CHUNK_LOGITS, Logits, TokenLoss
from veneer.kernels.transfer import sent
from veneer.objectives.config import Objective
from veneer.objectives.criterion import Outcome, StepCounts
from veneer.objectives.distillation import divergence_of
from veneer.objectives.samples import OverSamples, of_tokens

# A chunk's logits are held about eight times, in float32, the teacher's among them.
STEP_LOGITS = CHUNK_LOGITS // 8

# From the first of a batch's label tokens and how many: the teacher's logits, (tokens, vocab).
TeacherLogits = Callable[[int, int], Tensor]


@dataclass(eq=False)
class DistanceFromLogits:
    """The divergence of each label token's distribution from a teacher's, over all tokens that both
    have, times temperature²; and `log_p`, what the student gives the labels, noted as chunks come.

    targets, log_p (labelled,)
    """

    teacher: TeacherLogits
    targets: Tensor
    divergence: Callable[[Tensor, Tensor], Tensor]
    temperature: float = 1.0
    log_p: Tensor = field(init=False)
    step_logits: ClassVar[int] = STEP_LOGITS

    def __post_init__(self) -> None:
        self.log_p = torch.zeros(len(self.targets), device=self.targets.device)

    def __call__(self, z: Tensor, first: int, out: Tensor, logits: Logits) -> tuple[Tensor, Tensor]:
        """Return the divergences of a chunk's rows, (rows,), and the gradient of their sum with
        respect to z, in `out`."""
        here = slice(first, first + len(z))
        y = logits(z.to(torch.promote_types(z.dtype, torch.float32)))
        own = y.gather(1, self.targets[here, None])[:, 0] - y.logsumexp(-1)
        self.log_p[here] = own.to(self.log_p.dtype)
        theirs = self.teacher(first, len(z)).to(y.dtype)
        # Models pad their vocabularies differently, with tokens that no text has.
        both = slice(min(y.shape[1], theirs.shape[1]))
        with torch.enable_grad():
            ours = (y[:, both] / self.temperature).requires_grad_()
            log_p = (theirs[:, both] / self.temperature).log_softmax(-1)
            losses = self.divergence(ours.log_softmax(-1), log_p)
            (gradient,) = torch.autograd.grad(losses.sum(), ours)
        slope = logits.slope(y)
        gradient.mul_((slope[:, both] if isinstance(slope, Tensor) else slope) * self.temperature)
        out.zero_()[:, both] = gradient
        return losses.detach() * self.temperature**2, out


@dataclass(eq=False)
class TaughtSamples(OverSamples):
    """The mean divergence of the tokens that the student drew from a teacher.

    teacher: the logits that it gives a batch's label tokens. sampled: log-probabilities of each
    sample's tokens as they were drawn.
    metrics: the mean difference between the trainer's log-probability and the sampler's, without
    its sign and with it.
    """

    objective: Objective
    teacher: Callable[[Batch], TeacherLogits]
    sampled: Sequence[Sequence[float]]
    metrics: Sequence[str] = ("sampler_gap", "sampler_bias")
    distance: DistanceFromLogits | None = field(default=None, init=False)  # of the latest batch

    def divisor(self, counts: StepCounts) -> int:
        """Return the label tokens of the step."""
        return counts.labels

    def token_loss(self, batch: Batch, device: torch.device) -> TokenLoss:
        """Return how far the batch's label tokens are from what the teacher gives them."""
        targets = sent(batch.labels[batch.labels != UNLABELLED].tolist(), device)
        self.distance = DistanceFromLogits(
            self.teacher(batch),
            targets,
            divergence_of(self.objective),
            self.objective.distill_temperature,
        )
        return self.distance

    def __call__(self, losses: Tensor, batch: Batch, counts: StepCounts) -> Outcome:
        """Return the sum of the divergences, losses (labelled,)."""
        assert self.distance is not None
        old = self.by_the_old(self.distance.log_p.to(losses.dtype), batch)
        return Outcome(losses.sum(), self.gap_sums(old, of_tokens(self.sampled, batch, losses)))
