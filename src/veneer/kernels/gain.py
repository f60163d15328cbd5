"""A factor for each column that leaves a bias alone, forward and backward, one pass each."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.kernels.native import kernel


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
    dy: Tensor, y: Tensor, gain: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return dz = gain ∘ dy (rows, columns), and the gradient of gain (columns,).

    y is what `apply_gain_` gave, from which z − b comes back as (y − b) / gain. Where the gain is
    0, nothing is left of it, and the gradient counts as 0.
    """
    native = kernel("gain_backward", y)
    if native is None:
        dz = (dy * gain).to(dy.dtype)
        plain = y if bias is None else y - bias
        dots = (dy.to(gain.dtype) * plain).sum(0)
    else:
        dz, dots = torch.empty_like(y), torch.zeros_like(gain)
        native(dy.contiguous(), y.contiguous(), gain, bias, dz, dots, *y.shape)
    return dz, torch.where(gain == 0, 0.0, dots / gain)
