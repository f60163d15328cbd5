"""Dropout by a mask that is made from a seed, in one pass, as `kernels.dropout` has the formula.

Libraries' kernels draw a mask from torch's generator and keep it, or make it from their own; here
it is the one that the processor makes, to the bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 1024  # of a row that one program takes
GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)  # as in kernels/dropout.py
FIRST, SECOND = tl.constexpr(0xBF58476D1CE4E5B9), tl.constexpr(0x94D049BB133111EB)  # splitmix64's
THIRD, FOURTH = tl.constexpr(0x7FEB352D), tl.constexpr(0x846CA68B)


def write(x: Tensor, y: Tensor, *, seed: int, dropped: int, adds: bool) -> Tensor:
    """Write x ∘ m to y, or add it to y if `adds`, and return y. x, y (rows, columns), which may be
    one tensor: the numbers of a row lie side by side."""
    rows, columns = x.shape
    if x.numel():
        # As a tensor a seed is of one type, whatever its size.
        seeds = torch.full((1,), seed, dtype=torch.int64, device=x.device)
        _drop[(rows, triton.cdiv(columns, COLUMNS))](
            *(x, y, seeds, x.stride(0), y.stride(0), columns, dropped, adds, COLUMNS)
        )
    return y


@triton.jit
def _drop(
    x: tl.tensor,
    y: tl.tensor,
    seeds: tl.tensor,
    x_stride: tl.tensor,
    y_stride: tl.tensor,
    columns: tl.tensor,
    dropped: tl.tensor,
    adds: tl.constexpr,
    block: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < columns
    key = tl.load(seeds).to(tl.uint64) + (row.to(tl.uint64) + 1) * GOLDEN
    key = (key ^ (key >> 30)) * FIRST
    key = (key ^ (key >> 27)) * SECOND
    key = key ^ (key >> 31)
    z = (column // 2).to(tl.uint32) ^ key.to(tl.uint32)
    z = (z ^ (z >> 16)) * THIRD
    z = z ^ (key >> 32).to(tl.uint32)
    z = (z ^ (z >> 15)) * FOURTH
    z = z ^ (z >> 16)
    bits = tl.where(column % 2 == 0, z & 0xFFFF, z >> 16).to(tl.int32)
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0)
    value = tl.where(bits < dropped, 0.0, value)
    if adds:
        value += tl.load(y + row * y_stride + column, mask=inside, other=0.0)
    tl.store(y + row * y_stride + column, value, mask=inside)
