"""RMSNorm by Liger's Triton kernels (Hsu et al. 2024), as `kernels.norm` has the formula."""

from __future__ import annotations

from liger_kernel.ops.fused_add_rms_norm import fused_add_rms_norm_backward
from liger_kernel.ops.rms_norm import rms_norm_backward, rms_norm_forward
from liger_kernel.ops.utils import calculate_settings
from torch import Tensor

STAGES = 2  # of a program's loads, as Liger sets them


def forward(
    x: Tensor, weight: Tensor, eps: float, offset: float, *, rounds: bool
) -> tuple[Tensor, Tensor]:
    """Return y, shaped as x (..., dim), and 1 / σ of each row, (rows,), in float32."""
    flat = x.contiguous().view(-1, x.shape[-1])
    y, _, rstd, *_ = rms_norm_forward(flat, weight, eps, offset, _casting(rounds), None)
    return y.view(x.shape), rstd


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    residual: Tensor | None,
    offset: float,
    *,
    rounds: bool,
) -> Tensor:
    """Return the gradient of x, with `residual` added to it, and make none of the weight."""
    dim = x.shape[-1]
    dy, flat = (t.contiguous().view(-1, dim) for t in (dy, x))
    # By the numbers of Liger's modes: llama's rounds before the weight, Gemma's does not.
    settings = (offset, 0 if rounds else 1, *calculate_settings(dim))
    options = {"in_place": False, "needs_dw": False}
    if residual is None:
        dx, _ = rms_norm_backward(dy, flat, weight, rstd, *settings, row_mode=None, **options)
    else:
        added = residual.contiguous().view(-1, dim)
        inputs = (dy, added, flat, weight, rstd)
        dx, *_ = fused_add_rms_norm_backward(*inputs, *settings, num_stages=STAGES, **options)
    return dx.view(x.shape)


def _casting(rounds: bool) -> str:
    return "llama" if rounds else "gemma"
