"""The low-rank product W x + B A x over linear layers that share an input: forward and backward.

A single layer is a group of one (`LowRankLinear`); the fused halves of a decoder layer call the
same functions with groups of several.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veneer.kernels import choice
from veneer.kernels.dropout import Mask
from veneer.kernels.gain import apply_gain_, gain_backward
from veneer.lowrank.masters import Masters
from veneer.quant.weight import QuantizedWeight, product, product_back

# For each of the adapters stacked in A and B its rank, and what it multiplies x with in a step of
# training, None for 1. No masks at all where all are None.
Masks = tuple[tuple[int, Mask | None], ...]


@dataclass(frozen=True)
class Projection:
    """A linear layer as it acts in one step, in the dtype of computing: gain ∘ (W x + B A x) + b.

    weight (out, in), frozen; a quantized one is dequantized for each product. bias (out,), frozen,
    or None. A (rank, in) and B (out, rank): those of all adapters, stacked and scaled, with rank 0
    where nothing acts. gain (out,), float32 or wider: DoRA's factor of each output, or None for 1.
    With masks, each adapter adds B A (x ∘ mask). masters: what trains in place of A and B, or None
    where they do so themselves.
    """

    weight: Tensor | QuantizedWeight
    bias: Tensor | None
    A: Tensor
    B: Tensor
    gain: Tensor | None = None
    masks: Masks = ()
    masters: Masters | None = None

    @classmethod
    def plain(cls, weight: Tensor | QuantizedWeight, bias: Tensor | None) -> Projection:
        """Return the projection on which no adapter acts."""
        out, in_ = weight.shape
        nothing = torch.empty(0, dtype=weight.dtype, device=weight.device)
        return cls(weight, bias, nothing.view(0, in_), nothing.view(out, 0))

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def trained(self) -> list[Tensor]:
        """Return A, B and gain, as far as there are some: what gradients are for."""
        if not self.rank:
            return []
        factors = self if self.masters is None else self.masters
        return [factors.A, factors.B] if self.gain is None else [factors.A, factors.B, self.gain]


def project(
    x: Tensor,
    group: Sequence[Projection],
    outputs: Sequence[Tensor],
    h: Tensor,
) -> None:
    """Write gain ∘ (W x + B A x) + b of each projection to `outputs`, (tokens, out), and A x of all
    side by side to `h`, (tokens, Σ rank). x (tokens, in)."""
    if _are_masked(group):
        for ranks, A, mask in _by_mask(group):
            torch.mm(x if mask is None else mask.apply(x), A.T, out=h[:, ranks])
    else:
        torch.mm(x, _stacked_A(group).T, out=h)
    for p, own_h, y in zip(group, _columns(h, group), outputs, strict=True):
        _base_product(x, p, y)
        if p.rank and p.gain is not None and choice.uses_triton(y, own_h, p.B, p.gain, p.bias):
            from veneer.kernels.triton_gain import add_with_gain

            add_with_gain(y, own_h, p.B, p.gain, p.bias)
            continue
        if p.rank:
            y.addmm_(own_h, p.B.T)
        if p.gain is not None:
            apply_gain_(y, p.gain, p.bias)


def through_gains(
    d_outputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    group: Sequence[Projection],
    *,
    in_place: bool,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return the gradients dz of z = W x + B A x, (tokens, out) each, and those of the gains.

    outputs: what `project` wrote; read only where there is a gain. With `in_place`, dz may be
    written over `d_outputs`.
    """
    pairs = [
        (dy, None) if p.gain is None else gain_backward(dy, y, p.gain, p.bias, in_place=in_place)
        for dy, y, p in zip(d_outputs, outputs, group, strict=True)
    ]
    return [dz for dz, _ in pairs], [d_gain for _, d_gain in pairs]


def gradient_of_h(dz: Sequence[Tensor], group: Sequence[Projection]) -> Tensor:
    """Return dh = dz B of every projection side by side, (tokens, Σ rank)."""
    return _joined([d @ p.B for d, p in zip(dz, group, strict=True)], dim=1)


def gradient_of_x(dz: Sequence[Tensor], dh: Tensor, group: Sequence[Projection]) -> Tensor:
    """Return dx = Σ (dz W) + dh A, (tokens, in), where each adapter's dh A has its mask."""
    dx = product_back(dz[0], group[0].weight)
    for d, p in zip(dz[1:], group[1:], strict=True):
        if isinstance(p.weight, Tensor):
            dx.addmm_(d, p.weight)
        else:
            dx += product_back(d, p.weight)
    if not dh.shape[1]:
        return dx
    if not _are_masked(group):
        return dx.addmm_(dh, _stacked_A(group))
    for ranks, A, mask in _by_mask(group):
        dx = dx.addmm_(dh[:, ranks], A) if mask is None else mask.add_(dx, dh[:, ranks] @ A)
    return dx


def gradients_of_trained(
    dz: Sequence[Tensor],
    d_gains: Sequence[Tensor | None],
    dh: Tensor,
    x: Tensor,
    h: Tensor,
    group: Sequence[Projection],
) -> list[Tensor | None]:
    """Return dA = dhᵀ (x ∘ mask), dB = dzᵀ h and the gain's gradient of every projection, in the
    order of `trained`; None for an A or B that does not train."""
    if not dh.shape[1]:
        return []
    dAs: Sequence[Tensor | None] = [None] * len(group)
    trained = [p.trained() for p in group]
    if any(A.requires_grad for A, *_ in filter(None, trained)):
        dAs = _gradient_of_A(dh, x, group).split_with_sizes([p.rank for p in group])
    gradients: list[Tensor | None] = []
    for p, d, d_gain, dA, own_h, own in zip(
        group, dz, d_gains, dAs, _columns(h, group), trained, strict=True
    ):
        if own:
            dB = d.T @ own_h if own[1].requires_grad else None
            gradients += [dA, dB] if p.masters is None else p.masters.gradients(dA, dB)
        if d_gain is not None:
            gradients.append(d_gain)
    return gradients


class LowRankLinear(torch.autograd.Function):
    """y = x Wᵀ + b + x Aᵀ Bᵀ, with B already scaled; with masks, each adapter's x has its own.

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
    ) -> Tensor:
        # Never a view: what follows may add to y in place (Falcon does), and autograd forbids that
        # for views that are made in here.
        y = x.new_empty(len(x), weight.shape[0])  # (tokens, out)
        h = x.new_empty(len(x), len(A))  # (tokens, rank)
        project(x, [Projection(weight, bias, A, B, masks=masks)], [y], h)
        ctx.weight = weight  # no step changes it before the backward pass
        ctx.masks = masks
        ctx.save_for_backward(x, A, B, h)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, h = ctx.saved_tensors
        dy = grads[0]  # (tokens, out)
        needs_x, needs_W, needs_b, needs_A, *_ = ctx.needs_input_grad
        group = [Projection(ctx.weight, None, A, B, masks=ctx.masks)]
        dh = gradient_of_h([dy], group) if needs_x or needs_A else h
        dA, dB = gradients_of_trained([dy], [None], dh, x, h, group)
        dx = gradient_of_x([dy], dh, group) if needs_x else None
        dW = dy.T @ x if needs_W else None  # (out, in)
        db = dy.sum(0) if needs_b else None  # (out,)
        return dx, dW, db, dA, dB, None


def _base_product(x: Tensor, p: Projection, out: Tensor) -> None:
    """Write W x + b to `out`, by the operations of the base's own linear layer."""
    bias = None if p.bias is None else p.bias.to(x.dtype)
    if not isinstance(p.weight, Tensor):
        product(x, p.weight, out)
        if bias is not None:
            out += bias
    elif bias is None:
        torch.mm(x, p.weight.to(x.dtype).T, out=out)
    else:
        torch.addmm(bias, x, p.weight.to(x.dtype).T, out=out)


def _gradient_of_A(dh: Tensor, x: Tensor, group: Sequence[Projection]) -> Tensor:
    """Return dhᵀ (x ∘ mask) of all adapters, (Σ rank, in)."""
    if not _are_masked(group):
        return dh.T @ x
    dA = x.new_empty(dh.shape[1], x.shape[1])
    for ranks, _, mask in _by_mask(group):
        torch.mm(dh[:, ranks].T, x if mask is None else mask.apply(x), out=dA[ranks])
    return dA


def _are_masked(group: Sequence[Projection]) -> bool:
    return any(p.masks for p in group)


def _by_mask(group: Sequence[Projection]) -> Iterator[tuple[slice, Tensor, Mask | None]]:
    """Yield which of Σ rank belong to each adapter, its A (rank, in) and its mask."""
    start = 0
    for p in group:
        masks = p.masks or ((p.rank, None),)
        for (rank, mask), A in zip(masks, p.A.split([rank for rank, _ in masks]), strict=True):
            if rank:
                yield slice(start, start + rank), A, mask
            start += rank


def _columns(h: Tensor, group: Sequence[Projection]) -> Sequence[Tensor]:
    """Return each projection's part of h (tokens, Σ rank)."""
    return [h] if len(group) == 1 else h.split_with_sizes([p.rank for p in group], 1)


def _stacked_A(group: Sequence[Projection]) -> Tensor:
    return _joined([p.A for p in group], dim=0)  # (Σ rank, in)


def _joined(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)
