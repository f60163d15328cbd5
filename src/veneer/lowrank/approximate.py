"""The plain LoRA that is nearest to a change by DoRA."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.lowrank.formula import delta_weight, rescaled
from veneer.lowrank.initial import nearest_factors


def nearest_to_dora(
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor,
    scaling: float,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, float, float]:
    """Return the A and B of the same rank whose s B A is nearest to DoRA's change of W,
    m ∘ (W + s B A) / ‖W + s B A‖ − W; the norm of the difference; and the norm of the change.

    weight (out, in), magnitude (out,). The largest singular values of the change are kept.
    """
    W = weight.to(torch.float32)
    change = rescaled(W + delta_weight(A, B, scaling), magnitude.to(torch.float32)) - W
    near_A, near_B = nearest_factors(change, len(A), scaling, generator)
    missing = change - delta_weight(near_A, near_B, scaling)
    return near_A, near_B, float(missing.norm()), float(change.norm())
