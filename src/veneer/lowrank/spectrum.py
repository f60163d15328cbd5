"""Singular values of a change, from its factors or from the change itself, and measures of them."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.kernels.wide import wide
from veneer.lowrank.formula import Factors
from veneer.lowrank.initial import decomposed, leading

Directions = tuple[Tensor, Tensor, Tensor]  # U (out, k), S (k,), V (in, k)


def product_directions(A: Tensor, B: Tensor) -> Directions:
    """Return U, S, V with B A = U S Vᵀ, in float64, without computing B A itself.

    B = Q R and Aᵀ = P T by QR, so that B A = Q (R Tᵀ) Pᵀ, and only R Tᵀ, no larger than
    (rank, rank), is decomposed. A (rank, in), B (out, rank); k is rank, or what the shape allows.
    """
    Q, R = torch.linalg.qr(wide(B))
    P, T = torch.linalg.qr(wide(A).T)
    U, S, Vh = torch.linalg.svd(R @ T.T, full_matrices=False)
    return Q @ U, S, P @ Vh.T


def truncated(
    weight: Tensor, *, rank: int | None = None, energy: float | None = None
) -> tuple[Factors, float]:
    """Return A and B of the B A nearest to a weight (out, in), and the energy that it keeps.

    rank: that of B A; or energy: B A has the smallest rank that keeps it. Nearest in the Frobenius
    norm (Eckart and Young 1936). For a given rank, subspace iteration finds only its directions.
    """
    assert (rank is None) != (energy is None)
    whole = float(wide(weight).square().sum())
    if rank is not None:
        U, S, V = leading(weight, rank, torch.Generator().manual_seed(0))
    else:
        assert energy is not None
        U, S, Vh = decomposed(weight.to(torch.float32))
        V = Vh.T
        rank = rank_for(S, energy)
    return balanced(U, S, V, rank), kept_energy(S[:rank], whole)


def balanced(U: Tensor, S: Tensor, V: Tensor, rank: int) -> Factors:
    """Return A = √S Vᵀ (rank, in) and B = U √S (out, rank) of the first directions, in float32."""
    root = S[:rank].sqrt()
    A, B = root[:, None] * V[:, :rank].T, U[:, :rank] * root
    return A.to(torch.float32).contiguous(), B.to(torch.float32).contiguous()


def kept_energy(S: Tensor, whole: float) -> float:
    """Return Σ S² / whole, where whole is ‖ΔW‖²; 1 for a change of zeros."""
    return min(1.0, float(wide(S).square().sum()) / whole) if whole else 1.0


def rank_for(S: Tensor, energy: float) -> int:
    """Return the smallest rank r ≥ 1 with Σ S² up to r at least `energy` of the whole Σ S²."""
    squares = wide(S).square().cumsum(0)
    return 1 + int((squares[:-1] < energy * squares[-1]).sum())


def effective_rank(S: Tensor) -> float:
    """Return exp(−Σ p ln p) with p = S / Σ S: the number of directions that a change uses.

    Roy and Vetterli 2007, section 2: between 1 and the rank, which is reached where all singular
    values are equal; 0 for a change of zeros.
    """
    S = wide(S)
    if not float(S.sum()):
        return 0.0
    return float(torch.special.entr(S / S.sum()).sum().exp())


def inner(first: Factors, second: Factors) -> float:
    """Return ⟨B A, B' A'⟩ = Σ (Bᵀ B') ∘ (A A'ᵀ), in float64, from products of ranks' size."""
    (A, B), (A2, B2) = ([wide(x) for x in factors] for factors in (first, second))
    return float(((B.T @ B2) * (A @ A2.T)).sum())
