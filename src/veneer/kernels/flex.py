"""Attention over packed rows by torch's FlexAttention, whose compiled kernel can cap scores."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import BlockMask

__all__ = ["BlockMask", "block_mask", "flex_attention"]

BLOCK = 128  # queries, and keys, of a block of a mask, as FlexAttention has it


def flex_attention(
    q: Tensor,  # (tokens, heads, dim)
    k: Tensor,  # (tokens, kv_heads, dim)
    v: Tensor,  # (tokens, kv_heads, value_dim)
    mask: BlockMask,
    scale: float,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # (heads,)
) -> Tensor:
    """Return softmax(t) v, (tokens, heads, value_dim), differentiably, with t = scale · q kᵀ or
    softcap · tanh(scale · q kᵀ / softcap), and the sinks in the softmax's sum."""

    def capped(score: Tensor, *_place: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    y, more = _function(q.device.type)(
        *(x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)),
        score_mod=None if softcap is None else capped,
        block_mask=mask,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=flex.AuxRequest(lse=True),
    )
    y = y[0].transpose(0, 1)
    if sinks is None:
        return y
    log_sums = more.lse[0].T  # (tokens, heads)
    share = (log_sums - torch.logaddexp(log_sums, sinks.to(log_sums.dtype))).exp()
    return y * share.unsqueeze(-1).to(y.dtype)


def block_mask(starts: Tensor, tokens: int, window: int | None) -> BlockMask:
    """Return which keys the queries of a packed batch see: those of the same sequence up to their
    own, and of these the last `window`. starts (sequences + 1,): where sequences begin and end.

    Has the blocks of torch's `create_block_mask`, which computes the whole (tokens, tokens) first.
    """
    sequence = torch.searchsorted(starts, torch.arange(tokens, device=starts.device), right=True)

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (sequence[query] == sequence[key]) & (query >= key)
        return seen if window is None else seen & (query - key < window)

    block = torch.arange(-(tokens // -BLOCK), device=starts.device)
    first, last = block * BLOCK, block * BLOCK + BLOCK - 1  # queries of each block
    begin, late_begin = (starts[sequence[i.clamp(max=tokens - 1)] - 1] for i in (first, last))
    if window is not None:
        begin, late_begin = (
            torch.maximum(x, i - window + 1) for x, i in ((begin, first), (late_begin, last))
        )
    # Blocks of keys are seen from `lowest` up to the queries' own, and by every query from
    # `lowest_whole` up to the one before; torch has none for queries that are not a whole block.
    lowest = begin // BLOCK
    lowest_whole = torch.where(last < tokens, -(late_begin // -BLOCK), block).minimum(block)
    partly = lowest_whole - lowest  # blocks besides the queries' own
    number = block[None]
    seen_partly = torch.where(number < partly[:, None], lowest[:, None] + number, block[:, None])
    seen_whole = (lowest_whole[:, None] + number).clamp(max=len(block) - 1)
    counts, seen_partly, counts_whole, seen_whole = (
        x.to(torch.int32)[None, None]
        for x in (partly + 1, seen_partly, block - lowest_whole, seen_whole)
    )
    return BlockMask.from_kv_blocks(
        counts,
        seen_partly,
        counts_whole,
        seen_whole,
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(tokens, tokens),
    )


@functools.cache
def _function(device: str) -> Callable[..., Any]:
    """Return FlexAttention, compiled on a card: else every score would be in memory."""
    function: Callable[..., Any] = flex.flex_attention
    return function if device == "cpu" else torch.compile(function)
