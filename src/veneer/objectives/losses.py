"""Losses of preferences, each as its paper has it: from log-probabilities to a loss for each pair
or row, in the dtype of what they get.

chosen, rejected, answers (n,): log-probabilities of whole answers. Where a loss measures from a
reference they are log-ratios, log p − log p of the reference; where it says so, means over the
answer's tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def dpo(chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Return −(1 − ε) log σ(β Δ) − ε log σ(−β Δ), where Δ is chosen − rejected, of log-ratios.

    Rafailov et al. 2023 (arXiv:2305.18290), equation 7; with ε, Mitchell 2023, "A note on DPO with
    noisy preferences", equation 3.
    """
    x = beta * (chosen - rejected)
    return -(1 - label_smoothing) * F.logsigmoid(x) - label_smoothing * F.logsigmoid(-x)


def ipo(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """Return (chosen − rejected − 1 / (2 β))², of log-ratios in the mean over an answer's tokens.

    Azar et al. 2023 (arXiv:2310.12036), equation 17, where β is τ; their experiments have answers
    of one token, and for longer ones the authors take the mean.
    """
    return (chosen - rejected - 1 / (2 * beta)).square()


def simpo(chosen: Tensor, rejected: Tensor, *, beta: float, margin: float) -> Tensor:
    """Return −log σ(β chosen − β rejected − γ), of mean log-probabilities of an answer's tokens.

    Meng et al. 2024 (arXiv:2405.14734), equation 6.
    """
    return -F.logsigmoid(beta * (chosen - rejected) - margin)


def bradley_terry(chosen: Tensor, rejected: Tensor, *, centre: float = 0.0) -> Tensor:
    """Return −log σ(chosen − rejected) + centre · (chosen + rejected)², of rewards.

    Ouyang et al. 2022 (arXiv:2203.02155), equation 1; the second term, by which rewards stay around
    zero, is Eisenstein et al. 2023 (arXiv:2312.09244), equation 2.
    """
    return -F.logsigmoid(chosen - rejected) + centre * (chosen + rejected).square()


def odds_ratio(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return −log σ(log odds(chosen) − log odds(rejected)), where odds are p / (1 − p), of mean
    log-probabilities of an answer's tokens.

    Hong et al. 2024 (arXiv:2403.07691), equation 7.
    """
    return -F.logsigmoid(chosen - rejected - (_log_of_rest(chosen) - _log_of_rest(rejected)))


def cpo(chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Return what `dpo` does, of log-probabilities: the reference is uniform.

    Xu et al. 2024 (arXiv:2401.08417), section 3.
    """
    return dpo(chosen, rejected, beta=beta, label_smoothing=label_smoothing)


def kto(
    answers: Tensor,
    desirable: Tensor,
    kl: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Return λ_D (1 − σ(β (answer − kl))) of desirable answers, and λ_U (1 − σ(β (kl − answer))) of
    the others, of log-ratios.

    desirable (n,) of bool; kl (): how far the model is from its reference, on answers to other
    questions; no gradient goes through it.
    Ethayarajh et al. 2024 (arXiv:2402.01306), equation 7.
    """
    sign = torch.where(desirable, 1.0, -1.0).to(answers)
    weight = torch.where(desirable, desirable_weight, undesirable_weight).to(answers)
    return weight * (1 - torch.sigmoid(beta * sign * (answers - kl)))


def _log_of_rest(log_p: Tensor) -> Tensor:
    """Return log(1 − exp(log_p)), exact where p is near 0 and where it is near 1 (Mächler 2012,
    "Accurately computing log(1 − exp(−|a|))", equation 7)."""
    log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).tiny)  # of a certain answer: a large number
    near_one = log_p > -0.6931471805599453
    # Each branch is given a harmless number where the other is taken, or its gradient would be NaN.
    by_expm1 = torch.log(-torch.expm1(torch.where(near_one, log_p, -1.0)))
    return torch.where(near_one, by_expm1, torch.log1p(-torch.exp(log_p)))
