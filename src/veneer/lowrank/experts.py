"""A mixture's routed experts with low-rank updates over their stacks: one function, forward and
backward.

    y_t = Σ_j w_tj · down_e(act(gate_e(x_t)) ∘ up_e(x_t))        with e = index_tj

where each of gate with up, and down, is W_e x + B_e A_e x + b_e. The rows (a token with one of its
experts) are sorted by expert, so that each expert multiplies its own rows once; an expert without
rows costs nothing. B A x is computed on these rows alone, and W + B A is never made. All weights
are frozen but A and B; the router's weights w have a gradient, which lower layers need.

The backward pass keeps x, the output of gate and up, and the low-rank A x. w multiplies nothing
large: the gradients before it are linear in w, which is applied to A x and to the sums over j.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.kernels import choice, low_rank
from veneer.kernels.arena import Arena
from veneer.kernels.rows import row_dots
from veneer.lowrank.expert_gates import pulled_back
from veneer.lowrank.expert_stacks import (
    Experts,
    SegmentUpdates,
    Stack,
    TokenUpdates,
)
from veneer.lowrank.grouped_experts import add_update, grouped_experts
from veneer.lowrank.routing import Routing
from veneer.quant.weight import product, product_back

Rows = Sequence[slice]  # of an expert's rows, those on which each update of a stack acts

GROUPED = (torch.bfloat16, torch.float16, torch.float32)  # what torch's grouped products take


def routed_experts(
    x: Tensor,  # (tokens, in)
    index: Tensor,  # (tokens, k), the experts of each token
    weights: Tensor,  # (tokens, k)
    experts: Experts,
    *,
    arena: Arena | None = None,
    recompute_projections: bool = False,
) -> Tensor:
    """Return Σ_j w_tj · expert_tj(x_t), (tokens, out), in x's dtype. An index beyond the experts
    adds nothing.

    arena: where the output of gate and up is kept.

    recompute_projections: whether the backward pass computes the first stack again.
    """
    is_grouped = _is_grouped(x, experts)
    if is_grouped:
        # Rows beyond the experts are the last one's, with weight 0: nothing depends on how many.
        beyond = index >= experts.count
        index, weights = (
            index.masked_fill(beyond, experts.count - 1),
            weights.masked_fill(beyond, 0),
        )
    routing = Routing(index, experts.count, is_whole=is_grouped)
    leaves = (x, weights, *experts.trained())
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in leaves)
    if any(isinstance(stack.update, TokenUpdates) for stack in (experts.up, experts.down)):
        if trains:
            raise NotImplementedError("updates of single tokens have no gradient")
        return _at_once(x, weights, experts, routing)
    if experts.exact and not trains:
        return _at_once(x, weights, experts, routing)
    if is_grouped:
        return grouped_experts(x, weights, experts, routing, recompute=recompute_projections)
    settings = _Settings(experts, routing, arena, recompute_projections)
    y: Tensor = _RoutedExperts.apply(x, weights, settings, *experts.trained())
    return y


def _is_grouped(x: Tensor, experts: Experts) -> bool:
    """Return whether one product computes a whole stack, whatever rows each expert has."""
    stacks = experts.up, experts.down
    if any(isinstance(stack.update, SegmentUpdates) for stack in stacks):
        return False
    quantized = not all(
        isinstance(stack.weight, Tensor) and stack.weight.dtype == x.dtype for stack in stacks
    )
    widths = [width for stack in stacks for width in (stack.in_features, stack.out_features)]
    device = choice.device_of(x.device)
    return choice.experts(device, x.dtype, *widths, quantized=quantized) == "grouped"


def _at_once(x: Tensor, weights: Tensor, experts: Experts, routing: Routing) -> Tensor:
    """Return the experts' output, each stack over all rows before the next: for few rows, where
    calls cost more than memory."""
    experts.note_routed(routing)
    inner = experts.gate.forward(_stack_at_once(x[routing.token], experts.up, routing))
    y = _stack_at_once(inner, experts.down, routing)
    if experts.post_norm is not None:
        y = experts.post_norm(y)
    return routing.combined(y, weights, exact=experts.exact)


def _stack_at_once(x: Tensor, stack: Stack, routing: Routing) -> Tensor:
    """Return the stack's output of the sorted rows, (rows, out)."""
    weight, routed = stack.weight, routing.routed
    if isinstance(weight, Tensor) and x.dtype == weight.dtype and x.dtype in GROUPED:
        weight = weight if stack.transposed else weight.transpose(1, 2)
        y = F.grouped_mm(x, weight, offs=routing.ends)
    else:
        y = x.new_empty(len(x), stack.out_features)
        for expert, rows in routing.segments:
            product(x[rows], stack.weight_of(expert, x.dtype), y[rows])
    y[routed:] = 0
    update = stack.update
    assert not isinstance(update, SegmentUpdates)  # those are for training
    if isinstance(update, TokenUpdates):
        which = update.which[routing.token[:routed]]
        if routing.is_whole and choice.mixed(choice.device_of(x.device), x.dtype) == "torch":
            for number, each in enumerate(update.updates):
                add_update(x, y, each, routing, which == number)
        else:
            pairs = [(each.A, each.Bt) for each in update.updates]
            low_rank.add_by_rows(x[:routed], pairs, which, routing.expert, y[:routed])
    elif update is not None and routing.is_whole:
        add_update(x, y, update, routing)
    elif update is not None:
        h = x.new_empty(len(x), update.rank)
        for expert, rows in routing.segments:
            low_rank.project(x[rows], update.A_of(expert), h[rows])
            low_rank.add(h[rows], update.Bt[expert], y[rows])
    if stack.bias is not None:
        y[:routed] += stack.bias[routing.expert]
    return y


@dataclass(frozen=True)
class _Settings:
    experts: Experts
    routing: Routing
    arena: Arena | None
    recompute_projections: bool


class _RoutedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, settings: _Settings, *trained: Tensor
    ) -> Tensor:
        experts, routing, arena = settings.experts, settings.routing, settings.arena
        up, down, rows = experts.up, experts.down, len(routing.order)
        keeps = experts.exact or not settings.recompute_projections
        if keeps and arena is not None:
            up_y = arena.empty(rows, up.out_features, x)
        else:
            up_y = x.new_empty(rows if keeps else routing.longest, up.out_features)
        h_up, h_down = (x.new_empty(rows, stack.rank) for stack in (up, down))
        y = x.new_empty(rows, down.out_features)
        y[routing.routed :] = 0
        x_rows = x.new_empty(routing.longest, up.in_features)
        own_rows = [*zip(*(stack.rows_of_segments(routing) for stack in (up, down)), strict=True)]
        experts.note_routed(routing)
        for (expert, own), (up_rows, down_rows) in zip(routing.segments, own_rows, strict=True):
            count = own.stop - own.start
            kept = own if keeps else slice(count)
            own_x = torch.index_select(x, 0, routing.token[own], out=x_rows[:count])
            _project(own_x, up, expert, up_y[kept], h_up[own], up_rows)
            if not experts.exact:
                inner = experts.gate.forward(up_y[kept])
                _project(inner, down, expert, y[own], h_down[own], down_rows)
        if experts.exact:
            # How a model's own function rounds a number may depend on the shape that it is in.
            inner = experts.gate.forward(up_y)
            for (expert, own), (_, rows) in zip(routing.segments, own_rows, strict=True):
                _project(inner[own], down, expert, y[own], h_down[own], rows)
        if experts.post_norm is not None:
            y = experts.post_norm(y)
        ctx.settings = settings
        ctx.save_for_backward(x, weights, up_y if keeps else None, h_up, h_down)
        return routing.combined(y, weights, exact=experts.exact)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, up_y, h_up, h_down = ctx.saved_tensors
        settings: _Settings = ctx.settings
        experts, routing, dy = settings.experts, settings.routing, grads[0]
        up, down, rows = experts.up, experts.down, len(routing.order)
        needs_x, needs_weights, *_ = ctx.needs_input_grad
        d_x = dy.new_empty(rows, up.in_features) if needs_x else None
        wide = torch.promote_types(dy.dtype, torch.float32)
        w = weights.reshape(-1)[routing.order].to(wide).unsqueeze(1)  # (rows, 1)
        d_weights = dy.new_zeros(rows, dtype=wide)
        if d_x is not None:
            d_x[routing.routed :] = 0
        d_up_factors, d_down_factors = _FactorGradients(up), _FactorGradients(down)
        own_rows = [*zip(*(stack.rows_of_segments(routing) for stack in (up, down)), strict=True)]
        y_rows, x_rows, inner_rows, up_y_rows, d_up_rows = (
            dy.new_empty(routing.longest, columns)
            for columns in (
                *(down.out_features, up.in_features, down.in_features),
                *(up.out_features, up.out_features),
            )
        )
        reads_x = up_y is None or d_up_factors.trains
        experts.note_routed(routing)
        for (expert, own), (up_rows, down_rows) in zip(routing.segments, own_rows, strict=True):
            count = own.stop - own.start
            token, own_w = routing.token[own], w[own]
            own_dy = torch.index_select(dy, 0, token, out=y_rows[:count])  # without w
            own_x = torch.index_select(x, 0, token, out=x_rows[:count]) if reads_x else None
            if up_y is None:
                assert own_x is not None
                own_up = up_y_rows[:count]
                _project(own_x, up, expert, own_up, h_up[own], up_rows)
            else:
                own_up = up_y[own]
            if experts.post_norm is not None:
                inner = experts.gate.forward(own_up)
                y = torch.empty_like(own_dy)
                _project(inner, down, expert, y, h_down[own], down_rows)
                normed = pulled_back(experts.post_norm, y, own_dy, d_y := torch.empty_like(y))
                d_weights[own] = row_dots(own_dy, normed)
                own_dy = d_y
            dh_down = _gradient_of_h(own_dy, down, expert, down_rows)
            d_inner = _gradient_of_x(own_dy, dh_down, down, expert, inner_rows[:count], down_rows)
            inner = experts.gate.backward(d_inner, own_up, d_up := d_up_rows[:count])
            if needs_weights and experts.post_norm is None:
                # ⟨dy, down(inner)⟩ = ⟨d_inner, inner⟩ + ⟨dy, b⟩: the output of `down` is not kept.
                d_weights[own] = row_dots(d_inner, inner)
                if down.bias is not None:
                    d_weights[own] += own_dy.to(wide) @ down.bias[expert].to(wide)
            dh_up = _gradient_of_h(d_up, up, expert, up_rows)
            if d_x is not None:
                _gradient_of_x(d_up, dh_up, up, expert, d_x[own], up_rows)
            d_down_factors.add(expert, own_dy, dh_down, inner, h_down[own], own_w, down_rows)
            d_up_factors.add(expert, d_up, dh_up, own_x, h_up[own], own_w, up_rows)
        return (
            None if d_x is None else routing.combined(d_x, weights),
            d_weights[routing.places].to(weights.dtype) if needs_weights else None,
            None,
            *d_up_factors.gradients(),
            *d_down_factors.gradients(),
        )


class _FactorGradients:
    """The gradients of A and Bᵀ of a stack's updates, as far as they train, added up expert by
    expert."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.As: list[Tensor | None] = []
        self.Bts: list[Tensor | None] = []
        for _, update in stack.segments:
            dtype = update.A.dtype
            # The experts' gradients of a shared A are added up; 16 bits would round each sum.
            wide = torch.promote_types(dtype, torch.float32) if update.shares_A else dtype
            trains = update.A.requires_grad, update.Bt.requires_grad
            self.As.append(torch.zeros_like(update.A, dtype=wide) if trains[0] else None)
            self.Bts.append(torch.zeros_like(update.Bt) if trains[1] else None)

    @property
    def trains(self) -> bool:
        return any(gradient is not None for gradient in (*self.As, *self.Bts))

    def add(
        self,
        expert: int,
        dy: Tensor,
        dh: Tensor,
        x: Tensor | None,
        h: Tensor,
        w: Tensor,
        rows: Rows,
    ) -> None:
        """Add what an expert's rows give: dA = (w ∘ dh)ᵀ x and dBᵀ = (w ∘ h)ᵀ dy."""
        for own, (_, update), dA, dBt in zip(
            rows, self.stack.segments, self.As, self.Bts, strict=True
        ):
            ranks = slice(update.rank)
            if dA is not None:
                assert x is not None
                if update.shares_A:
                    dA += low_rank.gradient(
                        dh[own, ranks], w[own], x[own], torch.empty_like(update.A)
                    )
                else:
                    low_rank.gradient(dh[own, ranks], w[own], x[own], dA[expert])
            if dBt is not None:
                low_rank.gradient(h[own, ranks], w[own], dy[own], dBt[expert])

    def gradients(self) -> list[Tensor | None]:
        """Return those of A and Bᵀ, in the order of `Stack.trained`."""
        gradients: list[Tensor | None] = []
        for (_, update), dA, dBt in zip(self.stack.segments, self.As, self.Bts, strict=True):
            gradients += [None if dA is None else dA.to(update.A.dtype), dBt]
        return gradients


def _project(x: Tensor, stack: Stack, expert: int, y: Tensor, h: Tensor, rows: Rows) -> None:
    """Write an expert's W x + B A x + b to `y`, (rows, out), and its A x to `h`, (rows, rank).
    rows: which of them each update acts on."""
    product(x, stack.weight_of(expert, x.dtype), y)
    for own, (_, update) in zip(rows, stack.segments, strict=True):
        own_h = h[own, : update.rank]
        low_rank.project(x[own], update.A_of(expert), own_h)
        low_rank.add(own_h, update.Bt[expert], y[own])
    if stack.bias is not None:
        y += stack.bias[expert]


def _gradient_of_h(dy: Tensor, stack: Stack, expert: int, rows: Rows) -> Tensor:
    """Return the gradient dy B of an expert's A x, (rows, rank)."""
    dh = dy.new_empty(len(dy), stack.rank)
    for own, (_, update) in zip(rows, stack.segments, strict=True):
        low_rank.project(dy[own], update.Bt[expert], dh[own, : update.rank])
    return dh


def _gradient_of_x(
    dy: Tensor, dh: Tensor, stack: Stack, expert: int, dx: Tensor, rows: Rows
) -> Tensor:
    """Write an expert's dy W + dh A, (rows, in), to `dx` and return it."""
    weight = stack.weight_of(expert, dy.dtype)
    if isinstance(weight, Tensor):
        torch.mm(dy, weight, out=dx)
    else:
        dx.copy_(product_back(dy, weight))
    for own, (_, update) in zip(rows, stack.segments, strict=True):
        low_rank.add(dh[own, : update.rank], update.A_of(expert), dx[own])
    return dx
