"""Activations, alone or as a gate such as SwiGLU's (Shazeer 2020), forward and backward, one pass
each."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.kernels import choice
from veneer.kernels.native import adjacent, kernel, strided

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu_squared", "quick_gelu"]


def activate(kind: Activation, gate: Tensor, up: Tensor | None) -> Tensor:
    """Return act(gate) · up, or act(gate) without up, contiguous.

    gate, up (rows, columns): each may be some columns of a wider matrix.
    """
    native = activation_kernel("activate", kind, gate, up)
    if native is None and choice.uses_triton(gate, up):
        from veneer.kernels import triton_activation

        return triton_activation.activate(
            kind, adjacent(gate), None if up is None else adjacent(up)
        )
    if native is None:
        y = _value(kind, gate)
        return y if up is None else y * up
    gate, up = adjacent(gate), None if up is None else adjacent(up)
    y = gate.new_empty(gate.shape)
    native(*strided(gate), *strided(up), y, *gate.shape)
    return y


def activate_backward(
    kind: Activation,
    dy: Tensor,
    gate: Tensor,
    up: Tensor | None,
    d_gate: Tensor,
    d_up: Tensor | None,
) -> Tensor:
    """Write the gradients of gate and up to d_gate and d_up; return y, which need not be kept.

    dy: the gradient of y = `activate(kind, gate, up)`. Each may be some columns of a wider matrix;
    d_gate and d_up share no memory with the others.
    """
    native = activation_kernel("activate_backward", kind, dy, gate, up, d_gate, d_up)
    if native is None and choice.uses_triton(dy, gate, up, d_gate, d_up):
        from veneer.kernels import triton_activation

        inputs = adjacent(dy), adjacent(gate), None if up is None else adjacent(up)
        return triton_activation.activate_backward(kind, *inputs, d_gate, d_up)
    if native is None:
        y = _value(kind, gate)
        d_gate.copy_(_gradient(kind, dy if up is None else dy * up, gate))
        if up is None or d_up is None:
            return y
        d_up.copy_(dy * y)
        return y * up
    dy, gate, up = adjacent(dy), adjacent(gate), None if up is None else adjacent(up)
    y = gate.new_empty(gate.shape)
    matrices = (argument for x in (dy, gate, up, d_gate, d_up) for argument in strided(x))
    native(*matrices, y, *gate.shape)
    return y


def activation_of(module: nn.Module) -> Activation | None:
    """Return the activation that a module computes, by its numbers, or None for any other.

    One with parameters is another, whatever they are now.
    """
    if any(True for _ in itertools.chain(module.parameters(), module.buffers())):
        return None
    points = torch.linspace(-20, 20, 1001, dtype=torch.float64)[None]
    try:
        with torch.no_grad():
            y = module(points.clone())
    except Exception:  # whatever a module that is no activation may raise
        return None
    if not isinstance(y, Tensor) or y.shape != points.shape:
        return None
    for kind in get_args(Activation):
        if torch.allclose(y.double(), _value(kind, points), rtol=1e-5, atol=1e-6):
            return kind
    return None


def activation_kernel(
    name: str, kind: Activation, like: Tensor, *others: Tensor | None
) -> Callable[..., None] | None:
    """Return a compiled function of activation.cpp, as `kernel` does."""
    struct = kind.title().replace("_", "")
    return kernel(name, like, *others, source="activation", define=f"ACTIVATION={struct}")


def _value(kind: Activation, x: Tensor) -> Tensor:
    """Return act(x)."""
    match kind:
        case "silu":
            return F.silu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "relu":
            return F.relu(x)
        case "relu_squared":
            return F.relu(x).square()
        case "quick_gelu":
            return x * torch.sigmoid(1.702 * x)


def _gradient(kind: Activation, dy: Tensor, x: Tensor) -> Tensor:
    """Return act'(x) ∘ dy."""
    match kind:
        case "silu":
            return torch.ops.aten.silu_backward(dy, x)
        case "gelu":
            return torch.ops.aten.gelu_backward(dy, x)
        case "gelu_tanh":
            return torch.ops.aten.gelu_backward(dy, x, approximate="tanh")
        case "relu":
            return torch.ops.aten.threshold_backward(dy, x, 0)
        case "relu_squared":
            return dy * (2 * F.relu(x))
        case "quick_gelu":
            s = torch.sigmoid(1.702 * x)
            return dy * (s + 1.702 * x * s * (1 - s))
