"""Queries, keys and values of attention, from what the projections give, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.fused.structure import Order
from veneer.kernels.norm import Norm
from veneer.kernels.rotary import Rotary


@dataclass(frozen=True, kw_only=True)
class _AnyHeads:
    """What all heads have. q_factor (tokens, 1, 1): what q, or its gradient, is multiplied with, or
    None for 1."""

    heads: int
    head_dim: int
    value_dim: int
    rotary: Rotary | None = None
    q_factor: Tensor | None = None

    def _turned(self, x: Tensor, *, back: bool = False) -> Tensor:
        return x if self.rotary is None else self.rotary.rotate(x, back=back)

    def _scaled(self, q: Tensor) -> Tensor:
        return q if self.q_factor is None else q * self.q_factor


@dataclass(frozen=True, kw_only=True)
class Heads(_AnyHeads):
    """How q (tokens, heads, head_dim), k (tokens, key_heads, head_dim) and v (tokens, key_heads,
    value_dim) come from the projections' outputs, (tokens, out) each.

    q_norm, k_norm: over each head, or over all of a token's, by the size of their weight.
    """

    key_heads: int
    order: Order
    q_norm: Norm | None = None
    k_norm: Norm | None = None

    @property
    def turning(self) -> int:
        """How many dims of a head may turn."""
        return self.head_dim

    def split(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v before norms and rotation, as views where that is possible."""
        if self.order == "separate":
            q, k, v = outputs
        else:
            (joined,) = outputs
            sizes = [self.heads * self.head_dim, self.key_heads * self.head_dim]
            if self.order == "blocks":
                q, k, v = joined.split([*sizes, self.key_heads * self.value_dim], 1)
            else:
                groups = joined.unflatten(1, (self.key_heads, -1, self.head_dim))
                q, k, v = (x.flatten(1) for x in groups.split([groups.shape[2] - 2, 1, 1], 2))
        return (
            q.view(-1, self.heads, self.head_dim),
            k.view(-1, self.key_heads, self.head_dim),
            v.view(-1, self.key_heads, self.value_dim),
        )

    def join(self, dq: Tensor, dk: Tensor, dv: Tensor) -> list[Tensor]:
        """Return the gradients of the projections' outputs from those of what `split` returns."""
        if self.order == "by key head":
            dq, dk, dv = (d.unflatten(1, (self.key_heads, -1)) for d in (dq, dk, dv))
            return [torch.cat([dq, dk, dv], 2).flatten(1)]
        flat = [d.flatten(1) for d in (dq, dk, dv)]
        return flat if self.order == "separate" else [torch.cat(flat, 1)]

    def forward(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v as attention takes them."""
        q, k, v = self.split(outputs)
        q = self._turned(_normed(q, self.q_norm))
        k = self._turned(_normed(k, self.k_norm))
        return self._scaled(q), k, v

    def backward(
        self, dq: Tensor, dk: Tensor, dv: Tensor, outputs: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return the gradients of the projections' outputs from those of q, k and v."""
        q, k, _ = self.split(outputs)
        dq, dk = self._turned(self._scaled(dq), back=True), self._turned(dk, back=True)
        return self.join(_back_through(dq, q, self.q_norm), _back_through(dk, k, self.k_norm), dv)


@dataclass(frozen=True, kw_only=True)
class LatentHeads(_AnyHeads):
    """How q, k (tokens, heads, head_dim) and v (tokens, heads, value_dim) come from what gives q,
    from what gives the shared dims that turn, as its last ones, and from what gives k and v side by
    side in each head. turning: dims of a head that turn, the last ones.
    """

    turning: int

    @property
    def first_turning(self) -> int:
        """The first of a head's dims that turn: those before it are of no position."""
        return self.head_dim - self.turning

    def forward(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v as attention takes them."""
        own_q, compressed, expanded = outputs
        q = own_q.view(-1, self.heads, self.head_dim)
        if self.rotary is not None:
            q = torch.cat([q[..., : self.first_turning], self._turned(q[..., -self.turning :])], 2)
        k_and_v = expanded.view(-1, self.heads, self.first_turning + self.value_dim)
        shared = self._turned(compressed[:, None, -self.turning :])
        k = torch.cat([k_and_v[..., : self.first_turning], shared.expand(-1, self.heads, -1)], 2)
        v = k_and_v[..., self.first_turning :]
        return self._scaled(q), k, v

    def backward(
        self, dq: Tensor, dk: Tensor, dv: Tensor, outputs: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return the gradients of the outputs from those of q, k and v; of the shared dims alone
        where they have other numbers beside them."""
        dq = self._scaled(dq)
        if self.rotary is not None:
            turned = self._turned(dq[..., -self.turning :], back=True)
            dq = torch.cat([dq[..., : self.first_turning], turned], 2)
        d_shared = self._turned(dk[..., -self.turning :].sum(1, keepdim=True), back=True)
        d_expanded = torch.cat([dk[..., : self.first_turning], dv], 2)
        return [dq.flatten(1), d_shared.flatten(1), d_expanded.flatten(1)]


def _by_row(x: Tensor, norm: Norm) -> Tensor:
    """Return x (tokens, heads, dim) as the rows that a norm is over."""
    rows = x.reshape(-1, x.shape[-1])
    whole = norm.weight is not None and len(norm.weight) != x.shape[-1]
    return x.flatten(1) if whole else rows


def _normed(x: Tensor, norm: Norm | None) -> Tensor:
    return x if norm is None else norm.forward(_by_row(x, norm))[0].view(x.shape)


def _back_through(dy: Tensor, x: Tensor, norm: Norm | None) -> Tensor:
    if norm is None:
        return dy
    rows = _by_row(x, norm)
    _, statistics = norm.forward(rows)
    return norm.backward(_by_row(dy, norm), rows, statistics, None).view(x.shape)
