"""The formulas of low-rank adaptation, as pure functions of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.kernels.native import kernel

Factors = tuple[Tensor, Tensor]  # A (rank, in) and B (out, rank)


def new_A(rank: int, in_features: int, init: str, generator: torch.Generator | None) -> Tensor:
    """Return A (rank, in), float32: small and random.

    kaiming: uniform in ±1/√in, what `kaiming_uniform_(a=√5)` comes to (loralib's layers.py, PEFT).
    gaussian: 0.01 · N(0, 1).
    """
    if init == "gaussian":
        return 0.01 * torch.randn(rank, in_features, generator=generator)
    bound = 1 / math.sqrt(in_features)
    return torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)


def updated_norms(squares: Tensor, WA: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Return ‖w + s b A‖ for each row w of W and b of B, (out,), without W + s B A; 1 for 0.

    √(‖w‖² + 2 s b · (A w) + s² b (A Aᵀ) bᵀ), with squares (out,): ‖w‖²; WA (out, rank): W Aᵀ; A
    (rank, in); B (out, rank).
    """
    gram = A @ A.T  # (rank, rank)
    native = kernel("updated_norms", WA)
    if native is not None:
        norms = torch.empty_like(squares)
        native(squares, WA.contiguous(), gram, B.contiguous(), float(scaling), norms, *B.shape)
        return norms
    b = scaling * B
    cross, quadratic = (b * WA.to(b.dtype)).sum(1), ((b @ gram) * b).sum(1)
    norms = (squares + (2 * cross + quadratic)).clamp(min=0).sqrt()
    return norms.masked_fill(norms == 0, 1.0)


def total_gain(
    gains: Sequence[Tensor | None], weights: Sequence[float]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the gain of W, (out,), and of each adapter's B A beside it, or None for 1.

    W + Σ w ΔW = G ∘ (W + Σ w (g / G) ∘ s B A) with G = 1 + Σ w (g − 1), g = 1 for plain LoRA.
    """
    if all(gain is None for gain in gains):
        return None, [None] * len(gains)
    if len(gains) == 1 and weights[0] == 1.0:
        return gains[0], [None]
    changes = [w * (g - 1.0) for g, w in zip(gains, weights, strict=True) if g is not None]
    total = 1.0 + torch.stack(changes).sum(0)
    # A total of 0 would drop the B A of the adapters with W. A power of two rounds nothing.
    total = total.masked_fill(total == 0, 2.0**-20)
    return total, [(1.0 if gain is None else gain) / total for gain in gains]


def delta_weight(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Return scaling · B A (out, in), in float32 or wider."""
    wide = torch.promote_types(A.dtype, torch.float32)
    return scaling * (B.to(wide) @ A.to(wide))


def rescaled(weight: Tensor, magnitude: Tensor) -> Tensor:
    """Return m ∘ V / ‖V‖ row by row; rows of zeros stay. weight V (out, in), magnitude m (out,)."""
    norms = weight.norm(dim=1)
    return weight * (magnitude / norms.masked_fill(norms == 0, 1.0))[:, None]


def merged_weight(weight: Tensor, delta: Tensor) -> Tensor:
    """Return W + delta, added in float32 or wider and rounded once to W's dtype."""
    return (weight.to(torch.promote_types(weight.dtype, torch.float32)) + delta).to(weight.dtype)
