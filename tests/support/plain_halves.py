"""What the halves of a decoder layer are made of in tests, and the same by plain operations."""

from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.kernels.dropout import Mask
from veneer.kernels.norm import Norm
from veneer.kernels.rotary import Rotary
from veneer.lowrank.group import Projection

DOUBLE = {"dtype": torch.float64}
LENGTHS, DIM = [5, 3, 2], 6
TOKENS = sum(LENGTHS)


def rms(dim: int, **options: Any) -> Norm:
    return Norm(torch.randn(dim, **DOUBLE), eps=1e-5, **options)


def layer_norm(dim: int) -> Norm:
    return rms(dim, bias=torch.randn(dim, **DOUBLE), centred=True)


def rotary(pairs: int, *, interleaved: bool = False) -> Rotary:
    angles = torch.rand(TOKENS, pairs, **DOUBLE)
    return Rotary(angles.cos(), angles.sin(), interleaved)


def projection(
    in_: int, out: int, adapters: int, *, bias: bool, dora: bool, drops: bool
) -> Projection:
    ranks = range(1, adapters + 1)
    rank = sum(ranks)
    return Projection(
        torch.randn(out, in_, **DOUBLE),
        torch.randn(out, **DOUBLE) if bias else None,
        torch.randn(rank, in_, **DOUBLE, requires_grad=True),
        torch.randn(out, rank, **DOUBLE, requires_grad=True),
        torch.randn(out, **DOUBLE, requires_grad=True) if dora and rank else None,
        # Of two adapters one drops its inputs.
        tuple((r, Mask.drawn(0.4) if r == 1 else None) for r in ranks) if drops else (),
    )


def projected(p: Projection, x: Tensor) -> Tensor:
    y, ranks = F.linear(x, p.weight), [rank for rank, _ in p.masks] or [p.rank]
    for mask, A, B in zip_longest(
        [mask for _, mask in p.masks], p.A.split(ranks), p.B.split(ranks, 1)
    ):
        kept = x if mask is None else x * mask.apply(torch.ones_like(x))
        y = y + F.linear(F.linear(kept, A), B)
    y = y if p.gain is None else y * p.gain
    return y if p.bias is None else y + p.bias


def normed(norm: Norm | None, x: Tensor) -> Tensor:
    if norm is None:
        return x
    if norm.centred:
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    return F.rms_norm(x, x.shape[-1:], norm.weight + norm.offset, norm.eps)


def turned(rotary: Rotary | None, x: Tensor) -> Tensor:
    if rotary is None:
        return x
    pairs = rotary.cos.shape[1]
    first, second = x[..., :pairs], x[..., pairs : 2 * pairs]
    if rotary.interleaved:
        first, second = x[..., : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2]
    cos, sin = rotary.cos[:, None], rotary.sin[:, None]
    both = [first * cos - second * sin, second * cos + first * sin]
    both = [torch.stack(both, -1).flatten(-2)] if rotary.interleaved else both
    return torch.cat([*both, x[..., 2 * pairs :]], -1)
