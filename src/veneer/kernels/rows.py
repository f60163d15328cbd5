"""Sums over the numbers of each row, and over some rows of a matrix, in one pass each."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.kernels import choice
from veneer.kernels.native import kernel


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """Return Σ a ∘ b over the last dimension, in float32 or wider."""
    native = kernel("row_dots", a, b)
    wide = torch.promote_types(a.dtype, torch.float32)
    if native is None:
        return (a.to(wide) * b.to(wide)).sum(-1)
    sums = a.new_empty(a.shape[:-1], dtype=wide)
    native(a.contiguous(), b.contiguous(), sums, sums.numel(), a.shape[-1])
    return sums


def weighted_sums(rows: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """Return Σ_j weights_ij · row[places_ij], (n, columns), in the rows' dtype, rounded once.

    rows (m, columns), contiguous; places (n, k) of int64; weights (n, k).
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    native = kernel("weighted_sums", rows)
    if native is None and choice.uses_triton(rows, weights):
        from veneer.kernels import triton_rows

        sums = rows.new_empty(len(places), rows.shape[1])
        rows, places, weights = rows.contiguous(), places.contiguous(), weights.contiguous()
        return triton_rows.weighted_sums(rows, places, weights, sums)
    if native is None:
        return (rows[places].to(wide) * weights.unsqueeze(-1).to(wide)).sum(1).to(rows.dtype)
    sums = rows.new_empty(len(places), rows.shape[1])
    weights = weights.to(wide).contiguous()
    native(rows, places.contiguous(), weights, sums, *places.shape, rows.shape[1])
    return sums
