"""What a policy learns from samples, each as its paper has it: rewards to advantages, and
log-probabilities to the loss of each token or answer, in the dtype of what they get.

log_p, old, reference, sampled (tokens,): log-probabilities of the tokens that were drawn, by the
weights that train, by those that drew, by the reference, and as the sampler itself computed them.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Baseline = Literal["group", "others"]
SMALL = 1e-4  # beside a group's deviation, as in TRL: a group of equal rewards has none


def advantages(rewards: Tensor, *, baseline: Baseline, scale: bool) -> Tensor:
    """Return by how much each answer is better than those to the same prompt.

    rewards (prompts, answers), NaN where an answer has none: it is no one's rival, and its
    advantage is 0. baseline: the mean of the group (Shao et al. 2024, arXiv:2402.03300, section
    4.1.2), or of its other answers (RLOO; Ahmadian et al. 2024, arXiv:2402.14740, equation 9).
    scale: divide by the group's standard deviation, which weighs easy and hard prompts more than
    others (left out in Dr. GRPO; Liu et al. 2025, arXiv:2503.20783, section 3.2).
    """
    has_reward = ~rewards.isnan()
    known = rewards.where(has_reward, 0)
    count = has_reward.sum(1, keepdim=True)
    total = known.sum(1, keepdim=True)
    if baseline == "group":
        difference = rewards - total / count
    else:
        difference = rewards - (total - known) / (count - 1)  # NaN where there is no other
    if scale:
        squares = (rewards - total / count).nan_to_num().square().sum(1, keepdim=True)
        difference = difference / ((squares / (count - 1).clamp(min=1)).sqrt() + SMALL)
    return difference.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def clipped(log_ratio: Tensor, advantage: Tensor, *, low: float, high: float) -> Tensor:
    """Return −min(r A, clip(r, 1 − low, 1 + high) A), where r is the ratio of probabilities.

    Shao et al. 2024, equation 3, of tokens; with another bound above than below it is DAPO's
    "clip-higher" (Yu et al. 2025, arXiv:2503.14476, equation 10).
    """
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def is_clipped(log_ratio: Tensor, advantage: Tensor, *, low: float, high: float) -> Tensor:
    """Return where `clipped` is the bound's, which has no gradient."""
    ratio = log_ratio.exp()
    above, below = (ratio > 1 + high) & (advantage > 0), (ratio < 1 - low) & (advantage < 0)
    return above | below


def divergence(log_p: Tensor, reference: Tensor) -> Tensor:
    """Return q / p − log (q / p) − 1, an estimate of KL(p ‖ q) that is never negative.

    Schulman 2020, "Approximating KL divergence", k3; Shao et al. 2024, equation 4.
    """
    difference = reference - log_p
    return torch.expm1(difference) - difference


def truncated_weight(old: Tensor, sampled: Tensor, *, most: float) -> Tensor:
    """Return min(π / μ, most): how much likelier the trainer makes a token than the sampler, which
    rounds otherwise, does.

    Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training",
    truncated importance sampling.
    """
    return (old - sampled).exp().clamp(max=most)


def overlong_penalty(lengths: Tensor, *, longest: int, margin: int) -> Tensor:
    """Return what is taken from the rewards of long answers: nothing up to longest − margin tokens,
    then evenly more, and 1 from `longest` on.

    DAPO's soft overlong punishment (Yu et al. 2025, equation 13).
    """
    return ((lengths - (longest - margin)) / margin).clamp(0, 1)
