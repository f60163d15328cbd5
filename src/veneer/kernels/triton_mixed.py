"""y_r ← y_r + (x_r Aᵀ) Bᵀ, where each row r of a batch finds factors of its own by their addresses.

Rows of one token are Punica's BGMV, rows of many its SGMV (Chen et al. 2023); here both are one
pair of kernels, since all tokens of a row share its factors, whose ranks may differ.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from veneer.kernels.mixed import FactorTable

# Of a program's block. A product takes no fewer than 16 of anything.
TOKENS, RANKS, COLUMNS = 16, 16, 128


def add_own(x: Tensor, y: Tensor, numbers: Tensor, table: FactorTable) -> Tensor:
    """Add each row's own to y (rows, tokens, out), and return it.

    x (rows, tokens, in); both contiguous, and of the factors' dtype. numbers (rows,), int64: which
    pair of the table is a row's, or -1 for none.
    """
    rows, tokens, columns = x.shape
    out = y.shape[2]
    if not table.most or not x.numel():
        return y
    h = torch.empty(rows, tokens, table.most, dtype=x.dtype, device=x.device)
    blocks = triton.cdiv(tokens, TOKENS)
    _project[(rows, blocks, triton.cdiv(table.most, RANKS))](
        *(x, numbers, table.A, table.ranks, h, tokens, columns, table.most),
        *(TOKENS, RANKS, COLUMNS),
    )
    _add[(rows, blocks, triton.cdiv(out, COLUMNS))](
        *(h, numbers, table.B, table.ranks, y, tokens, out, table.most),
        *(table.B_is_transposed, TOKENS, RANKS, COLUMNS),
    )
    return y


@triton.jit
def _project(
    x: tl.tensor,
    numbers: tl.tensor,
    addresses: tl.tensor,
    ranks: tl.tensor,
    h: tl.tensor,
    tokens: tl.tensor,
    columns: tl.tensor,
    most: tl.tensor,
    block_tokens: tl.constexpr,
    block_ranks: tl.constexpr,
    block_columns: tl.constexpr,
) -> None:
    """h_r = x_r A_rᵀ, (tokens, rank)."""
    row = tl.program_id(0).to(tl.int64)
    number = tl.load(numbers + row)
    rank = tl.load(ranks + number, mask=number >= 0, other=0)
    along = tl.program_id(2) * block_ranks + tl.arange(0, block_ranks)
    if tl.program_id(2) * block_ranks < rank:
        A = tl.load(addresses + number).to(tl.pointer_type(x.dtype.element_ty))
        token = (tl.program_id(1) * block_tokens + tl.arange(0, block_tokens))[:, None]
        total = tl.zeros((block_tokens, block_ranks), tl.float32)
        for first in range(0, columns, block_columns):
            column = first + tl.arange(0, block_columns)
            own = (token < tokens) & (column[None, :] < columns)
            left = tl.load(x + (row * tokens + token) * columns + column[None, :], own, other=0.0)
            shared = (along[None, :] < rank) & (column[:, None] < columns)
            right = tl.load(A + along[None, :] * columns + column[:, None], shared, other=0.0)
            total += tl.dot(left, right, input_precision="ieee")
        own = (token < tokens) & (along[None, :] < rank)
        tl.store(h + (row * tokens + token) * most + along[None, :], total, own)


@triton.jit
def _add(
    h: tl.tensor,
    numbers: tl.tensor,
    addresses: tl.tensor,
    ranks: tl.tensor,
    y: tl.tensor,
    tokens: tl.tensor,
    out: tl.tensor,
    most: tl.tensor,
    is_transposed: tl.constexpr,
    block_tokens: tl.constexpr,
    block_ranks: tl.constexpr,
    block_columns: tl.constexpr,
) -> None:
    """y_r += h_r B_rᵀ, (tokens, out)."""
    row = tl.program_id(0).to(tl.int64)
    number = tl.load(numbers + row)
    rank = tl.load(ranks + number, mask=number >= 0, other=0)
    if rank > 0:
        B = tl.load(addresses + number).to(tl.pointer_type(h.dtype.element_ty))
        token = (tl.program_id(1) * block_tokens + tl.arange(0, block_tokens))[:, None]
        column = (tl.program_id(2) * block_columns + tl.arange(0, block_columns))[None, :]
        total = tl.zeros((block_tokens, block_columns), tl.float32)
        for first in range(0, rank, block_ranks):
            along = first + tl.arange(0, block_ranks)
            own = (token < tokens) & (along[None, :] < rank)
            left = tl.load(h + (row * tokens + token) * most + along[None, :], own, other=0.0)
            if is_transposed:
                places = along[:, None] * out + column
            else:
                places = along[:, None] + column * rank
            shared = (along[:, None] < rank) & (column < out)
            right = tl.load(B + places, shared, other=0.0)
            total += tl.dot(left, right, input_precision="ieee")
        inside = (token < tokens) & (column < out)
        at = y + (row * tokens + token) * out + column
        tl.store(at, tl.load(at, inside, other=0.0).to(tl.float32) + total, inside)
