"""Linear layers that share an input, each with its adapters: one pass over it, forward and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.kernels.gain import apply_gain_, gain_backward
from veneer.quant.weight import QuantizedWeight, product, product_back


@dataclass(frozen=True)
class Projection:
    """A linear layer as it acts in one step, in the dtype of computing: gain ∘ (W x + B A x) + b.

    weight (out, in), frozen, a packed one unpacked for each product; bias (out,), frozen, or None;
    A (rank, in) and B (out, rank): those of all adapters, stacked and scaled, with rank 0 where
    nothing acts; gain (out,), float32 or wider: DoRA's factor of each output, or None for 1.
    """

    weight: Tensor | QuantizedWeight
    bias: Tensor | None
    A: Tensor
    B: Tensor
    gain: Tensor | None = None

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
        return [self.A, self.B] if self.gain is None else [self.A, self.B, self.gain]


def project(x: Tensor, group: Sequence[Projection], outputs: Sequence[Tensor], h: Tensor) -> None:
    """Write gain ∘ (W x + B A x) + b of each projection to `outputs`, (tokens, out), and A x of all
    to `h`, (tokens, Σ rank). x (tokens, in)."""
    torch.mm(x, _stacked_A(group).T, out=h)
    for p, part, y in zip(group, h.split([p.rank for p in group], 1), outputs, strict=True):
        product(x, p.weight, y)
        if p.bias is not None:
            y += p.bias
        if p.rank:
            y.addmm_(part, p.B.T)
        if p.gain is not None:
            apply_gain_(y, p.gain, p.bias)


def through_gains(
    d_outputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    group: Sequence[Projection],
    *,
    in_place: bool,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return the gradients of what each gain is a factor of, (tokens, out), in the place of those
    of the outputs if that is allowed, and of the gains.

    outputs: what `project` wrote; looked at only where there is a gain.
    """
    found = [
        (dy, None) if p.gain is None else gain_backward(dy, y, p.gain, p.bias, in_place=in_place)
        for dy, y, p in zip(d_outputs, outputs, group, strict=True)
    ]
    return [dz for dz, _ in found], [d_gain for _, d_gain in found]


def gradient_of_h(dz: Sequence[Tensor], group: Sequence[Projection]) -> Tensor:
    """Return dh = dz B of every projection side by side, (tokens, Σ rank)."""
    return torch.cat([d @ p.B for d, p in zip(dz, group, strict=True)], dim=1)


def gradient_of_x(dz: Sequence[Tensor], dh: Tensor, group: Sequence[Projection]) -> Tensor:
    """Return dx = Σ (dz W) + dh A, (tokens, in)."""
    dx = product_back(dz[0], group[0].weight)
    for d, p in zip(dz[1:], group[1:], strict=True):
        if isinstance(p.weight, Tensor):
            dx.addmm_(d, p.weight)
        else:
            dx += product_back(d, p.weight)
    return dx.addmm_(dh, _stacked_A(group)) if dh.shape[1] else dx


def gradients_of_trained(
    dz: Sequence[Tensor],
    d_gains: Sequence[Tensor | None],
    dh: Tensor,
    x: Tensor,
    h: Tensor,
    group: Sequence[Projection],
) -> list[Tensor]:
    """Return dA = dhᵀ x, dB = dzᵀ h and the gain's gradient of every projection, in order."""
    if not dh.shape[1]:
        return []
    ranks = [p.rank for p in group]
    found: list[Tensor] = []
    for d, d_gain, dA, part in zip(
        dz, d_gains, (dh.T @ x).split(ranks), h.split(ranks, 1), strict=True
    ):
        if part.shape[1]:
            found += [dA, d.T @ part]
        if d_gain is not None:
            found.append(d_gain)
    return found


def _stacked_A(group: Sequence[Projection]) -> Tensor:
    return torch.cat([p.A for p in group])  # (Σ rank, in)
