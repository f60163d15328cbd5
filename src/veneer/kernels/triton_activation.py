"""act(gate) · up and its gradients, one pass each, as `kernels.activation` has the formulas.

Liger's functions for SwiGLU and GeGLU write the gradients over gate and up and do not return
act(gate) · up, which the backward pass of a fused layer needs beside them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from veneer.kernels.triton_numbers import tanh

COLUMNS = 1024  # of a row that one program takes
ROOT_HALF = tl.constexpr(0.7071067811865476)
DENSITY = tl.constexpr(0.3989422804014327)  # 1 / √(2 π)
# A number on the left of a tensor would make the interpreter take the product for a number.
# GELU's approximation: tanh(√(2 / π) (x + 0.044715 x³)).
TANH_FACTOR, TANH_CUBE = tl.constexpr(0.7978845608028654), tl.constexpr(0.044715)


def activate(kind: str, gate: Tensor, up: Tensor | None) -> Tensor:
    """Return act(gate) · up, or act(gate), contiguous. gate, up (rows, columns): the numbers of a
    row lie side by side."""
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _forward[_grid(gate)](
        *(gate, gate if up is None else up, y, gate.stride(0), 0 if up is None else up.stride(0)),
        *(gate.shape[1], kind, up is not None, COLUMNS),
    )
    return y


def activate_backward(
    kind: str, dy: Tensor, gate: Tensor, up: Tensor | None, d_gate: Tensor, d_up: Tensor | None
) -> Tensor:
    """Write the gradients of gate and up to d_gate and d_up; return act(gate) · up."""
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    pairs = [dy, gate, gate if up is None else up, d_gate, d_gate if d_up is None else d_up]
    strides = [x.stride(0) for x in pairs]
    _backward[_grid(gate)](*pairs, y, *strides, gate.shape[1], kind, up is not None, COLUMNS)
    return y


def _grid(x: Tensor) -> tuple[int, int]:
    return x.shape[0], triton.cdiv(x.shape[1], COLUMNS)


@triton.jit
def _forward(
    gate: tl.tensor,
    up: tl.tensor,
    y: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    columns: tl.tensor,
    kind: tl.constexpr,
    is_gated: tl.constexpr,
    block: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < columns
    x = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    value = _value(x, kind)
    if is_gated:
        value *= tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * columns + column, value, mask=inside)


@triton.jit
def _backward(
    dy: tl.tensor,
    gate: tl.tensor,
    up: tl.tensor,
    d_gate: tl.tensor,
    d_up: tl.tensor,
    y: tl.tensor,
    dy_stride: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    d_gate_stride: tl.tensor,
    d_up_stride: tl.tensor,
    columns: tl.tensor,
    kind: tl.constexpr,
    is_gated: tl.constexpr,
    block: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < columns
    x = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dy + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
    value = _value(x, kind)
    if is_gated:
        u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_up + row * d_up_stride + column, d * value, mask=inside)
        d *= u
        value *= u
    tl.store(d_gate + row * d_gate_stride + column, d * _slope(x, kind), mask=inside)
    tl.store(y + row * columns + column, value, mask=inside)


@triton.jit
def _value(x: tl.tensor, kind: tl.constexpr) -> tl.tensor:
    """Return act(x)."""
    # Triton goes on behind a return, so that there is one, at the end.
    if kind == "silu":
        y = x * tl.sigmoid(x)
    elif kind == "gelu":
        y = 0.5 * x * (1 + tl.erf(x * ROOT_HALF))
    elif kind == "gelu_tanh":
        y = 0.5 * x * (1 + tanh((x + x * x * x * TANH_CUBE) * TANH_FACTOR))
    elif kind == "relu":
        y = tl.where(x < 0, 0.0, x)
    elif kind == "relu_squared":
        y = tl.where(x < 0, 0.0, x * x)
    else:
        tl.static_assert(kind == "quick_gelu")
        y = x * tl.sigmoid(1.702 * x)
    return y


@triton.jit
def _slope(x: tl.tensor, kind: tl.constexpr) -> tl.tensor:
    """Return act'(x)."""
    if kind == "silu":
        s = tl.sigmoid(x)
        d = s * (1 + x * (1 - s))
    elif kind == "gelu":
        d = 0.5 * (1 + tl.erf(x * ROOT_HALF)) + x * DENSITY * tl.exp(-0.5 * x * x)
    elif kind == "gelu_tanh":
        t = tanh((x + x * x * x * TANH_CUBE) * TANH_FACTOR)
        d = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * (1 + 3 * x * x * TANH_CUBE) * TANH_FACTOR
    elif kind == "relu":
        d = tl.where(x > 0, 1.0, 0.0)
    elif kind == "relu_squared":
        d = tl.where(x > 0, 2 * x, 0.0)
    else:
        tl.static_assert(kind == "quick_gelu")
        s = tl.sigmoid(1.702 * x)
        d = s + 1.702 * x * s * (1 - s)
    return d
