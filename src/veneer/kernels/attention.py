"""Causal attention over sequences that are packed end to end, without padding between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NAME = "veneer_packed"  # under which transformers' AttentionInterface knows it
# Sequences share a product when the shortest has at least this part of the longest's length.
LIKE_LENGTH = 0.75


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
    q, k, v = (_ToGroups.apply(x[0].transpose(0, 1), packing) for x in (query, key, value))
    outputs, start = [], 0
    for count, length in packing.groups:
        part = slice(start, start + count * length)
        start = part.stop
        shape = (count, length, -1, query.shape[-1])
        q_, k_, v_ = (x[part].view(shape).transpose(1, 2) for x in (q, k, v))
        windowed = sliding_window is not None and length > sliding_window
        mask = _band(length, sliding_window, q.device) if windowed and sliding_window else None
        y = F.scaled_dot_product_attention(
            q_,
            k_,
            v_,
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )  # (count, heads, length, head_dim)
        outputs.append(y.transpose(1, 2).reshape(count * length, *q.shape[1:2], -1))
    together = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return _FromGroups.apply(together, packing).unsqueeze(0), None


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


def _band(length: int, window: int, device: torch.device) -> Tensor:
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)
