"""RMSNorm: w · x / sqrt(mean(x²) + eps), forward and backward, one pass each."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.kernels.native import kernel


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return w · x̂ (rows, dim), and 1 / sqrt(mean(x²) + eps) (rows,) in float32 or wider.

    x̂ is rounded to x's dtype before the product with w, as transformers does.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    native = kernel("rms_norm", x)
    if native is None:
        rstd = torch.rsqrt(x.to(wide).square().mean(-1) + eps)
        return weight * (x.to(wide) * rstd[:, None]).to(x.dtype), rstd
    x = x.contiguous()
    normed, rstd = torch.empty_like(x), torch.empty(x.shape[0], dtype=wide)
    native(x, weight, float(eps), normed, rstd, *x.shape)
    return normed, rstd


def rms_norm_backward(
    dn: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, residual: Tensor
) -> Tensor:
    """Return residual + the gradient of `rms_norm` with respect to x, (rows, dim).

    residual: the gradient of x from what else uses it. The weight is frozen.
    """
    native = kernel("rms_norm_backward", x)
    if native is None:
        hat = x.to(rstd.dtype) * rstd[:, None]
        g = (dn * weight).to(rstd.dtype)
        dx = rstd[:, None] * (g - hat * (g * hat).mean(-1, keepdim=True))
        return (residual + dx).to(x.dtype)
    x = x.contiguous()
    dx = torch.empty_like(x)
    native(dn.contiguous(), x, weight, rstd, residual.contiguous(), dx, *x.shape)
    return dx
