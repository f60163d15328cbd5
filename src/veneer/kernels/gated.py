"""SwiGLU (Shazeer 2020): silu(gate) · up, forward and backward, one pass each."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.kernels.native import kernel


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) · up, (rows, dim) as both."""
    native = kernel("swiglu", gate)
    if native is None:
        return F.silu(gate) * up
    y = torch.empty_like(gate)
    native(gate, up, y, *gate.shape)
    return y


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of gate and up, and silu(gate) · up again, which need not be kept."""
    native = kernel("swiglu_backward", gate)
    if native is None:
        silu = F.silu(gate)
        d_gate = torch.ops.aten.silu_backward(dy * up, gate)
        return d_gate, dy * silu, silu * up
    d_gate, d_up, y = torch.empty_like(gate), torch.empty_like(gate), torch.empty_like(gate)
    native(dy.contiguous(), gate, up, d_gate, d_up, y, *gate.shape)
    return d_gate, d_up, y
