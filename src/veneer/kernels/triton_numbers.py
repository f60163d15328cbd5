"""Functions of single numbers that Triton's language lacks, in float32."""

from __future__ import annotations

import triton
import triton.language as tl

TANH_SERIES = tl.constexpr(0.25)  # below, 1 − exp(−2 |x|) has too few digits


@triton.jit
def tanh(x: tl.tensor) -> tl.tensor:
    """Return tanh(x)."""
    square = x * x
    series = 1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * 62 / 2835)))
    size = tl.abs(x)
    e = tl.exp(-2 * size)
    far = tl.where(x < 0, -1.0, 1.0) * (1 - e) / (1 + e)
    return tl.where(size < TANH_SERIES, x * series, far)
