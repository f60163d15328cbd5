"""The two halves of a LLaMA-like decoder layer, each one function, forward and backward.

    x + o(attention(rotary(q, k), v))        with q, k, v of RMSNorm(x)
    x + down(silu(gate) · up)                with gate, up of RMSNorm(x)

Autograd would keep each operation's inputs. These functions keep the residual stream, the
projections and the output of attention; norms and products of activations are cheap, and the
backward pass computes them again. All weights are frozen but the adapters'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from veneer.kernels.activation import activate, activate_backward
from veneer.kernels.arena import Arena
from veneer.kernels.attention import Attention
from veneer.kernels.gain import activate_gain_backward
from veneer.kernels.norm import Norm
from veneer.kernels.rotary import Rotary
from veneer.lowrank.projection import (
    Projection,
    gradient_of_h,
    gradient_of_x,
    gradients_of_trained,
    project,
    through_gains,
)

Summands = tuple[Tensor, Tensor]  # two tensors (tokens, dim)


@dataclass(frozen=True)
class SelfAttention:
    """The first half. rotary: by the angles of the tokens' positions, over whole heads.

    With `recompute_projections`, the backward pass computes q, k and v again; they are not kept.
    """

    norm: Norm
    inputs: tuple[Projection, Projection, Projection]  # q, k, v
    output: Projection
    attention: Attention
    rotary: Rotary
    arena: Arena
    recompute_projections: bool = False

    def __call__(self, x: Tensor) -> tuple[Tensor, Summands | None]:
        """Return x (tokens, dim) after this half, and its two summands where both are kept."""
        out, y = _SelfAttention.apply(x, self, *_trained(*self.inputs, self.output))
        return out, None if y is None else (x.detach(), y)

    def project(self, x: Tensor) -> list[Tensor]:
        """Return q, k, v (tokens, heads, head_dim), q and k rotated, and the low-rank A x."""
        *outputs, h = _project_normed(x, self)
        q, k, v = (y.unflatten(1, (-1, 2 * self.rotary.cos.shape[1])) for y in outputs)
        return [self.rotary.rotate_(q), self.rotary.rotate_(k), v, h]

    def unrotated(self, y: Tensor, projection: Projection) -> Tensor:
        """Return q or k (tokens, heads · head_dim) as the projection gave it. Only the gradient of
        a gain reads it; without a gain y is returned as it is."""
        if projection.gain is not None:
            y = self.rotary.rotate(y, back=True)
        return y.flatten(1)


class _SelfAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, half: SelfAttention, *trained: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        out, y_out, h_out = _empty_onto(x, half.output, half.arena)
        q, k, v, h = half.project(x)
        y, log_sums = half.attention.forward(q, k, v)
        flat = half.arena.empty(len(x), y[0].numel(), x)  # (tokens, heads · head_dim)
        flat.copy_(y.flatten(1))
        _project_onto(x, flat, half.output, out, y_out, h_out)
        ctx.half = half
        projections = () if half.recompute_projections else (q, k, v, h)
        ctx.save_for_backward(x, flat, y_out, h_out, *projections, *log_sums)
        if y_out is not None:
            ctx.mark_non_differentiable(y_out)
        return out, y_out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        half: SelfAttention = ctx.half
        needs_x = ctx.needs_input_grad[0]
        dy = grads[0]  # (tokens, dim)
        x, flat, y_out, h_out, *saved = ctx.saved_tensors
        if half.recompute_projections:
            (q, k, v, h), log_sums = half.project(x), saved
        else:
            (q, k, v, h), log_sums = saved[:4], saved[4:]
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
        dq = half.rotary.rotate_(dq.contiguous(), back=True)
        dk = half.rotary.rotate_(dk.contiguous(), back=True)
        d_inputs = [d.flatten(1) for d in (dq, dk, dv)]
        outputs = [half.unrotated(y, p) for y, p in zip((q, k), half.inputs, strict=False)]
        outputs.append(v.flatten(1))
        dz, d_gains = through_gains(d_inputs, outputs, half.inputs, in_place=True)
        dx, d_trained = _back_to_x(dy, dz, d_gains, x, h, half, needs_x=needs_x)
        return dx, None, *d_trained, *d_out


@dataclass(frozen=True)
class FeedForward:
    """The second half.

    With `recompute_projections`, the backward pass computes gate and up again; they are not kept.
    summands: two tensors that are kept anyway and whose sum is x, to the bit; then x is not kept.
    """

    norm: Norm
    inputs: tuple[Projection, Projection]  # gate, up
    output: Projection
    arena: Arena
    recompute_projections: bool = False
    summands: Summands | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Return x (tokens, dim) after this half."""
        return _FeedForward.apply(x, self, *_trained(*self.inputs, self.output))

    def project(self, x: Tensor) -> list[Tensor]:
        """Return gate and up (tokens, inner), and the low-rank A x of both."""
        return _project_normed(x, self)

    def through_inner(
        self, dy: Tensor, gate: Tensor, up: Tensor
    ) -> tuple[Sequence[Tensor], Sequence[Tensor | None], Tensor]:
        """Return what `through_gains` returns for gate and up, and silu(gate) · up, from the
        gradient of that product; all (tokens, inner)."""
        first, second = self.inputs
        d_inputs = (torch.empty_like(gate), torch.empty_like(up))
        if first.gain is not None and second.gain is not None:
            gains, biases = (first.gain, second.gain), (first.bias, second.bias)
            d_gains, inner = activate_gain_backward("silu", dy, gate, up, gains, biases, *d_inputs)
            return d_inputs, d_gains, inner
        inner = activate_backward("silu", dy, gate, up, *d_inputs)
        return *through_gains(d_inputs, [gate, up], self.inputs, in_place=True), inner


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, half: FeedForward, *trained: Tensor) -> Tensor:
        out, y_out, h_out = _empty_onto(x, half.output, half.arena)
        gate, up, h = half.project(x)
        _project_onto(x, activate("silu", gate, up), half.output, out, y_out, h_out)
        projections = () if half.recompute_projections else (gate, up, h)
        ctx.save_for_backward(*(half.summands or (x, None)), y_out, h_out, *projections)
        ctx.half = replace(half, summands=None)  # or it would be held beyond the backward pass
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        half: FeedForward = ctx.half
        needs_x = ctx.needs_input_grad[0]
        dy = grads[0]  # (tokens, dim)
        x, added, y_out, h_out, *projections = ctx.saved_tensors
        x = x if added is None else _sum((x, added))
        gate, up, h = half.project(x) if half.recompute_projections else projections
        out = [half.output]
        dz, d_gain = through_gains([dy], [y_out], out, in_place=False)
        dh_out = gradient_of_h(dz, out)
        d_inner = gradient_of_x(dz, dh_out, out)
        d_inputs, d_gains, inner = half.through_inner(d_inner, gate, up)
        d_out = gradients_of_trained(dz, d_gain, dh_out, inner, h_out, out)
        dx, d_trained = _back_to_x(dy, d_inputs, d_gains, x, h, half, needs_x=needs_x)
        return dx, None, *d_trained, *d_out


def _trained(*projections: Projection) -> list[Tensor]:
    return [tensor for projection in projections for tensor in projection.trained()]


def _project_normed(x: Tensor, half: SelfAttention | FeedForward) -> list[Tensor]:
    """Return the outputs of `half.inputs` over RMSNorm(x), and the low-rank A x of all."""
    outputs_and_h = _empty(x, half.inputs, half.arena)
    *outputs, h = outputs_and_h
    normed, _ = half.norm.forward(x)
    project(normed, half.inputs, outputs, h)
    return outputs_and_h


def _back_to_x(
    dy: Tensor,
    dz: Sequence[Tensor],
    d_gains: Sequence[Tensor | None],
    x: Tensor,
    h: Tensor,
    half: SelfAttention | FeedForward,
    *,
    needs_x: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the gradient of x, where needed, and those of what trains in `half.inputs`.

    dy: the gradient of the half's output, to which x is added unchanged (the residual). dz and
    d_gains: what `through_gains` returned for `half.inputs`.
    """
    normed, statistics = half.norm.forward(x)
    dh = gradient_of_h(dz, half.inputs)
    d_trained = gradients_of_trained(dz, d_gains, dh, normed, h, half.inputs)
    if not needs_x:
        return None, d_trained
    d_normed = gradient_of_x(dz, dh, half.inputs)
    return half.norm.backward(d_normed, x, statistics, dy), d_trained


def _project_onto(
    residual: Tensor, x: Tensor, p: Projection, out: Tensor, y: Tensor | None, h: Tensor
) -> None:
    """Write residual + the projection of x to `out`, the projection alone to `y`, unless that is
    None, and A x to `h`.

    The residual is added last: it is much the largest, and a sum with it is rounded at its size.
    """
    if y is None:
        project(x, [p], [out], h)
        out += residual
    else:
        project(x, [p], [y], h)
        _sum((residual, y), out=out)


def _sum(summands: Summands, out: Tensor | None = None) -> Tensor:
    """Return the sum of a residual and what is added to it, in one order: equal to the bit."""
    return torch.add(*summands, out=out)


def _empty_onto(x: Tensor, p: Projection, arena: Arena) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return empty tensors for what `_project_onto` writes."""
    out, h = _empty(x, [p], arena)
    y = None if p.gain is None else arena.empty(len(x), p.out_features, x)
    return out, y, h


def _empty(x: Tensor, group: Sequence[Projection], arena: Arena) -> list[Tensor]:
    """Return empty tensors for the outputs of `group` and for its A x."""
    columns = (*(p.out_features for p in group), sum(p.rank for p in group))
    return [arena.empty(len(x), n, x) for n in columns]
