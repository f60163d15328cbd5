"""Norms of a model as values: what a module computes is found by numbers, not by its name."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from veneer.kernels.norm import Norm
from veneer.kernels.wide import wide
from veneer.models.description import is_norm

EPS = ("variance_epsilon", "eps", "epsilon", "norm_eps")  # attributes' names
USUAL = (1e-5, 1e-6)  # eps of a norm that has no such attribute
# How far a formula may be from the module, relatively: rounding, not meaning.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def eps_of(module: nn.Module) -> float | None:
    """Return a norm's eps, by any of its names, or None where it has none."""
    values = (getattr(module, name, None) for name in EPS)
    return next((float(value) for value in values if isinstance(value, float)), None)


def may_be_norm(module: nn.Module) -> bool:
    """Return whether a module may be a norm: it has an eps, or the name of one."""
    return eps_of(module) is not None or is_norm(module)


@torch.no_grad()
def norm_of(module: Any, dim: int) -> Norm | None:
    """Return the norm over `dim` numbers that a module computes, or None where no formula known
    gives what it gives."""
    eps = eps_of(module)
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if any(x is not None and x.shape != (dim,) for x in (weight, bias)):
        return None
    dtype = torch.get_default_dtype() if weight is None else weight.dtype
    device = "cpu" if weight is None else weight.device
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, dim, generator=generator, dtype=torch.float64)
    # From where eps is nothing to where it is all, and off centre.
    x = (x + 0.5) * torch.logspace(-3, 1, len(x), dtype=torch.float64)[:, None]
    x = x.to(device, dtype)
    expected = module(x)
    candidates = [
        Norm(weight, bias=bias, eps=some, offset=offset, centred=centred, rounds=rounds)
        for centred, offset, rounds, some in itertools.product(
            (False, True), (0.0, 1.0), (True, False), USUAL if eps is None else (eps,)
        )
    ]
    nearest = min(candidates, key=lambda norm: _distance(norm.forward(x)[0], expected))
    return nearest if _distance(nearest.forward(x)[0], expected) <= TOLERANCE[dtype] else None


def with_weights(norm: Norm, module: Any) -> Norm:
    """Return a norm with the weights that its module has now."""
    return replace(norm, weight=getattr(module, "weight", None), bias=getattr(module, "bias", None))


def _distance(y: Tensor, expected: Tensor) -> float:
    """Return how far y is from what is expected, relatively, in the row that is farthest."""
    y, expected = wide(y), wide(expected)
    return float(((y - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
