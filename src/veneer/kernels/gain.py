"""A factor for each column that leaves a bias alone, forward and backward, one pass each."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.kernels.gated import swiglu_backward
from veneer.kernels.native import kernel

BLOCK_ROWS = 64  # whose part of a sum over all rows is added up at a time


def apply_gain_(z: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """Turn z (rows, columns) into gain ∘ (z − b) + b, in place; a gain of 1 changes no bit.

    gain (columns,), float32 or wider.
    """
    native = kernel("apply_gain", z)
    if native is None:
        y = z * gain if bias is None else z * gain + bias * (1 - gain)
        return z.copy_(y)
    native(z, gain, bias, *z.shape)
    return z


def gain_backward(
    dy: Tensor, y: Tensor, gain: Tensor, bias: Tensor | None, *, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """Return dz = gain ∘ dy (rows, columns), in the place of dy if that is allowed, and the
    gradient of gain (columns,).

    y is what `apply_gain_` gave, from which z − b comes back as (y − b) / gain. Where the gain is
    0, nothing is left of it, and the gradient counts as 0.
    """
    native = kernel("gain_backward", y)
    if native is None:
        sums = (dy.to(gain.dtype) * (y if bias is None else y - bias)).sum(0)
        dz = (dy * gain).to(dy.dtype)
    else:
        dy = dy.contiguous()
        dz, parts = dy if in_place else torch.empty_like(dy), _sums_of_blocks(y, gain)
        native(dy, y.contiguous(), gain, bias, dz, parts, *y.shape, BLOCK_ROWS)
        sums = parts.sum(0)
    return dz, _of_gain(sums, gain)


def swiglu_gain_backward(
    dy: Tensor,
    gate: Tensor,
    up: Tensor,
    gains: tuple[Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None],
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
    """Return what `swiglu_backward` and `gain_backward` of gate and up do, in one pass: both dz,
    both gradients of gains, and silu(gate) · up."""
    native = kernel("swiglu_gain_backward", gate)
    if native is None:
        *d_inputs, y = swiglu_backward(dy, gate, up)
        (d_gate, gate_sums), (d_up, up_sums) = (
            gain_backward(*each) for each in zip(d_inputs, (gate, up), gains, biases, strict=True)
        )
        return (d_gate, d_up), (gate_sums, up_sums), y
    d_gate, d_up, y = torch.empty_like(gate), torch.empty_like(gate), torch.empty_like(gate)
    parts = [_sums_of_blocks(gate, gain) for gain in gains]
    shape = (*gate.shape, BLOCK_ROWS)
    native(dy.contiguous(), gate, up, *gains, *biases, d_gate, d_up, y, *parts, *shape)
    first, second = (_of_gain(part.sum(0), gain) for part, gain in zip(parts, gains, strict=True))
    return (d_gate, d_up), (first, second), y


def _sums_of_blocks(y: Tensor, gain: Tensor) -> Tensor:
    return gain.new_empty(-(len(y) // -BLOCK_ROWS), y.shape[1])


def _of_gain(sums: Tensor, gain: Tensor) -> Tensor:
    """Return Σ dy ∘ (z − b) from Σ dy ∘ (y − b)."""
    return torch.where(gain == 0, 0.0, sums / gain)
