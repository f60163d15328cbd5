"""GRPO, its kin and RLOO as a criterion over the samples of one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from veneer.data.packing import Batch
from veneer.kernels.transfer import sent
from veneer.objectives import policy
from veneer.objectives.criterion import Outcome, StepCounts, label_counts
from veneer.objectives.policy_config import OnPolicy
from veneer.objectives.samples import OverSamples, of_tokens


@dataclass(frozen=True, eq=False)
class Drawn:
    """What is known of the samples of a step beside their tokens, by the number of the sample.

    advantages: one for each sample. sampled: log-probabilities of its tokens as they were drawn.
    reference: those of the reference model, where the objective measures from it.
    """

    advantages: Sequence[float]
    sampled: Sequence[Sequence[float]]
    reference: Sequence[Sequence[float]] | None = None


@dataclass(eq=False)
class PolicyCriterion(OverSamples):
    """The loss of a policy over the samples of a step, in each of its updates.

    of_answers: whether ratios are those of whole answers, as in RLOO (Ahmadian et al. 2024, section
    3), and not of tokens.
    What the first update notes, by which later ones are measured, is GRPO's π_old.
    metrics: of the tokens, the distance from the reference (k3), the share whose ratio is clipped,
    and the mean difference between the trainer's log-probability and the sampler's, without its
    sign and with it.
    """

    config: OnPolicy
    drawn: Drawn
    of_answers: bool = False
    metrics: Sequence[str] = ("kl", "clipped", "sampler_gap", "sampler_bias")

    def divisor(self, counts: StepCounts) -> int:
        """Return the samples of the step, its tokens, or the tokens that it could have."""
        level, answers = self.config.loss_level, counts.others[0]
        if self.of_answers or level == "answer":
            return answers
        return counts.labels if level == "token" else answers * self.config.max_new_tokens

    def __call__(self, losses: Tensor, batch: Batch, counts: StepCounts) -> Outcome:
        """Return the sum of the losses of tokens or answers; losses (labelled,)."""
        config, rows = self.config, batch.rows.tolist()
        lengths = label_counts(batch)
        log_p = -losses
        device, dtype = losses.device, losses.dtype
        old = self.by_the_old(log_p, batch)
        sampled = of_tokens(self.drawn.sampled, batch, losses)
        of_row = sent(np.repeat(np.arange(len(rows)), lengths).tolist(), device)
        advantage = sent([self.drawn.advantages[row] for row in rows], device).to(dtype)  # (rows,)

        ratio, bounds = log_p - old, {"low": config.clip_low, "high": config.clip_high}
        if self.of_answers:
            ratio = ratio.new_zeros(len(rows)).index_add(0, of_row, ratio)
        else:
            advantage = advantage[of_row]
        loss = policy.clipped(ratio, advantage, **bounds)
        share_clipped = policy.is_clipped(ratio, advantage, **bounds).to(dtype)
        if self.of_answers:
            # An answer's own loss, spread over its tokens, so that all below is of tokens.
            share = sent([1 / length for length in lengths], device).to(dtype)
            loss, share_clipped = (loss * share)[of_row], share_clipped[of_row]
        if config.importance_cap is not None:
            loss = loss * policy.truncated_weight(old, sampled, most=config.importance_cap)
        kl = torch.zeros_like(losses)
        if self.drawn.reference is not None:
            kl = policy.divergence(log_p, of_tokens(self.drawn.reference, batch, losses))
            if not self.of_answers:  # whose rewards it was taken from
                loss = loss + config.kl_weight * kl
        if config.loss_level == "answer" and not self.of_answers:
            loss = loss / sent([float(length) for length in lengths], device).to(dtype)[of_row]
        with torch.no_grad():
            measured = torch.stack([kl.detach().sum(), share_clipped.sum()])
            measured = torch.cat([measured, self.gap_sums(old, sampled)])
            # The step divides by its own divisor, and these are means over tokens.
            measured = measured * (self.divisor(counts) / counts.labels)
        return Outcome(loss.sum(), measured)
