"""Rotary position embedding (Su et al. 2021, RoFormer), on the halves of each head as in LLaMA."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.kernels.native import kernel


def rotate_(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> Tensor:
    """Rotate x (tokens, heads, dim) in place by its positions' angles, and return it.

    cos, sin (tokens, dim) hold every angle twice, once for each half. With `back`, rotate the other
    way, as the gradient needs it.
    """
    native = kernel("rotate", x)
    if native is None:
        first, second = x.chunk(2, -1)
        crossed = torch.cat([-second, first], -1) * (-sin if back else sin)[:, None]
        return x.mul_(cos[:, None]).add_(crossed)
    native(x, cos, sin, -1.0 if back else 1.0, *x.shape)
    return x
