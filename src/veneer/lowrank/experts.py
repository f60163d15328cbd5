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

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.kernels import choice, low_rank
from veneer.kernels.arena import Arena
from veneer.kernels.rows import row_dots
from veneer.lowrank.expert_gates import pulled_back
from veneer.lowrank.expert_stacks import Experts, Stack, StackUpdate, TokenUpdates
from veneer.lowrank.grouped_experts import add_update, grouped_experts
from veneer.lowrank.routing import Routing
from veneer.quant.weight import product, product_back

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
        experts.note_routed(routing)
        for expert, own in routing.segments:
            count = own.stop - own.start
            kept = own if keeps else slice(count)
            own_x = torch.index_select(x, 0, routing.token[own], out=x_rows[:count])
            _project(own_x, up, expert, up_y[kept], h_up[own])
            if not experts.exact:
                inner = experts.gate.forward(up_y[kept])
                _project(inner, down, expert, y[own], h_down[own])
        if experts.exact:
            # How a model's own function rounds a number may depend on the shape that it is in.
            inner = experts.gate.forward(up_y)
            for expert, own in routing.segments:
                _project(inner[own], down, expert, y[own], h_down[own])
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
        d_up_factors, d_down_factors = _FactorGradients(up.of_all), _FactorGradients(down.of_all)
        y_rows, x_rows, inner_rows, up_rows, d_up_rows = (
            dy.new_empty(routing.longest, columns)
            for columns in (
                *(down.out_features, up.in_features, down.in_features),
                *(up.out_features, up.out_features),
            )
        )
        reads_x = up_y is None or d_up_factors.trains
        experts.note_routed(routing)
        for expert, own in routing.segments:
            count = own.stop - own.start
            token, own_w = routing.token[own], w[own]
            own_dy = torch.index_select(dy, 0, token, out=y_rows[:count])  # without w
            own_x = torch.index_select(x, 0, token, out=x_rows[:count]) if reads_x else None
            if up_y is None:
                assert own_x is not None
                own_up = up_rows[:count]
                _project(own_x, up, expert, own_up, h_up[own])
            else:
                own_up = up_y[own]
            if experts.post_norm is not None:
                inner = experts.gate.forward(own_up)
                y = torch.empty_like(own_dy)
                _project(inner, down, expert, y, h_down[own])
                normed = pulled_back(experts.post_norm, y, own_dy, d_y := torch.empty_like(y))
                d_weights[own] = row_dots(own_dy, normed)
                own_dy = d_y
            dh_down = _gradient_of_h(own_dy, down, expert)
            d_inner = _gradient_of_x(own_dy, dh_down, down, expert, inner_rows[:count])
            inner = experts.gate.backward(d_inner, own_up, d_up := d_up_rows[:count])
            if needs_weights and experts.post_norm is None:
                # ⟨dy, down(inner)⟩ = ⟨d_inner, inner⟩ + ⟨dy, b⟩: the output of `down` is not kept.
                d_weights[own] = row_dots(d_inner, inner)
                if down.bias is not None:
                    d_weights[own] += own_dy.to(wide) @ down.bias[expert].to(wide)
            dh_up = _gradient_of_h(d_up, up, expert)
            if d_x is not None:
                _gradient_of_x(d_up, dh_up, up, expert, d_x[own])
            d_down_factors.add(expert, own_dy, dh_down, inner, h_down[own], own_w)
            d_up_factors.add(expert, d_up, dh_up, own_x, h_up[own], own_w)
        return (
            None if d_x is None else routing.combined(d_x, weights),
            d_weights[routing.places].to(weights.dtype) if needs_weights else None,
            None,
            *d_up_factors.gradients(),
            *d_down_factors.gradients(),
        )


class _FactorGradients:
    """The gradients of A and Bᵀ, as far as they train, added up expert by expert."""

    def __init__(self, update: StackUpdate | None) -> None:
        self.update = update
        self.A = self.Bt = None
        if update is not None and update.A.requires_grad:
            dtype = update.A.dtype
            # The experts' gradients of a shared A are added up; 16 bits would round each sum.
            wide = torch.promote_types(dtype, torch.float32) if update.shares_A else dtype
            self.A = torch.zeros_like(update.A, dtype=wide)
        if update is not None and update.Bt.requires_grad:
            self.Bt = torch.zeros_like(update.Bt)

    @property
    def trains(self) -> bool:
        return self.A is not None or self.Bt is not None

    def add(
        self, expert: int, dy: Tensor, dh: Tensor, x: Tensor | None, h: Tensor, w: Tensor
    ) -> None:
        """Add what an expert's rows give: dA = (w ∘ dh)ᵀ x and dBᵀ = (w ∘ h)ᵀ dy."""
        if self.A is not None and self.update is not None:
            assert x is not None
            if self.update.shares_A:
                self.A += low_rank.gradient(dh, w, x, torch.empty_like(self.update.A))
            else:
                low_rank.gradient(dh, w, x, self.A[expert])
        if self.Bt is not None:
            low_rank.gradient(h, w, dy, self.Bt[expert])

    def gradients(self) -> list[Tensor | None]:
        """Return those of A and Bᵀ."""
        if self.update is None:
            return []
        dA = None if self.A is None else self.A.to(self.update.A.dtype)
        return [dA, self.Bt]


def _project(x: Tensor, stack: Stack, expert: int, y: Tensor, h: Tensor) -> None:
    """Write an expert's W x + B A x + b to `y`, (rows, out), and its A x to `h`, (rows, rank)."""
    product(x, stack.weight_of(expert, x.dtype), y)
    if (update := stack.of_all) is not None:
        low_rank.project(x, update.A_of(expert), h)
        low_rank.add(h, update.Bt[expert], y)
    if stack.bias is not None:
        y += stack.bias[expert]


def _gradient_of_h(dy: Tensor, stack: Stack, expert: int) -> Tensor:
    """Return the gradient dy B of an expert's A x, (rows, rank)."""
    dh = dy.new_empty(len(dy), stack.rank)
    return dh if stack.of_all is None else low_rank.project(dy, stack.of_all.Bt[expert], dh)


def _gradient_of_x(dy: Tensor, dh: Tensor, stack: Stack, expert: int, dx: Tensor) -> Tensor:
    """Write an expert's dy W + dh A, (rows, in), to `dx` and return it."""
    weight = stack.weight_of(expert, dy.dtype)
    if isinstance(weight, Tensor):
        torch.mm(dy, weight, out=dx)
    else:
        dx.copy_(product_back(dy, weight))
    return dx if stack.of_all is None else low_rank.add(dh, stack.of_all.A_of(expert), dx)
