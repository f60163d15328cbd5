"""Products with factors of a low rank, F (rank, columns), such as an expert's A and Bᵀ.

A matrix product of rank 1 takes as long as one of rank 16, and for the few rows of an expert most
of that goes into preparing it. Up to MOST_RANKS the compiled functions are faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from veneer.kernels import choice
from veneer.kernels.mixed import FactorTable
from veneer.kernels.native import kernel

MOST_RANKS = 4


def project(x: Tensor, factors: Tensor, h: Tensor) -> Tensor:
    """Write x Fᵀ, (rows, rank), to `h` and return it. x (rows, columns)."""
    native = _kernel("low_rank_project", factors, x, h)
    if native is None:
        return torch.mm(x, factors.T, out=h)
    native(x, factors, h, len(x), *factors.shape)
    return h


def add(h: Tensor, factors: Tensor, y: Tensor) -> Tensor:
    """Add h F, (rows, columns), to `y` and return it. h (rows, rank)."""
    native = _kernel("low_rank_add", factors, h, y)
    if native is None:
        return y.addmm_(h, factors)
    native(h, factors, y, len(y), *factors.shape)
    return y


def gradient(h: Tensor, weights: Tensor, x: Tensor, factors: Tensor) -> Tensor:
    """Write (w ∘ h)ᵀ x, (rank, columns), to `factors` and return it.

    h (rows, rank), x (rows, columns); weights w (rows, 1), float32 or wider.
    """
    native = _kernel("low_rank_gradient", factors, h, x)
    if native is None:
        return torch.mm((h * weights).to(x.dtype).T, x, out=factors)
    native(h, weights, x, factors, len(x), *factors.shape)
    return factors


def add_by_rows(
    x: Tensor, updates: Sequence[tuple[Tensor, Tensor]], which: Tensor, expert: Tensor, y: Tensor
) -> Tensor:
    """Add (x Aᵀ) Bᵀ to `y`, (rows, out), and return it, where rows have A and B of their own.

    x (rows, in); updates: pairs of A (experts, rank, in), or (rank, in) for all experts, and Bᵀ
    (experts, rank, out); which and expert (rows,) of int64: the number of each row's pair, or -1
    for none, and its expert.
    """
    tensors = [x, y, *(t for pair in updates for t in pair)]
    native = kernel("low_rank_rows", *tensors)
    dtypes = {t.dtype for t in tensors}
    way = choice.mixed(choice.device_of(x.device), *dtypes)
    if native is None and way == "triton" and len(dtypes) == 1 and y.is_contiguous():
        from veneer.kernels.triton_mixed import add_own

        experts = len(updates[0][1])
        factors = FactorTable.of(updates, experts=experts, B_is_transposed=True)
        numbers = torch.where(which < 0, which, which * experts + expert)
        return add_own(x.contiguous()[:, None], y[:, None], numbers, factors)[:, 0]
    if native is None or not all(t.is_contiguous() for t in tensors):
        for number, (A, Bt) in enumerate(updates):
            for row in (which == number).nonzero()[:, 0].tolist():
                own_A = A if A.ndim == 2 else A[expert[row]]
                y[row] += (x[row] @ own_A.T) @ Bt[expert[row]]
        return y
    size = x.element_size()
    nothing = (0, 0, 0, 0, 0)  # the last, which is where -1 leads
    table = [
        (A.data_ptr(), size * A.stride(0) * (A.ndim - 2), Bt.data_ptr(), size * Bt.stride(0), rank)
        for A, Bt in updates
        for rank in [Bt.shape[1]]
    ]
    firsts_A, steps_A, firsts_B, steps_B, ranks = torch.tensor([*table, nothing])[which].T
    As, Bts = firsts_A + expert * steps_A, firsts_B + expert * steps_B
    native(x, y, As, Bts, ranks.contiguous(), len(x), x.shape[1], y.shape[1])
    return y


def _kernel(name: str, factors: Tensor, *others: Tensor) -> Callable[..., None] | None:
    if len(factors) > MOST_RANKS or not all(t.is_contiguous() for t in (factors, *others)):
        return None
    return kernel(name, factors, *others)
