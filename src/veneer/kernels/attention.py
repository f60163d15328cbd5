"""Causal attention over sequences that are packed end to end, without padding between them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.kernels.native import kernel

NAME = "veneer_packed"  # in transformers' AttentionInterface
# Sequences share a product when the shortest has at least this share of the longest's length.
LIKE_LENGTH = 0.75
# The length of a group is a multiple of this, so that products of the same shapes come again.
LENGTH_STEP = 16
# Queries whose scores the backward pass holds at a time: smaller blocks skip more of the keys that
# none of their queries sees, larger ones make better products.
QUERY_BLOCK = 256


class Packing:
    """Where the sequences of a packed batch lie, grouped by like length for attention.

    lengths: of the sequences, in their order; they sum to the batch's tokens. Computed once a
    batch and used by every layer. prefix: for each layer, keys and values that all sequences see
    before their own, or None.
    """

    prefix: Sequence[Tensor] | None = None  # keys and values, (2, kv_heads, virtual, head_dim)

    def __init__(self, lengths: list[int], device: torch.device | None = None) -> None:
        self.lengths = lengths
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        self.tokens = starts[-1]
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        self.groups: list[tuple[int, int]] = []  # (sequences, padded length)
        gather: list[Tensor] = []
        for i in order:
            if not self.groups or lengths[i] < LIKE_LENGTH * self.groups[-1][1]:
                self.groups.append((0, -(-lengths[i] // LENGTH_STEP) * LENGTH_STEP))
            count, longest = self.groups[-1]
            self.groups[-1] = (count + 1, longest)
            rows = torch.full((longest,), -1)
            rows[: lengths[i]] = torch.arange(starts[i], starts[i + 1])
            gather.append(rows)
        padded = torch.cat(gather)
        self._padding = (padded < 0).nonzero().squeeze(1).to(device)
        self._to_groups = padded.clamp(min=0).to(device)  # (padded tokens,)
        from_groups = torch.empty(self.tokens, dtype=torch.long)
        from_groups[padded[padded >= 0]] = (padded >= 0).nonzero().squeeze(1)
        self._from_groups = from_groups.to(device)  # (tokens,)
        self.is_identity = torch.equal(padded, torch.arange(self.tokens))

    def behind(self, prefix: Sequence[Tensor]) -> Packing:
        """Return the same packing, whose sequences see a prefix before their own."""
        packing = copy.copy(self)
        packing.prefix = prefix
        return packing

    def to_groups(self, x: Tensor) -> Tensor:
        """Return packed rows (tokens, ...) as padded groups; padding repeats the first row."""
        return x if self.is_identity else x.index_select(0, self._to_groups)

    def gradient_to_groups(self, dy: Tensor) -> Tensor:
        """Return the rows of a gradient as padded groups, with 0 for padding."""
        if self.is_identity:
            return dy
        return dy.index_select(0, self._to_groups).index_fill_(0, self._padding, 0)

    def from_groups(self, groups: list[Tensor]) -> Tensor:
        """Return the packed rows (tokens, ...) of groups (sequences, padded length, ...)."""
        rows = [group.flatten(0, 1) for group in groups]
        padded = rows[0] if len(rows) == 1 else torch.cat(rows)
        return padded if self.is_identity else padded.index_select(0, self._from_groups)

    def split(self, padded: Tensor) -> list[Tensor]:
        """Return padded rows as one (sequences, padded length, ...) for each group."""
        flat = padded.split([count * length for count, length in self.groups])
        return [rows.unflatten(0, group) for rows, group in zip(flat, self.groups, strict=True)]


class UnsupportedAttention(NotImplementedError):
    """The model needs a kind of attention that the packed kernel does not compute."""


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
    attention = Attention(packing, scale, sliding_window or None)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if packing.prefix is not None:
        layer: Any = module
        y = attention.composed(q, k, v, dropout, packing.prefix[layer.layer_idx])
    elif dropout or q.device.type != "cpu":
        y = attention.composed(q, k, v, dropout)
    else:
        y = _PackedAttention.apply(q, k, v, attention)
    return y.unsqueeze(0), None


@dataclass(frozen=True)
class Attention:
    """softmax(q kᵀ · scale) v within each sequence of a packed batch: every query sees the keys up
    to its own position, and of those the last `window`.

    q and y (tokens, heads, head_dim); k and v (tokens, kv_heads, head_dim).
    """

    packing: Packing
    scale: float
    window: int | None = None

    def composed(
        self, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, prefix: Tensor | None = None
    ) -> Tensor:
        """Return y by torch's own differentiable operations, on any device.

        prefix (2, kv_heads, virtual, head_dim): keys and values of tokens right before each
        sequence, which its queries see too.
        """
        outputs = []
        for query, key, value in self._groups(q, k, v):
            before = 0
            if prefix is not None:
                before = prefix.shape[2]
                key, value = (
                    torch.cat([x.transpose(0, 1).expand(len(own), -1, -1, -1), own], dim=1)
                    for x, own in zip(prefix, (key, value), strict=True)
                )  # (sequences, virtual + length, kv_heads, head_dim)
            mask = self._mask(query, before)
            y = F.scaled_dot_product_attention(
                query.transpose(1, 2),
                key.transpose(1, 2),
                value.transpose(1, 2),
                attn_mask=mask,
                is_causal=mask is None,
                dropout_p=dropout,
                scale=self.scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
            outputs.append(y.transpose(1, 2))
        return self.packing.from_groups(outputs)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return y, and log Σ exp of the scores of each group (sequences, heads, length)."""
        if q.device.type != "cpu":
            return self.composed(q, k, v), []
        outputs, log_sums = [], []
        for query, key, value in self._groups(q, k, v):
            mask = self._mask(query)
            shared = q.shape[1] // k.shape[1]
            y, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query.transpose(1, 2),
                key.repeat_interleave(shared, 2).transpose(1, 2),
                value.repeat_interleave(shared, 2).transpose(1, 2),
                is_causal=mask is None,
                attn_mask=mask,
                scale=self.scale,
            )
            outputs.append(y.transpose(1, 2))
            log_sums.append(log_sum.contiguous())
        return self.packing.from_groups(outputs), log_sums

    def backward(
        self, dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, log_sums: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q, k and v from dy and from `forward`'s inputs and results."""
        if q.device.type != "cpu":
            with torch.enable_grad():
                q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
                dq, dk, dv = torch.autograd.grad(self.composed(q, k, v), (q, k, v), dy)
            return dq, dk, dv
        packing = self.packing
        gradients = zip(
            packing.split(packing.gradient_to_groups(dy)),
            packing.split(packing.gradient_to_groups(_row_dots(dy, y))),
            log_sums,
            strict=True,
        )
        groups = [
            self._backward(*gradient, *tensors)
            for gradient, tensors in zip(gradients, self._groups(q, k, v), strict=True)
        ]
        dq, dk, dv = (packing.from_groups(list(of_all)) for of_all in zip(*groups, strict=True))
        return dq, dk, dv

    def _backward(
        self, dy: Tensor, delta: Tensor, log_sum: Tensor, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk, dv of one group, (sequences, length, heads, head_dim) as q, k and v are.

        The queries of all heads that share a key head are rows of one product. Probabilities p are
        computed again, one block of queries at a time, and then

            dv = pᵀ dy    dp = dy vᵀ    ds = scale · p ∘ (dp − delta)    dq = ds k    dk = dsᵀ q

        with delta = Σ dy ∘ y, (sequences, length, heads). The mean key is subtracted from k: that
        changes neither p nor dq, as Σ ds = 0, and keeps the scores small, which are rounded to k's
        dtype here (keys may share a large offset, which Qwen2's biases give them).
        """
        length, kv_heads = k.shape[1:3]
        q_rows, dy_rows = _by_key_head(q, kv_heads), _by_key_head(dy, kv_heads)
        k_rows, v_rows = (_by_key_head(x, kv_heads).squeeze(1) for x in (k, v))
        delta = delta.transpose(1, 2).contiguous()  # (sequences, heads, length)
        wide = delta.dtype
        mean_key = k_rows.mean(1, keepdim=True, dtype=wide)  # (sequences · kv_heads, 1, dim)
        k_rows = (k_rows - mean_key).to(k.dtype)
        shift = q_rows.to(wide).flatten(1, 2) @ mean_key.transpose(1, 2)
        log_sum = log_sum - self.scale * shift.view(log_sum.shape)
        dq_rows = torch.empty_like(q_rows)  # (sequences · kv_heads, shared, length, dim)
        dk_rows, dv_rows = (torch.zeros_like(x, dtype=wide) for x in (k_rows, v_rows))
        for start in range(0, length, QUERY_BLOCK):
            queries = slice(start, min(length, start + QUERY_BLOCK))
            first = 0 if self.window is None else max(0, start + 1 - self.window)
            keys = slice(first, queries.stop)
            block_q, block_dy = (x[:, :, queries].flatten(1, 2) for x in (q_rows, dy_rows))
            scores = block_q @ k_rows[:, keys].transpose(1, 2)  # (…, shared · queries, keys)
            dp = block_dy @ v_rows[:, keys].transpose(1, 2)
            p, ds = self._gradient(scores, dp, log_sum, delta, start, first)
            dq_rows[:, :, queries] = (ds @ k_rows[:, keys]).unflatten(1, (q_rows.shape[1], -1))
            dk_rows[:, keys] += ds.transpose(1, 2) @ block_q
            dv_rows[:, keys] += p.transpose(1, 2) @ block_dy
        dk, dv = (x.to(k.dtype).unflatten(0, (-1, kv_heads)) for x in (dk_rows, dv_rows))
        dq = dq_rows.unflatten(0, (-1, kv_heads)).flatten(1, 2)  # (sequences, heads, length, dim)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)

    def _gradient(
        self, scores: Tensor, dp: Tensor, log_sum: Tensor, delta: Tensor, start: int, first: int
    ) -> tuple[Tensor, Tensor]:
        """Return p and ds, written over scores and dp."""
        sequences, heads, length = delta.shape
        queries, keys = scores.shape[0] * scores.shape[1] // (sequences * heads), scores.shape[2]
        native = kernel("attention_gradient", scores)
        if native is not None:
            shape = (sequences * heads, queries, keys, length, start, first, self.window or length)
            native(scores, dp, log_sum, delta, float(self.scale), *shape)
            return scores, dp
        visible = _visible(length, self.window, scores.device)
        visible = visible[start : start + queries, first : first + keys]
        rows = (sequences, heads, queries, keys)
        at = (slice(None), slice(None), slice(start, start + queries), None)
        p = (scores.view(rows) * self.scale - log_sum[at]).exp().masked_fill(~visible, 0.0)
        ds = p * (dp.view(rows) - delta[at]) * self.scale
        return p.to(scores.dtype).view(scores.shape), ds.to(dp.dtype).view(dp.shape)

    def _groups(self, q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        packing = self.packing
        groups = (packing.split(packing.to_groups(x)) for x in (q, k, v))
        yield from zip(*groups, strict=True)

    def _mask(self, query: Tensor, before: int = 0) -> Tensor | None:
        """Return a bias for the scores, (length, before + length), or None where every query sees
        the keys up to its own position: no window is shorter, and no keys come before."""
        length = query.shape[1]
        if not before and (self.window is None or length <= self.window):
            return None
        visible = _visible(length, self.window, query.device, before)
        bias = torch.zeros(visible.shape, dtype=query.dtype, device=query.device)
        return bias.masked_fill_(~visible, -torch.inf)


class _PackedAttention(torch.autograd.Function):
    """`Attention`, which keeps q, k, v and y, and one number for each row of scores."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, attention: Attention) -> Tensor:
        y, log_sums = attention.forward(q, k, v)
        ctx.save_for_backward(q, k, v, y, *log_sums)
        ctx.attention = attention
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, *log_sums = ctx.saved_tensors
        return *ctx.attention.backward(grads[0], q, k, v, y, log_sums), None


def _by_key_head(x: Tensor, kv_heads: int) -> Tensor:
    """Return (sequences, length, heads, dim) as (sequences · kv_heads, shared, length, dim)."""
    return x.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1).contiguous()


def _row_dots(a: Tensor, b: Tensor) -> Tensor:
    """Return Σ a ∘ b over the last dimension, in float32 or wider."""
    wide = torch.promote_types(a.dtype, torch.float32)
    native = kernel("row_dots", a)
    if native is None:
        return (a.to(wide) * b.to(wide)).sum(-1)
    out = torch.empty(a.shape[:-1], dtype=wide)
    native(a.contiguous(), b.contiguous(), out, out.numel(), a.shape[-1])
    return out


def _visible(length: int, window: int | None, device: torch.device, before: int = 0) -> Tensor:
    """Return which keys (columns) each query (row) sees: its own and those before it, `window` in
    all. The first `before` keys come before the first query."""
    position = torch.arange(before + length, device=device)
    distance = position[before:, None] - position[None, :]
    return (distance >= 0) & (distance < (window or before + length))
