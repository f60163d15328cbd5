"""Causal attention over sequences that are packed end to end, without padding between them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.kernels import choice
from veneer.kernels.cpu_flash import flash_shares_keys, prefers_blocks
from veneer.kernels.dropout import Mask
from veneer.kernels.flex import flex_attention
from veneer.kernels.packing import Packing
from veneer.kernels.rows import row_dots
from veneer.kernels.score_blocks import QUERY_BLOCK, ScoreBlocks, query_blocks, visible_keys
from veneer.kernels.varlen import VarlenAttention

__all__ = ["NAME", "Attention", "Packing", "UnsupportedAttention", "packed_attention"]

NAME = "veneer_packed"  # in transformers' AttentionInterface
BLOCKS = 2**32  # more than a group of sequences has
GROUPS = 2**16  # more than a batch has
# Queries of a block where torch's own operations attend: a mask is never larger than this many by
# as many and the window.
COMPOSED_BLOCK = 2048
# Names that transformers' configurations have for how many keys a kind of layer sees.
WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}


class UnsupportedAttention(NotImplementedError):
    """The model needs a kind of attention that the packed kernel does not compute."""


def packed_attention(
    module: nn.Module,
    query: Tensor,  # (1, heads, tokens, head_dim)
    key: Tensor,  # (1, kv_heads, tokens, head_dim)
    value: Tensor,  # (1, kv_heads, tokens, value_dim)
    attention_mask: Tensor | None,
    *,
    packing: Packing | None = None,
    dropout: float | Mask = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Return `Attention` within each sequence, (1, tokens, heads, value_dim).

    Has the signature of transformers' AttentionInterface; s_aux are the sinks. Raises
    UnsupportedAttention for biased attention and trained sinks, and where the model does not pass
    `packing` or its window on.
    """
    if options.get("position_bias") is not None:
        raise UnsupportedAttention("position_bias")
    if not sliding_window and _is_masked_elsewhere(module):
        raise UnsupportedAttention("the window does not reach attention")
    if packing is None or attention_mask is not None:
        raise UnsupportedAttention("the packing does not reach attention")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    mask = dropout if isinstance(dropout, Mask) else Mask.drawn(dropout) if dropout else None
    attention = Attention(packing, scale, sliding_window or None, softcap or None, s_aux, mask)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if packing.prefix is not None:
        layer: Any = module
        y = attention.composed(q, k, v, packing.prefix[layer.layer_idx])
    elif attention.composes(q, v):
        y = attention.composed(q, k, v)
    else:
        y = _PackedAttention.apply(q, k, v, attention)
    return y.unsqueeze(0), None


@dataclass(frozen=True)
class Attention:
    """softmax(t) v within each sequence of a packed batch, with t = scale · q kᵀ: every query sees
    the keys up to its own position, and of those the last `window`. Where the batch is dealt over
    processes, q, k and v are this process's own.

    softcap: t = softcap · tanh(scale · q kᵀ / softcap) instead. sinks: one frozen logit for each
    head, (heads,), which takes part in the softmax's sum and has no value. dropout: what multiplies
    the probabilities.

    q (tokens, heads, head_dim) and y (tokens, heads, value_dim); k and v (tokens, kv_heads, dim).
    Memory grows with the length of a sequence, not with its square.
    """

    packing: Packing
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout: Mask | None = None

    def __post_init__(self) -> None:
        if self.sinks is not None and self.sinks.requires_grad:
            raise UnsupportedAttention("the gradient of attention sinks")

    def composed(self, q: Tensor, k: Tensor, v: Tensor, prefix: Tensor | None = None) -> Tensor:
        """Return y by torch's own differentiable operations, on any device.

        prefix (2, kv_heads, virtual, head_dim): keys and values of tokens right before each
        sequence, which its queries see too. Autograd keeps the probabilities of soft-capped scores.
        """
        if prefix is None and self._way(q, v) == "flex":
            mask = self.packing.block_mask(self.window)
            return flex_attention(q, k, v, mask, self.scale, softcap=self.softcap, sinks=self.sinks)
        outputs = []
        for query, key, value in self._groups(q, k, v):
            if prefix is not None:
                key, value = (
                    torch.cat([x.transpose(0, 1).expand(len(own), -1, -1, -1), own], dim=1)
                    for x, own in zip(prefix, (key, value), strict=True)
                )  # (sequences, virtual + length, kv_heads, head_dim)
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))
            length = query.shape[2]
            before = key.shape[2] - length
            plain = not (before or self._is_narrow(length) or self._changes_softmax)
            blocks = [
                self._composed_block(
                    *(query[:, :, queries], key[:, :, keys], value[:, :, keys]),
                    None if plain else visible_keys(queries, keys, self.window, q.device, before),
                )
                for queries, keys in query_blocks(
                    length, self.window, length if plain else COMPOSED_BLOCK, before
                )
            ]
            outputs.append(torch.cat(blocks, dim=2).transpose(1, 2))
        return self.packing.from_groups(outputs)

    def _composed_block(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        """Return y of some queries, (sequences, heads, queries, value_dim).

        visible: which keys each query sees, or None where these are all up to its own position.
        """
        shared = q.shape[1] // k.shape[1]
        dropout = 0.0 if self.dropout is None else self.dropout.p
        if not self._changes_softmax:
            return F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=None if visible is None else _bias(visible, q.dtype),
                is_causal=visible is None,
                dropout_p=dropout,
                scale=self.scale,
                enable_gqa=shared > 1,
            )
        assert visible is not None
        t = self.scale * (q @ k.repeat_interleave(shared, 1).transpose(2, 3))
        if self.softcap is not None:
            t = self.softcap * torch.tanh(t / self.softcap)
        t = t.masked_fill(~visible, -torch.inf)
        if self.sinks is not None:
            sinks = self.sinks.to(t)[:, None, None].expand(*t.shape[:3], 1)
            t = torch.cat([t, sinks], dim=3)
        wide = torch.promote_types(t.dtype, torch.float32)
        p = t.softmax(3, dtype=wide)[..., : k.shape[2]].to(q.dtype)
        return F.dropout(p, dropout) @ v.repeat_interleave(shared, 1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return y, and log Σ exp of each group's t and sinks, (sequences, heads, length); of all
        tokens, (heads, tokens), where they are computed as they lie."""
        if self.composes(q, v):
            return self.composed(q, k, v), []
        if self._way(q, v) == "varlen":
            y, log_sum = self._varlen.forward(q, k, v)
            y, log_sum = self._with_sinks(y, log_sum)
            return y, [log_sum]
        if groups := self._by_key_heads(q, k, v):
            results = [
                one.forward(q[:, heads], k[:, keys], v[:, keys]) for one, heads, keys in groups
            ]
            log_sums = [
                torch.cat(of_group, 1) for of_group in zip(*(of for _, of in results), strict=True)
            ]
            return torch.cat([y for y, _ in results], 1), log_sums
        outputs, log_sums = [], []
        flash = self.softcap is None and self.dropout is None and not prefers_blocks(q.dtype)
        for number, tensors in enumerate(self._groups(q, k, v)):
            attend = self._flash if flash else self._blocks(number).forward
            y, log_sum = attend(*tensors)
            y, log_sum = self._with_sinks(y, log_sum)
            outputs.append(y)
            log_sums.append(log_sum)
        return self.packing.from_groups(outputs), log_sums

    def backward(
        self, dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, log_sums: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q, k and v from dy and from `forward`'s inputs and results."""
        if self._way(q, v) == "varlen":
            return self._varlen.backward(dy, q, k, v, y, log_sums[0])
        if self.composes(q, v):
            with torch.enable_grad():
                q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
                dq, dk, dv = torch.autograd.grad(self.composed(q, k, v), (q, k, v), dy)
            return dq, dk, dv
        if groups := self._by_key_heads(q, k, v):
            results = [
                one.backward(
                    dy[:, heads],
                    q[:, heads],
                    k[:, keys],
                    v[:, keys],
                    y[:, heads],
                    [log_sum[:, heads] for log_sum in log_sums],
                )
                for one, heads, keys in groups
            ]
            dq, dk, dv = (torch.cat(of_all, 1) for of_all in zip(*results, strict=True))
            return dq, dk, dv
        packing = self.packing
        gradients = zip(
            packing.split(packing.gradient_to_groups(dy)),
            packing.split(packing.gradient_to_groups(row_dots(dy, y))),
            log_sums,
            strict=True,
        )
        dq_groups, dk_groups, dv_groups = [], [], []
        for number, ((group_dy, delta, log_sum), tensors) in enumerate(
            zip(gradients, self._groups(q, k, v), strict=True)
        ):
            leaks = None if self.sinks is None else (self._sinks(log_sum) - log_sum).exp()
            blocks = self._blocks(number)
            dq, dk, dv = blocks.backward(group_dy, delta, log_sum, leaks, *tensors)
            dq_groups.append(dq)
            dk_groups.append(dk)
            dv_groups.append(dv)
        dk, dv = packing.gradient_of_keys(dk_groups, dv_groups, k.dtype)
        return packing.from_groups(dq_groups), dk, dv

    def _flash(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return y and log Σ exp of one group by torch's flash kernel."""
        length, keys_in_all, value_dim = q.shape[1], v.shape[1], v.shape[3]
        dim = max(q.shape[3], value_dim)  # the kernel wants one for all
        q, k, v = (F.pad(x, (0, dim - x.shape[3])) if x.shape[3] < dim else x for x in (q, k, v))
        if not flash_shares_keys():
            k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (sequences, heads, length, dim)
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        before = keys_in_all - length
        if not before and not self._is_narrow(length):
            y, log_sum = flash(q, k, v, is_causal=True, scale=self.scale)
            return y.transpose(1, 2)[..., :value_dim], log_sum.contiguous()
        y = q.new_empty(q.shape[0], length, q.shape[1], value_dim)
        log_sum = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        blocks = list(query_blocks(length, self.window, QUERY_BLOCK, before))
        # The last query of each block is at its last key, so one bias has those of all.
        rows, columns = (
            max(x.stop - x.start for x in of_all) for of_all in zip(*blocks, strict=True)
        )
        last = slice(length - rows, length), slice(keys_in_all - columns, keys_in_all)
        bias = _bias(visible_keys(*last, self.window, q.device, before), q.dtype)
        for queries, keys in blocks:
            block_y, log_sum[:, :, queries] = flash(
                q[:, :, queries],
                k[:, :, keys],
                v[:, :, keys],
                attn_mask=bias[queries.start - queries.stop :, keys.start - keys.stop :],
                scale=self.scale,
            )
            y[:, queries] = block_y.transpose(1, 2)[..., :value_dim]
        return y, log_sum

    def _by_key_heads(
        self, q: Tensor, k: Tensor, v: Tensor
    ) -> list[tuple[Attention, slice, slice]]:
        """Return the attention of some key heads at a time, with its heads and its key heads; none
        where it takes all at once."""
        at_once, all_heads = self.packing.key_heads_at_once(k, v), k.shape[1]
        if at_once >= all_heads:
            return []
        shared, groups = q.shape[1] // all_heads, []
        for first in range(0, all_heads, at_once):
            keys = slice(first, min(first + at_once, all_heads))
            heads = slice(shared * keys.start, shared * keys.stop)
            sinks = None if self.sinks is None else self.sinks[heads]
            dropout = self.dropout and self.dropout.numbered(first * GROUPS * BLOCKS)
            groups.append((replace(self, sinks=sinks, dropout=dropout), heads, keys))
        return groups

    def _groups(self, q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        packing = self.packing
        queries = packing.split(packing.to_groups(q))
        yield from zip(queries, *packing.key_groups(k, v), strict=True)

    def _is_narrow(self, length: int) -> bool:
        """Return whether the window hides a key from a sequence of this length."""
        return self.window is not None and length > self.window

    @property
    def _changes_softmax(self) -> bool:
        return self.softcap is not None or self.sinks is not None

    def composes(self, q: Tensor, v: Tensor) -> bool:
        """Return whether torch's differentiable operations compute y."""
        return self._way(q, v) in ("flex", "groups")

    def _way(self, q: Tensor, v: Tensor) -> choice.AttentionWay:
        return choice.attention(
            choice.device_of(q.device),
            q.dtype,
            max(q.shape[-1], v.shape[-1]),
            softcap=self.softcap is not None,
            dropout=self.dropout is not None,
            other_keys=not self.packing.sees_own_keys,
        )

    @property
    def _varlen(self) -> VarlenAttention:
        packing = self.packing
        window = self.window if self._is_narrow(packing.longest) else None
        return VarlenAttention(packing.starts, packing.longest, self.scale, window)

    def _blocks(self, group: int) -> ScoreBlocks:
        dropout = None if self.dropout is None else self.dropout.numbered(group * BLOCKS)
        return ScoreBlocks(self.scale, self.window, self.softcap, dropout)

    def _with_sinks(self, y: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor]:
        """Return y and log Σ exp with the sinks in the sum: y (..., length, heads, value_dim),
        log_sum (..., heads, length)."""
        if self.sinks is None:
            return y, log_sum
        # All keys together have the share exp(log_sum) of the new sum.
        total = torch.logaddexp(log_sum, self._sinks(log_sum))
        return y * (log_sum - total).exp().transpose(-1, -2)[..., None].to(y.dtype), total

    def _sinks(self, log_sum: Tensor) -> Tensor:
        assert self.sinks is not None
        return self.sinks.to(log_sum.dtype)[:, None]  # (heads, 1)


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


def _is_masked_elsewhere(module: nn.Module) -> bool:
    """Return whether the model's own masks hide more of a long row from this attention than its
    future: in Llama 4's chunks, or in a window that the code does not pass on (Qwen2-MoE)."""
    config, index = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    if kinds and index is not None:
        kind = kinds[index]
    else:
        code = sys.modules[type(module).__module__]
        kind = "sliding_attention" if hasattr(code, "create_sliding_window_causal_mask") else ""
    window = getattr(config, WINDOWS[kind], None) if kind in WINDOWS else None
    context = getattr(config, "max_position_embeddings", None)
    return window is not None and (context is None or window < context)


def _bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is added to scores, so that those of hidden keys are −∞."""
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, -torch.inf)
