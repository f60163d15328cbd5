"""The two halves of a decoder layer, each one function, forward and backward.

    x + post_norm(o(attention(q, k, v)))         with q, k, v of norm(x)
    x + post_norm(down(act(gate) · up))          with gate, up of norm(x)

Dropout may act on what is added, on attention's probabilities and on what adapters read; its masks
are not kept, but made again.
Which norms there are, what is gated, and what each half reads and is added to, differs from model
to model; the functions are the same. Autograd would keep each operation's inputs. These keep the
residual stream, the projections and the output of attention; norms and products of activations are
cheap, and the backward pass computes them again. All weights are frozen but the adapters'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.fused.heads import Heads, LatentHeads
from veneer.kernels.activation import Activation, activate, activate_backward
from veneer.kernels.arena import Arena
from veneer.kernels.attention import Attention
from veneer.kernels.dropout import Mask
from veneer.kernels.gain import activate_gain_backward
from veneer.kernels.norm import Norm
from veneer.lowrank.group import Group, Projection
from veneer.lowrank.projection import (
    Gains,
    gradient_of_h,
    gradient_of_x,
    gradients_of_trained,
    project,
    shape_of_h,
    through_gains,
)


class Back(NamedTuple):
    """What a half's inner function gives on the way back.

    dz, d_gains: as `through_gains` returns them for the half's inputs. inner: what `output` read,
    made again or kept. d_between: of what trains in the half's `between`.
    """

    dz: list[Tensor]
    d_gains: Gains
    inner: Tensor
    d_between: Sequence[Tensor | None] = ()


@dataclass(frozen=True)
class Half:
    """residual + multiplier · dropout(post_norm(output(inner(inputs(norm(x)))))).

    With `recompute_projections`, the backward pass computes the inputs' outputs again; they are not
    kept. output: a group of one. made_of: what x is the sum of, to the bit; then x is not kept.
    """

    norm: Norm | None
    inputs: Group
    output: Group
    _: KW_ONLY
    arena: Arena
    post_norm: Norm | None = None
    dropout: Mask | None = None
    multiplier: float = 1.0
    recompute_projections: bool = False
    made_of: Sum | None = None

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Sum | None]:
        """Return the half's output (tokens, dim), and what it is the sum of where that is kept.

        residual: what the half is added to, if not x.
        """
        projections = (*self.inputs, *self.between, *self.output)
        trained = [tensor for projection in projections for tensor in projection.trained()]
        out, y = _Half.apply(x, residual, self, *trained)
        onto = x if residual is None else residual
        return out, None if y is None else self.sum(onto.detach(), y)

    def sum(self, residual: Tensor, y: Tensor) -> Sum:
        """Return the half's output from what it is added to and what `output` gives."""
        return Sum(residual, y, self.post_norm, self.dropout, self.factor)

    @property
    def factor(self) -> float:
        """What is added is multiplied with this; the mask's scale is in it."""
        return self.multiplier * (1.0 if self.dropout is None else self.dropout.scale)

    @property
    def between(self) -> Sequence[Projection]:
        """Projections of the inner function's own, which read what `inputs` give."""
        return ()

    def project(self, x: Tensor) -> list[Tensor]:
        """Return the low-rank A x of all inputs, and their outputs, over norm(x)."""
        h, *outputs = empty(x, self.inputs, self.arena)
        normed = x if self.norm is None else self.norm.forward(x)[0]
        project(normed, self.inputs, outputs, h)
        return [h, *outputs]

    def forward(self, outputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return what `output` reads, and what is kept of it."""
        raise NotImplementedError

    def backward(self, dy: Tensor, outputs: Sequence[Tensor], kept: Sequence[Tensor]) -> Back:
        """Return the gradients from that of what `output` read."""
        raise NotImplementedError


@dataclass(frozen=True)
class SelfAttention(Half):
    """The half that mixes the tokens of each sequence."""

    _: KW_ONLY
    heads: Heads | LatentHeads
    attention: Attention

    def forward(self, outputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        y, log_sums = self.attention.forward(*self.heads.forward(outputs))
        flat = self.arena.empty(len(y), y[0].numel(), y)  # (tokens, heads · value_dim)
        flat.copy_(y.flatten(1))
        return flat, [flat, *log_sums]

    def backward(self, dy: Tensor, outputs: Sequence[Tensor], kept: Sequence[Tensor]) -> Back:
        d_outputs = self.back_to_outputs(dy, outputs, kept)
        return Back(*through_gains(d_outputs, outputs, self.inputs, in_place=True), kept[0])

    def back_to_outputs(
        self, dy: Tensor, outputs: Sequence[Tensor], kept: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return the gradients of what the heads read."""
        flat, *log_sums = kept
        q, k, v = self.heads.forward(outputs)
        by_head = (*q.shape[:2], v.shape[-1])
        gradients = self.attention.backward(
            dy.view(by_head), q, k, v, flat.view(by_head), list(log_sums)
        )
        return self.heads.backward(*gradients, outputs)


@dataclass(frozen=True)
class FeedForward(Half):
    """The half that takes each token alone: act(gate) · up, or act(up) alone.

    is_gated: gate and up are of two projections, or side by side in the output of one.
    """

    _: KW_ONLY
    activation: Activation
    is_gated: bool = True
    gate_first: bool = True

    def forward(self, outputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        return activate(self.activation, *self._gate_and_up(outputs)), []

    def backward(self, dy: Tensor, outputs: Sequence[Tensor], kept: Sequence[Tensor]) -> Back:
        gate, up = self._gate_and_up(outputs)
        d_outputs = [torch.empty_like(y) for y in outputs]
        d_gate, d_up = self._gate_and_up(d_outputs)
        if up is not None and d_up is not None and all(p.gain is not None for p in self.inputs):
            return self._back_through_gains(dy, outputs, d_outputs)
        inner = activate_backward(self.activation, dy, gate, up, d_gate, d_up)
        return Back(*through_gains(d_outputs, outputs, self.inputs, in_place=True), inner)

    def _back_through_gains(
        self, dy: Tensor, outputs: Sequence[Tensor], d_outputs: list[Tensor]
    ) -> Back:
        """Return what `backward` returns, where gate and up have gains: in one pass over both."""
        gains = self._gate_and_up([p.gain for p in self.inputs if p.gain is not None])
        biases = self._gate_and_up([p.bias for p in self.inputs])
        (d_gate_gain, d_up_gain), inner = activate_gain_backward(
            self.activation,
            dy,
            *self._gate_and_up(outputs),
            gains,
            biases,
            *self._gate_and_up(d_outputs),
        )
        d_gains = [d_gate_gain, d_up_gain] if self.gate_first else [d_up_gain, d_gate_gain]
        d_gains = d_gains if len(outputs) == 2 else [torch.cat(d_gains)]
        return Back(d_outputs, [[d_gain] for d_gain in d_gains], inner)

    def _gate_and_up(self, tensors: Sequence[Any]) -> tuple[Any, Any]:
        """Return what belongs to gate and to up, None for what is not there: of one tensor for
        each, or of one for both, side by side in its last dimension."""
        if not self.is_gated:
            return tensors[0], None
        if len(tensors) == 2:
            first, second = tensors
        elif tensors[0] is None:
            return None, None
        else:
            first, second = tensors[0].chunk(2, -1)
        return (first, second) if self.gate_first else (second, first)


@dataclass(frozen=True)
class Mixture:
    """x + multiplier · post_norm(module(norm(x))), where a mixture of experts computes itself."""

    norm: Norm | None
    module: Callable[[Tensor], Any]
    post_norm: Norm | None
    multiplier: float

    def __call__(self, x: Tensor) -> Tensor:
        """Return the half's output (tokens, dim)."""
        return self.add(x, self.routed(normed(x, self.norm)))

    def routed(self, x: Tensor) -> Tensor:
        """Return what the module gives, beside which it may return a router's logits."""
        y = self.module(x.unsqueeze(0))
        return (y[0] if isinstance(y, tuple) else y).view_as(x)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the half's output from its input and what the module gives."""
        return torch.add(x, normed(y, self.post_norm), alpha=self.multiplier)


@dataclass(frozen=True)
class Sum:
    """A half's output as what it is the sum of: two tensors (tokens, dim) that are kept anyway."""

    residual: Tensor
    y: Tensor
    post_norm: Norm | None
    dropout: Mask | None
    factor: float

    def make(self, out: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return residual + factor · post_norm(y) ∘ mask, each time equal to the bit, and the
        norm's statistics."""
        added, statistics = self.y, None
        if self.post_norm is not None:
            added, statistics = self.post_norm.forward(self.y)
        if self.dropout is not None:
            added = self.dropout.apply(added)
        return torch.add(self.residual, added, alpha=self.factor, out=out), statistics


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm) -> Tensor:
        y, statistics = norm.forward(x)
        ctx.save_for_backward(x, statistics)
        ctx.norm = norm
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        x, statistics = ctx.saved_tensors
        return ctx.norm.backward(grads[0], x, statistics, None), None


def normed(x: Tensor, norm: Norm | None) -> Tensor:
    """Return norm(x), of which the backward pass keeps x; x itself without a norm."""
    return x if norm is None else _Normed.apply(x, norm)


class _Half(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, half: Half, *trained: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        onto, output = x if residual is None else residual, half.output
        ctx.before = half.arena.next_half()
        h_out, out = empty(x, output, half.arena)
        h, *outputs = half.project(x)
        inner, kept = half.forward(outputs)
        y = statistics = None
        if output[0].has_gain or half.post_norm is not None:
            y = half.arena.empty(len(x), output[0].out_features, x)
            project(inner, output, [y], h_out)
            _, statistics = half.sum(onto, y).make(out)
            ctx.mark_non_differentiable(y)
        else:
            # The residual is added last: it is much the largest, and a sum with it is rounded at
            # its size.
            project(inner, output, [out], h_out)
            if half.dropout is not None:
                half.dropout.apply_(out)
            torch.add(onto, out, alpha=half.factor, out=out)
        sum_ = half.made_of
        x_or_summands = (x, None) if sum_ is None else (sum_.residual, sum_.y)
        projections = [] if half.recompute_projections else [h, *outputs]
        ctx.projections = len(projections)
        ctx.save_for_backward(*x_or_summands, y, h_out, statistics, *projections, *kept)
        if sum_ is not None:  # its tensors would be held beyond the backward pass
            sum_ = replace(sum_, residual=None, y=None)  # type: ignore[arg-type]
        ctx.half, ctx.is_serial = replace(half, made_of=sum_), residual is None
        return out, y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        half: Half = ctx.half
        half.arena.read_ahead(ctx.before)
        x, summand, y, h_out, statistics, *rest = ctx.saved_tensors
        projections, kept = rest[: ctx.projections], rest[ctx.projections :]
        if half.made_of is not None:
            x, _ = replace(half.made_of, residual=x, y=summand).make()
        h, *outputs = projections or half.project(x)
        d_out = grads[0]  # (tokens, dim)
        dy = d_out if half.dropout is None else half.dropout.apply(d_out)
        dy = dy if half.factor == 1 else dy * half.factor
        if half.post_norm is not None:
            dy = half.post_norm.backward(dy, y, statistics, None)
        output = half.output
        dz, d_gain = through_gains([dy], [y], output, in_place=False)
        dh = gradient_of_h(dz, output)
        d_inner = gradient_of_x(dz, dh, output)
        back = half.backward(d_inner, outputs, kept)
        d_output_trained = gradients_of_trained(dz, d_gain, dh, back.inner, h_out, output)
        dx, d_trained = _back_to_x(back.dz, back.d_gains, x, h, half, ctx, d_out)
        d_residual = None if ctx.is_serial else d_out
        return dx, d_residual, None, *d_trained, *back.d_between, *d_output_trained


def _back_to_x(
    dz: list[Tensor], d_gains: Gains, x: Tensor, h: Tensor, half: Half, ctx: Any, d_out: Tensor
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the gradient of x, where needed, and those of what trains in `half.inputs`.

    dz and d_gains: what `through_gains` returned for `half.inputs`. d_out: the gradient of the
    half's output, to which x is added unchanged in a serial layer.
    """
    normed, statistics = (x, None) if half.norm is None else half.norm.forward(x)
    dh = gradient_of_h(dz, half.inputs)
    d_trained = gradients_of_trained(dz, d_gains, dh, normed, h, half.inputs)
    if not ctx.needs_input_grad[0]:
        return None, d_trained
    d_normed = gradient_of_x(dz, dh, half.inputs)
    residual = d_out if ctx.is_serial else None
    if half.norm is not None:
        assert statistics is not None
        return half.norm.backward(d_normed, x, statistics, residual), d_trained
    return d_normed if residual is None else d_normed + residual, d_trained


def empty(x: Tensor, group: Group, arena: Arena) -> list[Tensor]:
    """Return empty tensors for the A x of `group` and for its outputs."""
    h = arena.empty(*shape_of_h(group, len(x)), x)
    return [h, *(arena.empty(len(x), p.out_features, x) for p in group)]
