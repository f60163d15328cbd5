"""Causal attention over sequences that are packed end to end, without padding between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NAME = "veneer_packed"  # under which transformers' AttentionInterface knows it
# Sequences share a product when the shortest has at least this part of the longest's length.
LIKE_LENGTH = 0.75
# Up to this length whole products beat the flash kernel. Measured forward and backward together, on
# a CPU in bfloat16, 9 heads over 3: 18 × 59 tokens 17.4 → 5.0 ms, 8 × 128 13.1 → 6.8 ms, but
# 8 × 256 31.3 → 33.1 ms and 4 × 512 53 → 60 ms.
SHORT = 192


class Packing:
    """Where the sequences of a packed batch lie, grouped by like length for attention.

    lengths: of the sequences, in their order; they sum to the batch's tokens. Computed once a
    batch and used by every layer.
    """

    def __init__(self, lengths: list[int], device: torch.device | None = None) -> None:
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        self.tokens = starts[-1]
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        self.groups: list[tuple[int, int]] = []  # (sequences, padded length)
        gather: list[Tensor] = []
        for i in order:
            if not self.groups or lengths[i] < LIKE_LENGTH * self.groups[-1][1]:
                self.groups.append((0, lengths[i]))
            count, longest = self.groups[-1]
            self.groups[-1] = (count + 1, longest)
            rows = torch.full((longest,), -1)
            rows[: lengths[i]] = torch.arange(starts[i], starts[i + 1])
            gather.append(rows)
        padded = torch.cat(gather)
        self.padding = (padded < 0).nonzero().squeeze(1).to(device)
        self.to_groups = padded.clamp(min=0).to(device)  # (padded tokens,)
        from_groups = torch.empty(self.tokens, dtype=torch.long)
        from_groups[padded[padded >= 0]] = (padded >= 0).nonzero().squeeze(1)
        self.from_groups = from_groups.to(device)  # (tokens,)
        self.is_identity = torch.equal(padded, torch.arange(self.tokens))


class UnsupportedAttention(NotImplementedError):
    """The model asks for something of attention that the packed kernel does not do."""


def packed_attention(
    module: nn.Module,
    query: Tensor,  # (1, heads, tokens, head_dim)
    key: Tensor,  # (1, kv_heads, tokens, head_dim)
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Return softmax(q kᵀ · scaling) v within each sequence, (1, tokens, heads, head_dim).

    Has the signature of transformers' AttentionInterface. Raises UnsupportedAttention for soft-
    capped, biased or sink attention, and where the model does not pass `packing` on.
    """
    refused = [
        name for name in ("softcap", "position_bias", "s_aux") if options.get(name) is not None
    ]
    if packing is None or attention_mask is not None or refused:
        raise UnsupportedAttention(", ".join(refused) or "the packing does not reach attention")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (_ToGroups.apply(x[0].transpose(0, 1), packing) for x in (query, key, value))
    outputs, start = [], 0
    for count, length in packing.groups:
        part = slice(start, start + count * length)
        start = part.stop
        shape = (count, length, -1, query.shape[-1])
        heads = [x[part].view(shape).transpose(1, 2) for x in (q, k, v)]
        window = sliding_window if sliding_window and length > sliding_window else None
        if length <= SHORT and not dropout:
            y = _ShortAttention.apply(*heads, scale, window)
        else:
            y = F.scaled_dot_product_attention(
                heads[0],
                heads[1],
                heads[2],
                attn_mask=None if window is None else _visible(length, window, q.device),
                is_causal=window is None,
                dropout_p=dropout,
                scale=scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )  # (count, heads, length, head_dim)
        outputs.append(y.transpose(1, 2).reshape(count * length, *q.shape[1:2], -1))
    together = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return _FromGroups.apply(together, packing).unsqueeze(0), None


class _ShortAttention(torch.autograd.Function):
    """softmax(q kᵀ · scale) v by whole products, for sequences too short for blocks to pay.

    The queries of all heads that share a key head are rows of one product. Nothing is kept but q, k
    and v: probabilities are made again in the backward pass, where

        dv = pᵀ dy    dp = dy vᵀ    ds = scale · p ∘ (dp − Σ p ∘ dp)    dq = ds k    dk = dsᵀ q
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        q, k, v = _rows(query, key), _rows(key, key), _rows(value, key)
        y = _probabilities(q, k, scale, window) @ v  # (count · kv_heads, group · length, head_dim)
        ctx.save_for_backward(q, k, v)
        ctx.scale, ctx.window, ctx.shapes = scale, window, (query.shape, key.shape)
        return y.view(query.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        query_shape, key_shape = ctx.shapes
        dy = grads[0].reshape(q.shape)
        p = _probabilities(q, k, ctx.scale, ctx.window)
        dv = p.transpose(1, 2) @ dy
        dp = dy @ v.transpose(1, 2)
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype).mul_(ctx.scale)
        dq = (ds @ k).view(query_shape)
        dk = (ds.transpose(1, 2) @ q).view(key_shape)
        return dq, dk, dv.view(key_shape), None, None


def _rows(x: Tensor, key: Tensor) -> Tensor:
    """Return (count, heads, length, head_dim) as (count · kv_heads, group · length, head_dim)."""
    count, kv_heads, _, head_dim = key.shape
    return x.reshape(count * kv_heads, -1, head_dim)


def _probabilities(q: Tensor, k: Tensor, scale: float, window: int | None) -> Tensor:
    length = k.shape[1]
    hidden = ~_visible(length, window, k.device)
    mask = torch.zeros(length, length, dtype=q.dtype, device=q.device)
    mask = mask.masked_fill_(hidden, -torch.inf).repeat(q.shape[1] // length, 1)
    return torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale).softmax(-1)


class _ToGroups(torch.autograd.Function):
    """Lay packed rows (tokens, ...) out as padded groups. Each token goes to one place, so that the
    backward pass is a plain lookup too, where autograd would add row by row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return x if packing.is_identity else x.index_select(0, packing.to_groups)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        packing = ctx.packing
        dy = grads[0]
        return (dy if packing.is_identity else dy.index_select(0, packing.from_groups)), None


class _FromGroups(torch.autograd.Function):
    """The way back from padded groups to packed rows; padding gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return x if packing.is_identity else x.index_select(0, packing.from_groups)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        packing = ctx.packing
        if packing.is_identity:
            return grads[0], None
        dx = grads[0].index_select(0, packing.to_groups)
        return dx.index_fill_(0, packing.padding, 0), None


def _visible(length: int, window: int | None, device: torch.device) -> Tensor:
    """Return which keys (columns) each query (row) sees: itself and what is at most so far back."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < (window or length))
