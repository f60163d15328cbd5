"""The fused low-rank product: one function, forward and backward, that keeps x once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from veneer.quant.weight import QuantizedWeight, linear, product_back


class LowRankLinear(torch.autograd.Function):
    """y = x Wᵀ + b + (x ∘ keep) Aᵀ Bᵀ, with B already scaled.

    Plain autograd would keep x for W, x again (dropped out) for A, and both factors' outputs. Here
    x is kept once, together with x Aᵀ (tokens, rank), and W and b, which are frozen unless somebody
    lets them train beside the adapter, cost nothing:

        dh = dy B        dA = dhᵀ (x ∘ keep)        dB = dyᵀ h        dx = dy W + (dh A) ∘ keep
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (tokens, in)
        weight: Tensor | QuantizedWeight,  # (out, in)
        bias: Tensor | None,  # (out,)
        A: Tensor,  # (rank, in), x's dtype
        B: Tensor,  # (out, rank), x's dtype, scaled
        keep: Tensor | None,  # (tokens, in): 0 or 1 / (1 - dropout)
    ) -> Tensor:
        h = (x if keep is None else x * keep) @ A.T  # (tokens, rank)
        y = linear(x, weight, bias)  # (tokens, out)
        y.addmm_(h, B.T)
        ctx.weight = weight  # no step changes it before the backward pass
        ctx.save_for_backward(x, A, B, h, keep)
        # Never a view, for what follows may add to it in place (Falcon does), and autograd forbids
        # that for views that are made in here.
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, h, keep = ctx.saved_tensors
        dy = grads[0]  # (tokens, out)
        needs_x, needs_W, needs_b, needs_A, needs_B, _ = ctx.needs_input_grad
        dh = dy @ B if needs_x or needs_A else None  # (tokens, rank)
        dx = dA = dB = None
        dW = dy.T @ x if needs_W else None  # (out, in)
        db = dy.sum(0) if needs_b else None  # (out,)
        if needs_B:
            dB = dy.T @ h  # (out, rank)
        if needs_A:
            assert dh is not None
            dA = dh.T @ (x if keep is None else x * keep)  # (rank, in)
        if needs_x:
            assert dh is not None
            dx = product_back(dy, ctx.weight)  # (tokens, in)
            if keep is None:
                dx.addmm_(dh, A)
            else:
                dx += (dh @ A) * keep
        return dx, dW, db, dA, dB, None
