"""The two halves of a LLaMA-like decoder layer, each one function, forward and backward.

    x + o(attention(rotary(q, k), v))        with q, k, v of RMSNorm(x)
    x + down(silu(gate) · up)                with gate, up of RMSNorm(x)

Autograd would keep each operation's inputs. These keep the residual stream, the projections and
what attention gave; norms and products of activations are cheap and made again. Everything frozen
but the adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from veneer.kernels.arena import Arena
from veneer.kernels.attention import Attention
from veneer.kernels.gain import swiglu_gain_backward
from veneer.kernels.gated import swiglu, swiglu_backward
from veneer.kernels.norm import rms_norm, rms_norm_backward
from veneer.kernels.rotary import rotate_
from veneer.lowrank.projection import (
    Projection,
    gradient_of_h,
    gradient_of_x,
    gradients_of_trained,
    project,
    through_gains,
)

Sum = tuple[Tensor, Tensor]  # two tensors (tokens, dim) of which something is the sum


@dataclass(frozen=True)
class Norm:
    """RMSNorm's weight (dim,) and eps."""

    weight: Tensor
    eps: float


@dataclass(frozen=True)
class SelfAttention:
    """The first half. cos, sin (tokens, head_dim): angles of the tokens' positions.

    With `sparing`, q, k and v are not kept but made again in the backward pass.
    """

    norm: Norm
    inputs: tuple[Projection, Projection, Projection]  # q, k, v
    output: Projection
    attention: Attention
    cos: Tensor
    sin: Tensor
    arena: Arena
    sparing: bool = False

    def __call__(self, x: Tensor) -> tuple[Tensor, Sum | None]:
        """Return x (tokens, dim) after this half, and what it is the sum of, if that is kept."""
        out, y = _SelfAttention.apply(x, self, *_trained(*self.inputs, self.output))
        return out, None if y is None else (x.detach(), y)

    def project(self, x: Tensor) -> list[Tensor]:
        """Return q, k, v (tokens, heads, head_dim), turned, and the low-rank A x of all."""
        *outputs, h = _project_normed(x, self)
        q, k, v = (y.unflatten(1, (-1, self.cos.shape[1])) for y in outputs)
        return [rotate_(q, self.cos, self.sin), rotate_(k, self.cos, self.sin), v, h]

    def unturned(self, y: Tensor, projection: Projection) -> Tensor:
        """Return q or k (tokens, heads · head_dim) as it was projected, if somebody needs it so."""
        if projection.gain is not None:
            y = rotate_(y.clone(), self.cos, self.sin, back=True)
        return y.flatten(1)


class _SelfAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, half: SelfAttention, *trained: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        out, y_out, h_out = _room_onto(x, half.output, half.arena)
        q, k, v, h = half.project(x)
        y, log_sums = half.attention.forward(q, k, v)
        flat = half.arena.empty(len(x), y[0].numel(), x)  # (tokens, heads · head_dim)
        flat.copy_(y.flatten(1))
        _project_onto(x, flat, half.output, out, y_out, h_out)
        ctx.half = half
        kept = () if half.sparing else (q, k, v, h)
        ctx.save_for_backward(x, flat, y_out, h_out, *kept, *log_sums)
        if y_out is not None:
            ctx.mark_non_differentiable(y_out)
        return out, y_out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        half: SelfAttention = ctx.half
        needs_x = ctx.needs_input_grad[0]
        dy = grads[0]  # (tokens, dim)
        x, flat, y_out, h_out, *rest = ctx.saved_tensors
        q, k, v, h = half.project(x) if half.sparing else rest[:4]
        log_sums = rest if half.sparing else rest[4:]
        out = [half.output]
        dz, d_gains = through_gains([dy], [y_out], out, in_place=False)
        dh_out = gradient_of_h(dz, out)
        d_out = gradients_of_trained(dz, d_gains, dh_out, flat, h_out, out)
        if not needs_x and not any(p.rank for p in half.inputs):
            return None, None, *d_out
        d_flat = gradient_of_x(dz, dh_out, out)
        dq, dk, dv = half.attention.backward(
            d_flat.view(q.shape), q, k, v, flat.view(q.shape), log_sums
        )
        dq = rotate_(dq.contiguous(), half.cos, half.sin, back=True)
        dk = rotate_(dk.contiguous(), half.cos, half.sin, back=True)
        d_inputs = [d.flatten(1) for d in (dq, dk, dv)]
        outputs = [half.unturned(y, p) for y, p in zip((q, k), half.inputs, strict=False)]
        outputs.append(v.flatten(1))
        dz, d_gains = through_gains(d_inputs, outputs, half.inputs, in_place=True)
        dx, found = _back_to_x(dy, dz, d_gains, x, h, half, needs_x=needs_x)
        return dx, None, *found, *d_out


@dataclass(frozen=True)
class FeedForward:
    """The second half. With `sparing`, gate and up are made again in the backward pass.

    known: x as a sum of two tensors that are kept anyway, from which it comes back to the bit.
    """

    norm: Norm
    inputs: tuple[Projection, Projection]  # gate, up
    output: Projection
    arena: Arena
    sparing: bool = False
    known: Sum | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Return x (tokens, dim) after this half."""
        return _FeedForward.apply(x, self, *_trained(*self.inputs, self.output))

    def project(self, x: Tensor) -> list[Tensor]:
        """Return gate and up (tokens, inner), and the low-rank A x of both."""
        return _project_normed(x, self)

    def through_inner(
        self, dy: Tensor, gate: Tensor, up: Tensor
    ) -> tuple[Sequence[Tensor], Sequence[Tensor | None], Tensor]:
        """Return what `through_gains` does of gate and up, and silu(gate) · up, (tokens, inner)."""
        first, second = self.inputs
        if first.gain is not None and second.gain is not None:
            gains, biases = (first.gain, second.gain), (first.bias, second.bias)
            return swiglu_gain_backward(dy, gate, up, gains, biases)
        *d_inputs, inner = swiglu_backward(dy, gate, up)
        return *through_gains(d_inputs, [gate, up], self.inputs, in_place=True), inner


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, half: FeedForward, *trained: Tensor) -> Tensor:
        out, y_out, h_out = _room_onto(x, half.output, half.arena)
        gate, up, h = half.project(x)
        _project_onto(x, swiglu(gate, up), half.output, out, y_out, h_out)
        kept = () if half.sparing else (gate, up, h)
        ctx.save_for_backward(*(half.known or (x, None)), y_out, h_out, *kept)
        ctx.half = replace(half, known=None)  # or it would be held beyond the backward pass
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        half: FeedForward = ctx.half
        needs_x = ctx.needs_input_grad[0]
        dy = grads[0]  # (tokens, dim)
        x, added, y_out, h_out, *kept = ctx.saved_tensors
        x = x if added is None else _sum((x, added))
        gate, up, h = half.project(x) if half.sparing else kept
        out = [half.output]
        dz, d_gains = through_gains([dy], [y_out], out, in_place=False)
        dh_out = gradient_of_h(dz, out)
        d_inner = gradient_of_x(dz, dh_out, out)
        d_both, both_gains, inner = half.through_inner(d_inner, gate, up)
        d_out = gradients_of_trained(dz, d_gains, dh_out, inner, h_out, out)
        dx, found = _back_to_x(dy, d_both, both_gains, x, h, half, needs_x=needs_x)
        return dx, None, *found, *d_out


def _trained(*projections: Projection) -> list[Tensor]:
    return [tensor for projection in projections for tensor in projection.trained()]


def _project_normed(x: Tensor, half: SelfAttention | FeedForward) -> list[Tensor]:
    """Return the outputs of `half.inputs` over RMSNorm(x), and the low-rank A x of all."""
    *outputs, h = made = _room(x, half.inputs, half.arena)
    normed, _ = rms_norm(x, half.norm.weight, half.norm.eps)
    project(normed, half.inputs, outputs, h)
    return made


def _back_to_x(
    dy: Tensor,
    dz: Sequence[Tensor],
    d_gains: Sequence[Tensor | None],
    x: Tensor,
    h: Tensor,
    half: SelfAttention | FeedForward,
    *,
    needs_x: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """Return the gradients of x, where needed, and of what trains in `half.inputs`, from those of
    the half's output, which x reaches beside everything, and from what `through_gains` gave."""
    normed, rstd = rms_norm(x, half.norm.weight, half.norm.eps)
    dh = gradient_of_h(dz, half.inputs)
    found = gradients_of_trained(dz, d_gains, dh, normed, h, half.inputs)
    if not needs_x:
        return None, found
    d_normed = gradient_of_x(dz, dh, half.inputs)
    return rms_norm_backward(d_normed, x, half.norm.weight, rstd, dy), found


def _project_onto(
    residual: Tensor, x: Tensor, p: Projection, out: Tensor, y: Tensor | None, h: Tensor
) -> None:
    """Write residual + the projection of x to `out`, the projection alone to `y`, where that is
    needed, and A x to `h`.

    The residual comes last: it is much the largest, and every sum with it is rounded at its size.
    """
    if y is None:
        project(x, [p], [out], h)
        out += residual
    else:
        project(x, [p], [y], h)
        _sum((residual, y), out=out)


def _sum(parts: Sum, out: Tensor | None = None) -> Tensor:
    """Return the sum of a residual and what is added to it, always in the same order."""
    return torch.add(*parts, out=out)


def _room_onto(x: Tensor, p: Projection, arena: Arena) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return empty tensors for what `_project_onto` writes."""
    out, h = _room(x, [p], arena)
    y = None if p.gain is None else arena.empty(len(x), p.out_features, x)
    return out, y, h


def _room(x: Tensor, group: Sequence[Projection], arena: Arena) -> list[Tensor]:
    """Return empty tensors for the outputs of `group` and for its A x."""
    columns = (*(p.out_features for p in group), sum(p.rank for p in group))
    return [arena.empty(len(x), n, x) for n in columns]
