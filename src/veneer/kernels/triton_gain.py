"""The low-rank product with DoRA's gain behind it: one pass over what it is added to.

y ← gain ∘ (y + h Bᵀ) + b ∘ (1 − gain)        with y = W x + b and h = A x
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TOKENS, COLUMNS, RANKS = 64, 64, 16  # of a program's block; a product takes no fewer ranks


def add_with_gain(y: Tensor, h: Tensor, B: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """Write the formula over y (tokens, out) and return it. h (tokens, rank), B (out, rank), gain
    and bias (out,)."""
    tokens, out = y.shape
    _add_with_gain[(triton.cdiv(tokens, TOKENS), triton.cdiv(out, COLUMNS))](
        *(y, h, B, gain, gain if bias is None else bias),
        *(y.stride(0), h.stride(0), B.stride(0), B.stride(1), tokens, out, B.shape[1]),
        *(bias is not None, TOKENS, COLUMNS, RANKS),
    )
    return y


@triton.jit
def _add_with_gain(
    y: tl.tensor,
    h: tl.tensor,
    B: tl.tensor,
    gain: tl.tensor,
    bias: tl.tensor,
    y_stride: tl.tensor,
    h_stride: tl.tensor,
    B_stride: tl.tensor,
    B_step: tl.tensor,
    tokens: tl.tensor,
    out: tl.tensor,
    rank: tl.tensor,
    has_bias: tl.constexpr,
    block_tokens: tl.constexpr,
    block_columns: tl.constexpr,
    block_ranks: tl.constexpr,
) -> None:
    token = (tl.program_id(0) * block_tokens + tl.arange(0, block_tokens)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * block_columns + tl.arange(0, block_columns))[None, :]
    added = tl.zeros((block_tokens, block_columns), tl.float32)
    for first in range(0, rank, block_ranks):
        along = first + tl.arange(0, block_ranks)
        own = (token < tokens) & (along[None, :] < rank)
        left = tl.load(h + token * h_stride + along[None, :], mask=own, other=0.0)
        shared = (along[:, None] < rank) & (column < out)
        right = tl.load(B + column * B_stride + along[:, None] * B_step, mask=shared, other=0.0)
        added += tl.dot(left, right, input_precision="ieee")
    inside = (token < tokens) & (column < out)
    at = y + token * y_stride + column
    z = tl.load(at, mask=inside, other=0.0).to(tl.float32) + added
    g = tl.load(gain + column, mask=column < out, other=0.0).to(tl.float32)
    z *= g
    if has_bias:
        z += tl.load(bias + column, mask=column < out, other=0.0).to(tl.float32) * (1 - g)
    tl.store(at, z, mask=inside)
