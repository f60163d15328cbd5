"""Norms of every kind, and what they are in float64."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.kernels.norm import Norm

KINDS: dict[str, dict[str, Any]] = {
    "llama": {"rounds": True},
    "gemma": {"offset": 1.0},
    "olmo2": {},
    "cohere": {"centred": True},
    "layer_norm": {"centred": True, "bias": True},
    "no_weight": {"centred": True, "weight": False},
    "rms_bias": {"bias": True, "rounds": True},
}


def norm_of(kind: str, dim: int, dtype: torch.dtype) -> Norm:
    settings = dict(KINDS[kind])
    weight = torch.randn(dim).to(dtype) if settings.pop("weight", True) else None
    bias = torch.randn(dim).to(dtype) if settings.pop("bias", False) else None
    return Norm(weight, bias=bias, eps=1e-5, **settings)


def exact(own: Norm, x: Tensor) -> Tensor:
    """Return what torch's functions give in float64."""
    weight = torch.ones(x.shape[-1]) if own.weight is None else own.weight
    bias = None if own.bias is None else own.bias.double()
    scale = weight.double() + own.offset
    if own.centred:
        return F.layer_norm(x.double(), x.shape[-1:], scale, bias, own.eps)
    y = F.rms_norm(x.double(), x.shape[-1:], scale, own.eps)
    return y if bias is None else y + bias
