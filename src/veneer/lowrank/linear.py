"""A linear layer alone with what adapters add to it, as one function, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from veneer.lowrank.group import Group, Masks, Projection
from veneer.lowrank.projection import (
    gradient_of_h,
    gradient_of_x,
    gradients_of_trained,
    project,
    shape_of_h,
    through_gains,
)
from veneer.quant.weight import QuantizedWeight


class LowRankLinear(torch.autograd.Function):
    """y = x Wᵀ + b + x Aᵀ Bᵀ, with B already scaled; with masks, each adapter's x has its own;
    acts_on is that of `Projection`.

    Plain autograd would keep x for W, x again (dropped out) for A, and both factors' outputs. Here
    x is kept once, together with x Aᵀ (tokens, rank). W and b cost nothing while they are frozen;
    one that trains beside the adapter has its gradient too.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (tokens, in)
        weight: Tensor | QuantizedWeight,  # (out, in)
        bias: Tensor | None,  # (out,)
        A: Tensor,  # (rank, in), x's dtype
        B: Tensor,  # (out, rank), x's dtype, scaled
        masks: Masks,
        acts_on: Tensor | None = None,
    ) -> Tensor:
        # Never a view: what follows may add to y in place (Falcon does), and autograd forbids that
        # for views that are made in here.
        y = x.new_empty(len(x), weight.shape[0])  # (tokens, out)
        h = x.new_empty(len(x), len(A))  # (tokens, rank)
        group = Group([Projection(weight, bias, A, B, masks=masks, acts_on=acts_on)])
        project(x, group, [y], h)
        ctx.weight = weight  # no step changes it before the backward pass
        ctx.masks, ctx.acts_on = masks, acts_on
        ctx.save_for_backward(x, A, B, h)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, h = ctx.saved_tensors
        dy = grads[0]  # (tokens, out)
        needs_x, needs_W, needs_b, needs_A, *_ = ctx.needs_input_grad
        group = Group([Projection(ctx.weight, None, A, B, masks=ctx.masks, acts_on=ctx.acts_on)])
        dh = gradient_of_h([dy], group) if needs_x or needs_A else h
        dA, dB = gradients_of_trained([dy], [[None]], dh, x, h, group)
        dx = gradient_of_x([dy], dh, group) if needs_x else None
        dW = dy.T @ x if needs_W else None  # (out, in)
        db = dy.sum(0) if needs_b else None  # (out,)
        return dx, dW, db, dA, dB, None, None


class ProjectedSegments(torch.autograd.Function):
    """The output of a projection with segments, (tokens, out), for x (tokens, in)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: Projection, *trained: Tensor) -> Tensor:
        y = x.new_empty(len(x), p.out_features)
        ctx.group = group = Group([p])
        h = x.new_empty(shape_of_h(group, len(x)))
        project(x, group, [y], h)
        ctx.save_for_backward(x, h, y if p.has_gain else None)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        group, (x, h, y) = ctx.group, ctx.saved_tensors
        dz, d_gains = through_gains(grads, [y], group, in_place=False)
        dh = gradient_of_h(dz, group)
        d_trained = gradients_of_trained(dz, d_gains, dh, x, h, group)
        return gradient_of_x(dz, dh, group) if ctx.needs_input_grad[0] else None, None, *d_trained
