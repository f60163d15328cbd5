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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from veneer.kernels.activation import Activation, activate, activate_backward
from veneer.kernels.arena import Arena
from veneer.quant.stack import QuantizedStack, expert_weight
from veneer.quant.weight import product, product_back

# Rows for which a gate that is differentiated by autograd is computed at a time.
GATE_ROWS = 4096


@dataclass(frozen=True)
class StackUpdate:
    """What adapters add to each expert of a stack: B (A x), scaled, in the dtype of computing.

    A (experts, rank, in), or (rank, in) where the experts share it; B (experts, out, rank). mask
    (tokens, rank): what A x is multiplied with, where tokens have updates of their own; None for 1.
    """

    A: Tensor
    B: Tensor
    mask: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.A.shape[-2]

    @property
    def shares_A(self) -> bool:
        return self.A.ndim == 2


@dataclass(frozen=True)
class Stack:
    """One linear layer of every expert: W_e x + B_e A_e x + b_e.

    weight (experts, out, in), or (experts, in, out) if `transposed`; frozen. bias (experts, out).
    """

    weight: Tensor | QuantizedStack
    transposed: bool = False
    bias: Tensor | None = None
    update: StackUpdate | None = None

    @property
    def out_features(self) -> int:
        return self.weight.shape[-1 if self.transposed else -2]

    @property
    def in_features(self) -> int:
        return self.weight.shape[-2 if self.transposed else -1]

    def trained(self) -> list[Tensor]:
        """Return A and B, or nothing where no adapter acts."""
        return [] if self.update is None else [self.update.A, self.update.B]


class Gate(Protocol):
    """What is between the two stacks, row by row."""

    def forward(self, up: Tensor) -> Tensor:
        """Return what the down projection reads, (rows, inner), of the first stack's output."""

    def backward(self, d_inner: Tensor, up: Tensor, d_up: Tensor) -> Tensor:
        """Write the gradient of `up` to `d_up` and return what `forward` returns."""


@dataclass(frozen=True)
class KnownGate:
    """act(gate) · up of gate and up side by side, or act(up) alone."""

    activation: Activation
    is_gated: bool = True

    def forward(self, up: Tensor) -> Tensor:
        return activate(self.activation, *self._halves(up))

    def backward(self, d_inner: Tensor, up: Tensor, d_up: Tensor) -> Tensor:
        return activate_backward(self.activation, d_inner, *self._halves(up), *self._halves(d_up))

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.is_gated:
            return x, None
        gate, up = x.chunk(2, -1)
        return gate, up


@dataclass(frozen=True)
class OwnGate:
    """A model's own function. known: what has the same gradient; autograd's is taken without."""

    function: Callable[[Tensor], Tensor]
    known: KnownGate | None = None

    def forward(self, up: Tensor) -> Tensor:
        return torch.cat([self.function(rows) for rows in up.split(GATE_ROWS)])

    def backward(self, d_inner: Tensor, up: Tensor, d_up: Tensor) -> Tensor:
        if self.known is not None:
            return self.known.backward(d_inner, up, d_up)
        inner = torch.empty_like(d_inner)
        for rows in _chunks(len(up)):
            inner[rows] = _pulled_back(self.function, up[rows], d_inner[rows], d_up[rows])
        return inner


@dataclass(frozen=True)
class Experts:
    """The experts of a mixture. post_norm: what each expert's output goes through, row by row."""

    up: Stack
    down: Stack
    gate: Gate
    post_norm: Callable[[Tensor], Tensor] | None = None

    @property
    def count(self) -> int:
        return self.up.weight.shape[0]

    def trained(self) -> list[Tensor]:
        return [*self.up.trained(), *self.down.trained()]


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
    adds nothing. The products and sums are those of transformers' own functions, to the bit where
    the gate is the module's own.

    recompute_projections: whether the backward pass computes the first stack again.
    """
    routing = Routing(index, experts.count)
    settings = _Settings(experts, routing, arena or Arena(), recompute_projections)
    y: Tensor = _RoutedExperts.apply(x, weights, settings, *experts.trained())
    return y


class Routing:
    """The rows of a batch, sorted by expert. index (tokens, k): the experts of each token."""

    def __init__(self, index: Tensor, experts: int) -> None:
        self.tokens, self.per_token = index.shape
        flat = index.reshape(-1)
        order = flat.argsort(stable=True)
        self.place = torch.empty_like(order)  # of each token and choice, among the sorted rows
        self.place[order] = torch.arange(len(order), device=order.device)
        self.order, self.token = order, order // self.per_token  # (rows,)
        counts: list[int] = torch.bincount(flat, minlength=experts)[:experts].tolist()
        self.segments: list[tuple[int, slice]] = []  # of each expert that has rows
        first = 0
        for expert, count in enumerate(counts):
            if count:
                self.segments.append((expert, slice(first, first + count)))
                first += count
        self.rows = first

    @cached_property
    def all_routed(self) -> bool:
        """Whether no index is beyond the experts."""
        return self.rows == len(self.order)

    def gathered(self, x: Tensor) -> Tensor:
        """Return the token of each sorted row, (rows, ...), of x (tokens, ...)."""
        return x.index_select(0, self.token)

    def sorted(self, weights: Tensor) -> Tensor:
        """Return weights (tokens, k) as a column of the sorted rows, (rows, 1)."""
        return weights.reshape(-1)[self.order].unsqueeze(1)

    def unsorted(self, column: Tensor) -> Tensor:
        """Return numbers of the sorted rows, (rows,), as (tokens, k)."""
        return column[self.place].view(self.tokens, self.per_token)

    def combined(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Return Σ_j w_tj · row_tj, (tokens, columns), in the rows' dtype.

        Products have the wider dtype of both, and their sum is rounded once.
        """
        each = rows[self.place].view(self.tokens, self.per_token, -1)
        return (each * weights.unsqueeze(-1)).sum(1).to(rows.dtype)


@dataclass(frozen=True)
class _Settings:
    experts: Experts
    routing: Routing
    arena: Arena
    recompute_projections: bool


class _RoutedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, settings: _Settings, *trained: Tensor
    ) -> Tensor:
        experts, routing, arena = settings.experts, settings.routing, settings.arena
        up, h_up = _project(routing.gathered(x), experts.up, routing, arena)
        inner = experts.gate.forward(up)
        y, h_down = _project(inner, experts.down, routing, arena)
        if experts.post_norm is not None:
            y = experts.post_norm(y)
        out = routing.combined(y, weights)
        kept = (None, None) if settings.recompute_projections else (up, h_up)
        ctx.settings = settings
        ctx.save_for_backward(x, weights, *kept, h_down)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, up, h_up, h_down = ctx.saved_tensors
        settings: _Settings = ctx.settings
        experts, routing = settings.experts, settings.routing
        needs_x, needs_weights, *_ = ctx.needs_input_grad
        if up is None:
            up, h_up = _project(routing.gathered(x), experts.up, routing, settings.arena)
        d_rows = routing.gathered(grads[0])  # (rows, out), without w
        w = routing.sorted(weights)
        d_weights = None
        if experts.post_norm is not None:
            y, _ = _project(experts.gate.forward(up), experts.down, routing, settings.arena)
            normed = _pulled_back(experts.post_norm, y, d_rows, dy := torch.empty_like(y))
            d_weights, d_rows = _dots(d_rows, normed), dy
        dh_down = _gradient_of_h(d_rows, experts.down, routing)
        d_inner = _gradient_of_x(d_rows, dh_down, experts.down, routing)
        d_up = torch.empty_like(up)
        inner = experts.gate.backward(d_inner, up, d_up)
        if d_weights is None:
            # ⟨dy, down(inner)⟩ = ⟨d_inner, inner⟩ + ⟨dy, b⟩: what `down` gave is not needed.
            d_weights = _dots(d_inner, inner) + _dots_with_bias(d_rows, experts.down, routing)
        d_x: Tensor | None = None
        dh_up = _gradient_of_h(d_up, experts.up, routing)
        if needs_x:
            d_x = routing.combined(_gradient_of_x(d_up, dh_up, experts.up, routing), weights)
        d_trained: list[Tensor | None] = []
        if experts.up.update is not None:
            d_trained += _gradients_of_update(
                d_up, dh_up * w, routing.gathered(x), h_up * w, experts.up.update, routing
            )
        if experts.down.update is not None:
            d_trained += _gradients_of_update(
                d_rows, dh_down * w, inner, h_down * w, experts.down.update, routing
            )
        d_weights = routing.unsorted(d_weights).to(weights.dtype) if needs_weights else None
        return d_x, d_weights, None, *d_trained


def _project(x: Tensor, stack: Stack, routing: Routing, arena: Arena) -> tuple[Tensor, Tensor]:
    """Return the stack's output of the sorted rows, (rows, out), and A x of them, (rows, rank)."""
    y = arena.empty(len(x), stack.out_features, x)
    y[routing.rows :] = 0
    h = _low_rank(x, stack.update, routing)
    _note_routed(stack, routing.segments)
    for expert, rows in routing.segments:
        own = y[rows]
        product(x[rows], _weight(stack, expert, x), own)
        if stack.update is not None:
            own.addmm_(h[rows], stack.update.B[expert].T)
        if stack.bias is not None:
            own += stack.bias[expert]
    return y, h


def _low_rank(x: Tensor, update: StackUpdate | None, routing: Routing) -> Tensor:
    """Return A x of the sorted rows, (rows, rank)."""
    if update is None:
        return x.new_empty(len(x), 0)
    if update.shares_A:
        h = x @ update.A.T
    else:
        h = x.new_zeros(len(x), update.rank)
        for expert, rows in routing.segments:
            torch.mm(x[rows], update.A[expert].T, out=h[rows])
    return h if update.mask is None else h * routing.gathered(update.mask)


def _gradient_of_h(dy: Tensor, stack: Stack, routing: Routing) -> Tensor:
    """Return the gradient dy B of A x, (rows, rank)."""
    update = stack.update
    if update is None:
        return dy.new_empty(len(dy), 0)
    dh = dy.new_zeros(len(dy), update.rank)
    for expert, rows in routing.segments:
        torch.mm(dy[rows], update.B[expert], out=dh[rows])
    return dh if update.mask is None else dh * routing.gathered(update.mask)


def _gradient_of_x(dy: Tensor, dh: Tensor, stack: Stack, routing: Routing) -> Tensor:
    """Return dy W + dh A, (rows, in)."""
    dx = dy.new_empty(len(dy), stack.in_features)
    dx[routing.rows :] = 0
    update = stack.update
    _note_routed(stack, routing.segments)
    for expert, rows in routing.segments:
        weight = _weight(stack, expert, dy)
        if isinstance(weight, Tensor):
            torch.mm(dy[rows], weight, out=dx[rows])
        else:
            dx[rows] = product_back(dy[rows], weight)
        if update is not None:
            dx[rows].addmm_(dh[rows], update.A if update.shares_A else update.A[expert])
    return dx


def _gradients_of_update(
    dy: Tensor, dh: Tensor, x: Tensor, h: Tensor, update: StackUpdate, routing: Routing
) -> list[Tensor | None]:
    """Return dA and dB; None for what does not train. w is in dh and h, not in dy."""
    dA = dB = None
    dh, h = dh.to(x.dtype), h.to(x.dtype)
    if update.A.requires_grad:
        if update.shares_A:
            dA = dh.T @ x
        else:
            dA = torch.zeros_like(update.A)
            for expert, rows in routing.segments:
                torch.mm(dh[rows].T, x[rows], out=dA[expert])
    if update.B.requires_grad:
        dB = torch.zeros_like(update.B)
        for expert, rows in routing.segments:
            torch.mm(dy[rows].T, h[rows], out=dB[expert])
    return [dA, dB]


def _dots_with_bias(dy: Tensor, stack: Stack, routing: Routing) -> Tensor | float:
    """Return ⟨dy, b⟩ of each row, (rows,), in float32 or wider; 0 without a bias."""
    if stack.bias is None:
        return 0.0
    bias = torch.zeros_like(dy)
    for expert, rows in routing.segments:
        bias[rows] = stack.bias[expert]
    return _dots(dy, bias)


def _weight(stack: Stack, expert: int, like: Tensor) -> Any:
    weight = expert_weight(stack.weight, expert, transposed=stack.transposed)
    return weight.to(like.dtype) if isinstance(weight, Tensor) else weight


def _note_routed(stack: Stack, segments: Sequence[tuple[int, slice]]) -> None:
    if isinstance(stack.weight, QuantizedStack):
        stack.weight.note_routed([expert for expert, _ in segments])


def _dots(x: Tensor, y: Tensor) -> Tensor:
    """Return the product ⟨x, y⟩ of each row, in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x * y).sum(1, dtype=wide) if x.dtype == wide else (x.to(wide) * y).sum(1)


def _pulled_back(function: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor, dx: Tensor) -> Tensor:
    """Write the gradient of x to `dx` and return function(x)."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        y = function(leaf)
    dx.copy_(torch.autograd.grad(y, leaf, dy.to(y.dtype))[0])
    return y.detach()


def _chunks(rows: int) -> list[slice]:
    return [slice(first, first + GATE_ROWS) for first in range(0, rows, GATE_ROWS)]
