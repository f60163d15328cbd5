"""Each loss is its paper's formula, and its gradient that formula's slope."""

import math
from collections.abc import Callable

import pytest
import torch

from veneer.objectives import losses

CHOSEN, REJECTED = (-0.3, -1.5, -4.0, -20.0, -0.01), (-0.7, -0.2, -9.0, -20.0, -30.0)
DESIRABLE = (True, False, True, True, False)
KL = 0.4


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def odds(log_p: float) -> float:
    return math.exp(log_p) / (1 - math.exp(log_p))


# Written from the papers, as they are printed: the formulas that `losses` computes more stably.
PAPERS: dict[str, Callable[[float, float, bool], float]] = {
    "dpo": lambda w, r, _: -math.log(sigmoid(0.2 * (w - r))),
    "dpo, smoothed": lambda w, r, _: (
        -0.9 * math.log(sigmoid(0.2 * (w - r))) - 0.1 * math.log(1 - sigmoid(0.2 * (w - r)))
    ),
    "ipo": lambda w, r, _: ((w - r) - 0.5 / 0.2) ** 2,
    "simpo": lambda w, r, _: -math.log(sigmoid(2.5 * w - 2.5 * r - 1.2)),
    "orpo": lambda w, r, _: -math.log(sigmoid(math.log(odds(w) / odds(r)))),
    "cpo": lambda w, r, _: -math.log(sigmoid(0.2 * w - 0.2 * r)),
    "kto": lambda w, _, good: (
        1.5 * (1 - sigmoid(0.2 * (w - KL))) if good else 0.5 * (1 - sigmoid(0.2 * (KL - w)))
    ),
}


def ours(name: str, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    match name:
        case "dpo":
            return losses.dpo(chosen, rejected, beta=0.2)
        case "dpo, smoothed":
            return losses.dpo(chosen, rejected, beta=0.2, label_smoothing=0.1)
        case "ipo":
            return losses.ipo(chosen, rejected, beta=0.2)
        case "simpo":
            return losses.simpo(chosen, rejected, beta=2.5, margin=1.2)
        case "orpo":
            return losses.odds_ratio(chosen, rejected)
        case "cpo":
            return losses.cpo(chosen, rejected, beta=0.2)
    return losses.kto(
        chosen,
        torch.tensor(DESIRABLE),
        torch.tensor(KL, dtype=chosen.dtype),
        beta=0.2,
        desirable_weight=1.5,
        undesirable_weight=0.5,
    )


@pytest.mark.parametrize("name", PAPERS)
def test_a_loss_is_its_papers_formula(name):
    chosen, rejected = (
        torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (CHOSEN, REJECTED)
    )
    values = ours(name, chosen, rejected)
    formula, step = PAPERS[name], 1e-6
    rows = list(zip(CHOSEN, REJECTED, DESIRABLE, strict=True))
    expected = torch.tensor([formula(*row) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(values, expected)
    (slope,) = torch.autograd.grad(values.sum(), chosen)
    rises = [formula(w + step, *more) - formula(w - step, *more) for w, *more in rows]
    by_difference = torch.tensor(rises, dtype=torch.float64) / (2 * step)
    torch.testing.assert_close(slope, by_difference, rtol=1e-4, atol=1e-7)


def test_an_answer_that_is_certain_has_finite_odds():
    certain = torch.zeros(2, requires_grad=True)
    loss = losses.odds_ratio(certain, torch.tensor([-1.0, 0.0])).sum()
    (slope,) = torch.autograd.grad(loss, certain)
    assert loss.isfinite()
    assert slope.isfinite().all()
