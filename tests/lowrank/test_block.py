"""Law 3 for the halves of a decoder layer: each equals the plain operations, both ways."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.kernels.arena import Arena
from veneer.kernels.attention import Attention, Packing
from veneer.kernels.rotary import rotate_
from veneer.lowrank.block import FeedForward, Norm, SelfAttention
from veneer.lowrank.projection import Projection

DOUBLE = {"dtype": torch.float64}
LENGTHS, DIM, HEADS, KV_HEADS, HEAD_DIM, INNER = [5, 3, 2], 6, 4, 2, 4, 7
TOKENS = sum(LENGTHS)
# How many adapters act on each projection, the last of them the output's.
ADAPTED = {
    "all": (1, 1, 1, 1),
    "two on some": (2, 0, 1, 0),
    "output": (0, 0, 0, 1),
    "none": (0,) * 4,
}


def projection(in_: int, out: int, adapters: int, *, bias: bool) -> Projection:
    masters = [
        (
            torch.randn(rank, in_, **DOUBLE, requires_grad=True),
            torch.randn(out, rank, **DOUBLE, requires_grad=True),
            0.5 + rank,
        )
        for rank in range(1, adapters + 1)
    ]
    weight = torch.randn(out, in_, **DOUBLE)
    return Projection.of(weight, torch.randn(out, **DOUBLE) if bias else None, masters)


def plain(p: Projection, x: Tensor) -> Tensor:
    y = F.linear(x, p.weight, p.bias)
    for A, B, scaling in p.masters:
        y = y + scaling * F.linear(F.linear(x, A), B)
    return y


def norm(x: Tensor, half: SelfAttention | FeedForward) -> Tensor:
    return F.rms_norm(x, (DIM,), half.norm.weight, half.norm.eps)


def self_attention(adapted: str, *, bias: bool, sparing: bool) -> SelfAttention:
    torch.manual_seed(0)
    counts = ADAPTED[adapted]
    outs = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM)
    angles = torch.rand(TOKENS, HEAD_DIM // 2, **DOUBLE).repeat(1, 2)
    return SelfAttention(
        norm=Norm(torch.randn(DIM, **DOUBLE), 1e-5),
        inputs=tuple(
            projection(DIM, out, n, bias=bias) for out, n in zip(outs, counts[:3], strict=True)
        ),
        output=projection(HEADS * HEAD_DIM, DIM, counts[3], bias=bias),
        attention=Attention(Packing(LENGTHS), 0.4),
        cos=angles.cos(),
        sin=angles.sin(),
        arena=Arena(),
        sparing=sparing,
    )


def plain_attention(half: SelfAttention, x: Tensor) -> Tensor:
    q, k, v = (plain(p, norm(x, half)).unflatten(1, (-1, HEAD_DIM)) for p in half.inputs)

    def turned(y: Tensor) -> Tensor:
        first, second = y.chunk(2, -1)
        return y * half.cos[:, None] + torch.cat([-second, first], -1) * half.sin[:, None]

    y = half.attention.composed(turned(q), turned(k), v)
    return x + plain(half.output, y.flatten(1))


def feed_forward(adapted: str, *, bias: bool, sparing: bool) -> FeedForward:
    torch.manual_seed(0)
    counts = ADAPTED[adapted]
    return FeedForward(
        norm=Norm(torch.randn(DIM, **DOUBLE), 1e-5),
        inputs=tuple(projection(DIM, INNER, n, bias=bias) for n in counts[:2]),
        output=projection(INNER, DIM, counts[3], bias=bias),
        arena=Arena(),
        sparing=sparing,
    )


def plain_feed_forward(half: FeedForward, x: Tensor) -> Tensor:
    gate, up = (plain(p, norm(x, half)) for p in half.inputs)
    return x + plain(half.output, F.silu(gate) * up)


HALVES = {
    "attention": (self_attention, plain_attention),
    "feed-forward": (feed_forward, plain_feed_forward),
}
CASES = list(itertools.product(HALVES, ADAPTED, [True, False], [True, False]))


def trained(half: SelfAttention | FeedForward) -> list[Tensor]:
    return [tensor for p in (*half.inputs, half.output) for tensor in p.trained()]


@pytest.mark.parametrize(("which", "adapted", "bias", "sparing"), CASES)
def test_equals_the_plain_operations(which, adapted, bias, sparing):
    make, reference = HALVES[which]
    half = make(adapted, bias=bias, sparing=sparing)
    x = torch.randn(TOKENS, DIM, **DOUBLE, requires_grad=True)
    dy = torch.randn(TOKENS, DIM, **DOUBLE)
    inputs = [x, *trained(half)]
    found, wanted = half(x), reference(half, x)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, dy), torch.autograd.grad(wanted, inputs, dy)
    )


@pytest.mark.parametrize("which", HALVES)
def test_passes_gradcheck(which):
    half = HALVES[which][0]("all", bias=True, sparing=False)
    x = torch.randn(TOKENS, DIM, **DOUBLE, requires_grad=True)

    def forward(x: Tensor, *masters: Tensor) -> Tensor:
        # The masters were cast when the half was made; make it anew from these.
        pairs = iter(zip(masters[::2], masters[1::2], strict=True))
        fresh = [
            Projection.of(p.weight, p.bias, [(*next(pairs), s) for _, _, s in p.masters])
            for p in (*half.inputs, half.output)
        ]
        fields = vars(half) | {"inputs": tuple(fresh[:-1]), "output": fresh[-1]}
        return type(half)(**fields)(x)

    assert torch.autograd.gradcheck(forward, (x, *trained(half)), fast_mode=False)


@pytest.mark.parametrize("which", HALVES)
def test_no_gradient_below_the_lowest_adapter(which):
    half = HALVES[which][0]("all", bias=False, sparing=False)
    x = torch.randn(TOKENS, DIM, **DOUBLE)
    half(x).sum().backward()
    assert x.grad is None
    assert all(tensor.grad is not None for tensor in trained(half))
    nothing = HALVES[which][0]("none", bias=False, sparing=False)
    assert not nothing(x).requires_grad


@pytest.mark.parametrize("which", HALVES)
@pytest.mark.parametrize("sparing", [True, False])
def test_two_passes_before_the_first_way_back(which, sparing):
    """Memory is never used again while a way back may still need it."""
    half = HALVES[which][0]("all", bias=False, sparing=sparing)
    xs = [torch.randn(TOKENS, DIM, **DOUBLE) for _ in range(2)]
    alone = []
    for x in xs:
        alone.append(torch.autograd.grad(half(x).square().sum(), trained(half)))
    losses = [half(x).square().sum() for x in xs]
    for loss, wanted in zip(losses, alone, strict=True):
        torch.testing.assert_close(torch.autograd.grad(loss, trained(half)), wanted)


def test_rotation_is_in_place():
    x = torch.randn(3, 2, 4)
    angles = torch.rand(3, 2).repeat(1, 2)
    assert rotate_(x, angles.cos(), angles.sin()) is x
