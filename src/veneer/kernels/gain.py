"""DoRA's gain, a factor for each column that leaves a bias alone: forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.kernels.activation import Activation, activate_backward, activation_kernel
from veneer.kernels.native import adjacent, kernel, strided

# Rows that are summed into one partial sum of a gain's gradient. The partial sums are added up
# afterwards, so that the result does not depend on the number of threads.
BLOCK_ROWS = 64


def apply_gain(z: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """Return gain ∘ (z − b) + b, differentiably, in the wider dtype of z and gain.

    z (..., columns); gain (..., columns), float32 or wider; bias (columns,) or None for 0. Written
    as gain ∘ z + b ∘ (1 − gain), so that a gain of 1 changes no bit.
    """
    return z * gain if bias is None else z * gain + bias * (1 - gain)


def apply_gain_(z: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """Do what `apply_gain` does in place, without a gradient, and return z (rows, columns)."""
    native = kernel("apply_gain", z)
    if native is None:
        return z.copy_(apply_gain(z, gain, bias))
    native(z, gain, bias, *z.shape)
    return z


def gain_backward(
    dy: Tensor, y: Tensor, gain: Tensor, bias: Tensor | None, *, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """Return dz = gain ∘ dy (rows, columns), written over dy if `in_place` allows it, and the
    gradient of gain (columns,).

    y is what `apply_gain_` returned, from which z − b comes back as (y − b) / gain. Where the gain
    is 0, z cannot be recovered from y, and the gradient counts as 0.
    """
    native = kernel("gain_backward", y)
    if native is None:
        sums = (dy.to(gain.dtype) * (y if bias is None else y - bias)).sum(0)
        dz = (dy * gain).to(dy.dtype)
    else:
        dy = dy.contiguous()
        dz, partial_sums = dy if in_place else torch.empty_like(dy), _partial_sums(y, gain)
        native(dy, y.contiguous(), gain, bias, dz, partial_sums, *y.shape, BLOCK_ROWS)
        sums = partial_sums.sum(0)
    return dz, _gradient_of_gain(sums, gain)


def activate_gain_backward(
    kind: Activation,
    dy: Tensor,
    gate: Tensor,
    up: Tensor,
    gains: tuple[Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None],
    d_gate: Tensor,
    d_up: Tensor,
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Do `activate_backward` and then `gain_backward` of gate and up in one pass.

    Writes both dz to d_gate and d_up, (rows, columns) as gate and up, and with rows that may lie
    apart as theirs. Returns the gradients of both gains, and act(gate) · up.
    """
    native = activation_kernel("activate_gain_backward", kind, dy, gate, up, d_gate, d_up)
    if native is None:
        y = activate_backward(kind, dy, gate, up, d_gate, d_up)
        each = zip((d_gate, d_up), (gate, up), gains, biases, strict=True)
        (dz_gate, of_gate), (dz_up, of_up) = (gain_backward(*arguments) for arguments in each)
        d_gate.copy_(dz_gate)
        d_up.copy_(dz_up)
        return (of_gate, of_up), y
    y = gate.new_empty(gate.shape)
    sums = [_partial_sums(gate, gain) for gain in gains]
    inputs = [argument for x in (dy, gate, up) for argument in strided(adjacent(x))]
    outputs = (*strided(d_gate), *strided(d_up), y, *sums)
    filled = [gate.new_zeros(gate.shape[1]) if bias is None else bias for bias in biases]
    native(*inputs, *gains, *filled, *outputs, *gate.shape, BLOCK_ROWS)
    of_gate, of_up = (_gradient_of_gain(s.sum(0), g) for s, g in zip(sums, gains, strict=True))
    return (of_gate, of_up), y


def _partial_sums(y: Tensor, gain: Tensor) -> Tensor:
    """Return an empty (blocks of rows, columns) for sums over each block."""
    return gain.new_empty(-(len(y) // -BLOCK_ROWS), y.shape[1])


def _gradient_of_gain(sums: Tensor, gain: Tensor) -> Tensor:
    """Return Σ dy ∘ (z − b) from Σ dy ∘ (y − b)."""
    return torch.where(gain == 0, 0.0, sums / gain)
