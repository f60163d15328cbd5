"""Linear layers that share an input, each with its adapters: one pass over it, forward and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.frozen.packed import Packed, product, product_back

Master = tuple[Tensor, Tensor, float]  # A (rank, in), B (out, rank), scaling


@dataclass(frozen=True)
class Projection:
    """A linear layer as it acts in one step, in the dtype of computing, all of it frozen but the
    masters that `A` and `B` were made of.

    weight (out, in), a packed one unpacked for each product; bias (out,) or None; A (rank, in) and
    B (out, rank): the masters' A stacked, their scaled B side by side, with rank 0 where nothing
    acts.
    """

    weight: Tensor | Packed
    bias: Tensor | None
    A: Tensor
    B: Tensor
    masters: Sequence[Master] = ()

    @classmethod
    def of(
        cls, weight: Tensor | Packed, bias: Tensor | None, masters: Sequence[Master]
    ) -> Projection:
        """Return the projection in the dtype of `weight`."""
        dtype = weight.dtype
        if not masters:
            out, in_ = weight.shape
            nothing = torch.empty(0, dtype=dtype, device=weight.device)
            return cls(weight, bias, nothing.view(0, in_), nothing.view(out, 0))
        A = [A.detach().to(dtype) for A, _, _ in masters]
        B = [(B.detach() * scaling).to(dtype) for _, B, scaling in masters]
        if len(masters) == 1:
            return cls(weight, bias, A[0], B[0], masters)
        return cls(weight, bias, torch.cat(A), torch.cat(B, dim=1), masters)

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def trained(self) -> list[Tensor]:
        """Return the masters A, B, A, B, ..."""
        return [tensor for A, B, _ in self.masters for tensor in (A, B)]

    def gradients(self, dA: Tensor, dB: Tensor) -> list[Tensor]:
        """Return the gradients of `trained` from those of the stacked A and the scaled B."""
        ranks = [A.shape[0] for A, _, _ in self.masters]
        found = []
        for (A, B, scaling), a, b in zip(
            self.masters, dA.split(ranks), dB.split(ranks, 1), strict=True
        ):
            found += [a.to(A.dtype), b.to(B.dtype) * scaling]
        return found


def project(x: Tensor, group: Sequence[Projection], outputs: Sequence[Tensor], h: Tensor) -> None:
    """Write W x + b + B A x of each projection to `outputs`, (tokens, out), and A x of all to `h`,
    (tokens, Σ rank). x (tokens, in)."""
    torch.mm(x, _stacked_A(group).T, out=h)
    for p, part, y in zip(group, h.split([p.rank for p in group], 1), outputs, strict=True):
        product(x, p.weight, y)
        if p.bias is not None:
            y += p.bias
        if p.rank:
            y.addmm_(part, p.B.T)


def project_onto(residual: Tensor, x: Tensor, p: Projection, output: Tensor, h: Tensor) -> None:
    """Write residual + (W x + b + B A x) to `output`, and A x to `h`, as `project` does.

    The residual comes last: it is much the largest, and every sum with it is rounded at its size.
    """
    project(x, [p], [output], h)
    output += residual


def gradient_of_h(d_outputs: Sequence[Tensor], group: Sequence[Projection]) -> Tensor:
    """Return dh = dy B of every projection side by side, (tokens, Σ rank)."""
    return torch.cat([dy @ p.B for dy, p in zip(d_outputs, group, strict=True)], dim=1)


def gradient_of_x(d_outputs: Sequence[Tensor], dh: Tensor, group: Sequence[Projection]) -> Tensor:
    """Return dx = Σ (dy W) + dh A, (tokens, in)."""
    dx = product_back(d_outputs[0], group[0].weight)
    for dy, p in zip(d_outputs[1:], group[1:], strict=True):
        if isinstance(p.weight, Tensor):
            dx.addmm_(dy, p.weight)
        else:
            dx += product_back(dy, p.weight)
    return dx.addmm_(dh, _stacked_A(group)) if dh.shape[1] else dx


def gradients_of_masters(
    d_outputs: Sequence[Tensor], dh: Tensor, x: Tensor, h: Tensor, group: Sequence[Projection]
) -> list[Tensor]:
    """Return the gradients dA = dhᵀ x and dB = dyᵀ h of every projection's masters, in order."""
    if not dh.shape[1]:
        return []
    ranks = [p.rank for p in group]
    parts = zip(d_outputs, (dh.T @ x).split(ranks), h.split(ranks, 1), group, strict=True)
    return [
        gradient for dy, dA, part, p in parts if p.rank for gradient in p.gradients(dA, dy.T @ part)
    ]


def _stacked_A(group: Sequence[Projection]) -> Tensor:
    return torch.cat([p.A for p in group])  # (Σ rank, in)
