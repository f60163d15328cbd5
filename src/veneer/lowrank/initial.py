"""Starts of A and B from the weight itself or from its gradient, where B A is not zero.

The base is never changed: an adapter that starts at A₀ and B₀ adds B A − B₀ A₀.
"""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.lowrank.formula import Factors
from veneer.quant.weight import QuantizedWeight, dense

ITERATIONS, OVERSAMPLING = 30, 16  # of subspace iteration; directions beyond the rank
GAMMA = 16.0  # LoRA-GA's stable scale (Wang et al. 2024, section 3.3)


def start_factors(
    weight: Tensor | QuantizedWeight,
    rank: int,
    scaling: float,
    init: str,
    generator: torch.Generator | None,
) -> Factors | None:
    """Return A₀ (rank, in) and B₀ (out, rank), float32, or None where B starts at zero.

    pissa: the main directions of W, s B₀ A₀ = U Σ Vᵀ cut off at the rank (Meng et al. 2024, section
    3). olora: the first columns of Q and rows of R of W = Q R (Büyükakyüz 2024, section 3).
    """
    assert directions(init, rank) <= min(weight.shape)
    if init == "pissa":
        return nearest_factors(dense(weight), rank, scaling, generator)
    if init == "olora":
        W = dense(weight).to(torch.float32)
        Q, _ = torch.linalg.qr(W[:, :rank])  # the first columns of Q need no others of W
        return Q.T @ W, Q
    return None


def directions(init: str, rank: int) -> int:
    """Return how many singular directions of a weight a start needs."""
    return {"pissa": rank, "olora": rank, "lora_ga": 2 * rank}.get(init, 0)


def nearest_factors(
    weight: Tensor, rank: int, scaling: float, generator: torch.Generator | None = None
) -> Factors:
    """Return the A (rank, in) and B (out, rank) whose s B A is nearest to a weight (out, in)."""
    U, S, V = leading(weight, rank, generator)
    root = (S / scaling).sqrt()
    return root[:, None] * V.T, U * root


def from_gradient(gradient: Tensor, rank: int, scaling: float) -> Factors:
    """Return the A₀ and B₀ whose first step is nearest to a step of full training.

    With the gradient's directions U Σ Vᵀ, B₀ is the first `rank` of U and A₀ the next `rank` of V,
    at a scale that keeps outputs stable (LoRA-GA, Wang et al. 2024, sections 3.2 and 3.3).
    """
    U, _, V = leading(gradient, 2 * rank, torch.Generator().manual_seed(0))
    size = gradient.shape[0] ** 0.25 / GAMMA**0.5 / scaling**0.5
    return size * V[:, rank:].T, size * U[:, :rank]


def leading(
    weight: Tensor, rank: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (out, rank), S (rank,) and V (in, rank): the largest singular values S of a weight
    (out, in) and their directions, by subspace iteration in float32."""
    W = weight.to(torch.float32)
    count = min(rank + OVERSAMPLING, *W.shape)
    basis = torch.randn(W.shape[1], count, generator=generator).to(W.device)
    for _ in range(ITERATIONS):
        basis, _ = torch.linalg.qr(W.T @ (W @ basis))
    U, S, V = decomposed(W @ basis)
    return U[:, :rank], S[:rank], (basis @ V.T)[:, :rank]


def decomposed(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S, Vᵀ of a matrix, on its device; where that has no such function (MPS), they are
    computed on the processor."""
    there = matrix.cpu() if matrix.device.type == "mps" else matrix
    U, S, Vh = torch.linalg.svd(there, full_matrices=False)
    return U.to(matrix.device), S.to(matrix.device), Vh.to(matrix.device)
