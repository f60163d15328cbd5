"""Σ_j w_ij · row[places_ij] without a copy of the rows, as `kernels.rows` has the formula."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 1024  # of a sum that one program makes


def weighted_sums(rows: Tensor, places: Tensor, weights: Tensor, sums: Tensor) -> Tensor:
    """Write the sums, rounded once, to `sums` (n, columns) and return it. rows (m, columns), places
    (n, k) of int64 and weights (n, k), contiguous."""
    n, k = places.shape
    if sums.numel():
        _sum[(n, triton.cdiv(rows.shape[1], COLUMNS))](
            rows, places, weights, sums, rows.shape[1], k, COLUMNS
        )
    return sums


@triton.jit
def _sum(
    rows: tl.tensor,
    places: tl.tensor,
    weights: tl.tensor,
    sums: tl.tensor,
    columns: tl.tensor,
    k: tl.tensor,
    block: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < columns
    total = tl.zeros((block,), tl.float32)
    for j in range(0, k):
        place = tl.load(places + token * k + j)
        weight = tl.load(weights + token * k + j).to(tl.float32)
        row = tl.load(rows + place * columns + column, mask=inside, other=0.0)
        total += weight * row.to(tl.float32)
    tl.store(sums + token * columns + column, total, mask=inside)
