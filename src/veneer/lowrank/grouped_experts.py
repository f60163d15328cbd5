"""A mixture's routed experts by one product for all experts of a stack.

`experts.py` has the formula and what is kept. Here each operation is over the rows of all experts,
and their numbers stay on the device (`torch.nn.functional.grouped_mm`, with `offs` the ends of the
experts' rows), so that a card need never wait until it has been asked for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.kernels.choice import ALIGNED
from veneer.kernels.rows import row_dots
from veneer.lowrank.expert_gates import pulled_back
from veneer.lowrank.expert_stacks import Experts, Stack, StackUpdate
from veneer.lowrank.routing import Routing


def grouped_experts(
    x: Tensor,  # (tokens, in)
    weights: Tensor,  # (tokens, k)
    experts: Experts,
    routing: Routing,  # whole
    *,
    recompute: bool = False,
) -> Tensor:
    """Return Σ_j w_tj · expert_tj(x_t), (tokens, out), as `routed_experts` does.

    recompute: whether the backward pass computes the first stack again.
    """
    y: Tensor = _GroupedExperts.apply(
        x, weights, _Call(experts, routing, recompute), *experts.trained()
    )
    return y


def add_update(
    x: Tensor, y: Tensor, update: StackUpdate, routing: Routing, acts: Tensor | None = None
) -> Tensor:
    """Add B (A x) of each row's expert to `y`, (rows, out), and return A x, (rows, aligned rank).

    x (rows, in): sorted. acts (rows,): whether the update acts on each row; it does if None.
    """
    h = _through_A(x, update, routing)
    if acts is not None:
        h *= acts[:, None]
    y += F.grouped_mm(h, _aligned(update.Bt), offs=routing.ends)
    return h


@dataclass(frozen=True)
class _Call:
    experts: Experts
    routing: Routing
    recompute: bool


class _GroupedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, call: _Call, *trained: Tensor) -> Tensor:
        experts, routing = call.experts, call.routing
        up_y, h_up = _project(x[routing.token], experts.up, routing)
        y, h_down = _project(experts.gate.forward(up_y), experts.down, routing)
        if experts.post_norm is not None:
            y = experts.post_norm(y)
        ctx.call = call
        ctx.save_for_backward(x, weights, None if call.recompute else up_y, h_up, h_down)
        return routing.combined(y, weights, exact=experts.exact)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, up_y, h_up, h_down = ctx.saved_tensors
        experts, routing = ctx.call.experts, ctx.call.routing
        up, down = experts.up, experts.down
        needs_x, needs_weights, *_ = ctx.needs_input_grad
        dy = grads[0][routing.token]  # (rows, out), without w
        x_rows = x[routing.token]
        wide = torch.promote_types(dy.dtype, torch.float32)
        w = weights.reshape(-1)[routing.order].to(wide).unsqueeze(1)  # (rows, 1)
        if up_y is None:
            up_y, _ = _project(x_rows, up, routing)
        d_weights = None
        if experts.post_norm is not None:
            y, _ = _project(experts.gate.forward(up_y), down, routing)
            normed = pulled_back(experts.post_norm, y, dy, d_y := torch.empty_like(y))
            d_weights, dy = row_dots(dy, normed), d_y
        d_inner, dh_down = _gradient_of_x(dy, down, routing)
        inner = experts.gate.backward(d_inner, up_y, d_up := torch.empty_like(up_y))
        if d_weights is None:
            # ⟨dy, down(inner)⟩ = ⟨d_inner, inner⟩ + ⟨dy, b⟩: the output of `down` is not kept.
            d_weights = row_dots(d_inner, inner)
            if down.bias is not None:
                d_weights += row_dots(dy, down.bias[routing.expert])
        dx, dh_up = _gradient_of_x(d_up, up, routing)
        return (
            routing.combined(dx, weights) if needs_x else None,
            d_weights[routing.places].to(weights.dtype) if needs_weights else None,
            None,
            *_gradients_of_trained(d_up, dh_up, x_rows, h_up, up, w, routing),
            *_gradients_of_trained(dy, dh_down, inner, h_down, down, w, routing),
        )


def _project(x: Tensor, stack: Stack, routing: Routing) -> tuple[Tensor, Tensor | None]:
    """Return W x + B A x + b of each row's expert, (rows, out), and A x."""
    y = F.grouped_mm(x, _weight(stack).transpose(1, 2), offs=routing.ends)
    h = None if stack.of_all is None else add_update(x, y, stack.of_all, routing)
    if stack.bias is not None:
        y += stack.bias[routing.expert]
    return y, h


def _gradient_of_x(dy: Tensor, stack: Stack, routing: Routing) -> tuple[Tensor, Tensor | None]:
    """Return dy W + dh A, (rows, in), and dh = dy B, (rows, aligned rank)."""
    dx = F.grouped_mm(dy, _weight(stack), offs=routing.ends)
    if (update := stack.of_all) is None:
        return dx, None
    dh = F.grouped_mm(dy, _aligned(update.Bt).transpose(1, 2), offs=routing.ends)
    A = _aligned(update.A)
    dx += dh @ A if update.shares_A else F.grouped_mm(dh, A, offs=routing.ends)
    return dx, dh


def _gradients_of_trained(
    dy: Tensor,
    dh: Tensor | None,
    x: Tensor,
    h: Tensor | None,
    stack: Stack,
    w: Tensor,
    routing: Routing,
) -> list[Tensor | None]:
    """Return dA = (w ∘ dh)ᵀ x and dBᵀ = (w ∘ h)ᵀ dy of each expert, as far as they train."""
    update = stack.of_all
    if update is None or dh is None or h is None:
        return []
    dA = dBt = None
    if update.A.requires_grad:
        weighted = (dh * w).to(x.dtype).T
        dA = weighted @ x if update.shares_A else F.grouped_mm(weighted, x, offs=routing.ends)
        dA = dA[..., : update.rank, :]
    if update.Bt.requires_grad:
        dBt = F.grouped_mm((h * w).to(dy.dtype).T, dy, offs=routing.ends)[:, : update.rank]
    return [dA, dBt]


def _through_A(x: Tensor, update: StackUpdate, routing: Routing) -> Tensor:
    """Return A x of each row's expert, (rows, aligned rank)."""
    A = _aligned(update.A)
    if update.shares_A:
        return x @ A.T
    return F.grouped_mm(x, A.transpose(1, 2), offs=routing.ends)


def _weight(stack: Stack) -> Tensor:
    """Return the stack's weights, (experts, out, in)."""
    assert isinstance(stack.weight, Tensor)
    return stack.weight.transpose(1, 2) if stack.transposed else stack.weight


def _aligned(factors: Tensor) -> Tensor:
    """Return A or Bᵀ, (..., rank, columns), with ranks of zeros up to a multiple of `ALIGNED`, and
    where that many numbers begin: of trained ones side by side in memory some may not."""
    if missing := -factors.shape[-2] % ALIGNED:
        return F.pad(factors, (0, 0, 0, missing))
    return factors.clone() if factors.storage_offset() % ALIGNED else factors
