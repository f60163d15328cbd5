"""What is between the two stacks of a mixture's experts, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from veneer.kernels.activation import Activation, activate, activate_backward


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
        return self.function(up)

    def backward(self, d_inner: Tensor, up: Tensor, d_up: Tensor) -> Tensor:
        if self.known is not None:
            return self.known.backward(d_inner, up, d_up)
        return pulled_back(self.function, up, d_inner, d_up)


def pulled_back(function: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor, dx: Tensor) -> Tensor:
    """Write the gradient of x to `dx` and return function(x)."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        y = function(leaf)
    dx.copy_(torch.autograd.grad(y, leaf, dy.to(y.dtype))[0])
    return y.detach()
