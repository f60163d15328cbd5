"""Law 3 for the halves of a decoder layer: outputs and gradients equal the plain operations'."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.fused.block import FeedForward, SelfAttention
from veneer.kernels.arena import Arena
from veneer.kernels.attention import Attention, Packing
from veneer.kernels.norm import Norm
from veneer.kernels.rotary import Rotary
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
# Which projections have a gain, if an adapter acts on them.
DORA = {
    "none": (False,) * 4,
    "all": (True,) * 4,
    "some": (True, False, True, False),
    "others": (False, True, False, True),
}


def projection(in_: int, out: int, adapters: int, *, bias: bool, dora: bool = False) -> Projection:
    rank = adapters * (adapters + 1) // 2  # of adapters of rank 1, 2, ...
    return Projection(
        torch.randn(out, in_, **DOUBLE),
        torch.randn(out, **DOUBLE) if bias else None,
        torch.randn(rank, in_, **DOUBLE, requires_grad=True),
        torch.randn(out, rank, **DOUBLE, requires_grad=True),
        torch.randn(out, **DOUBLE, requires_grad=True) if dora and rank else None,
    )


def plain(p: Projection, x: Tensor) -> Tensor:
    y = F.linear(x, p.weight) + F.linear(F.linear(x, p.A), p.B)
    y = y if p.gain is None else y * p.gain
    return y if p.bias is None else y + p.bias


def norm(x: Tensor, half: SelfAttention | FeedForward) -> Tensor:
    return F.rms_norm(x, (DIM,), half.norm.weight, half.norm.eps)


def self_attention(
    adapted: str, *, bias: bool, recompute_projections: bool, dora: str = "none"
) -> SelfAttention:
    torch.manual_seed(0)
    counts, gains = ADAPTED[adapted], DORA[dora]
    outs = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM)
    angles = torch.rand(TOKENS, HEAD_DIM // 2, **DOUBLE)
    return SelfAttention(
        norm=Norm(torch.randn(DIM, **DOUBLE), eps=1e-5, rounds=True),
        inputs=tuple(
            projection(DIM, out, n, bias=bias, dora=gain)
            for out, n, gain in zip(outs, counts, gains, strict=False)
        ),
        output=projection(HEADS * HEAD_DIM, DIM, counts[3], bias=bias, dora=gains[3]),
        attention=Attention(Packing(LENGTHS), 0.4),
        rotary=Rotary(angles.cos(), angles.sin()),
        arena=Arena(),
        recompute_projections=recompute_projections,
    )


def plain_attention(half: SelfAttention, x: Tensor) -> Tensor:
    q, k, v = (plain(p, norm(x, half)).unflatten(1, (-1, HEAD_DIM)) for p in half.inputs)

    def rotated(y: Tensor) -> Tensor:
        first, second = y.chunk(2, -1)
        cos, sin = (x.repeat(1, 2)[:, None] for x in (half.rotary.cos, half.rotary.sin))
        return y * cos + torch.cat([-second, first], -1) * sin

    y = half.attention.composed(rotated(q), rotated(k), v)
    return x + plain(half.output, y.flatten(1))


def feed_forward(
    adapted: str, *, bias: bool, recompute_projections: bool, dora: str = "none"
) -> FeedForward:
    torch.manual_seed(0)
    counts, gains = ADAPTED[adapted], DORA[dora]
    return FeedForward(
        norm=Norm(torch.randn(DIM, **DOUBLE), eps=1e-5, rounds=True),
        inputs=tuple(projection(DIM, INNER, counts[i], bias=bias, dora=gains[i]) for i in range(2)),
        output=projection(INNER, DIM, counts[3], bias=bias, dora=gains[3]),
        arena=Arena(),
        recompute_projections=recompute_projections,
    )


def plain_feed_forward(half: FeedForward, x: Tensor) -> Tensor:
    gate, up = (plain(p, norm(x, half)) for p in half.inputs)
    return x + plain(half.output, F.silu(gate) * up)


HALVES = {
    "attention": (self_attention, plain_attention),
    "feed-forward": (feed_forward, plain_feed_forward),
}
CASES = list(itertools.product(HALVES, ADAPTED, DORA, [True, False], [True, False]))


def after(half: SelfAttention | FeedForward, x: Tensor) -> Tensor:
    y = half(x)
    return y if isinstance(y, Tensor) else y[0]


def trained(half: SelfAttention | FeedForward) -> list[Tensor]:
    return [tensor for p in (*half.inputs, half.output) for tensor in p.trained()]


@pytest.mark.parametrize(("which", "adapted", "dora", "bias", "recompute_projections"), CASES)
def test_equals_the_plain_operations(which, adapted, dora, bias, recompute_projections):
    make, reference = HALVES[which]
    half = make(adapted, bias=bias, recompute_projections=recompute_projections, dora=dora)
    x = torch.randn(TOKENS, DIM, **DOUBLE, requires_grad=True)
    dy = torch.randn(TOKENS, DIM, **DOUBLE)
    inputs = [x, *trained(half)]
    y, expected = after(half, x), reference(half, x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy)
    )


@pytest.mark.parametrize("dora", ["none", "all"])
@pytest.mark.parametrize("which", HALVES)
def test_passes_gradcheck(which, dora):
    half = HALVES[which][0]("all", bias=True, recompute_projections=False, dora=dora)
    x = torch.randn(TOKENS, DIM, **DOUBLE, requires_grad=True)

    def forward(x: Tensor, *tensors: Tensor) -> Tensor:
        new = iter(tensors)
        fresh = [
            replace(p, A=next(new), B=next(new), gain=p.gain if p.gain is None else next(new))
            for p in (*half.inputs, half.output)
        ]
        half_of_these = replace(half, inputs=tuple(fresh[:-1]), output=fresh[-1])
        return after(half_of_these, x)

    assert torch.autograd.gradcheck(forward, (x, *trained(half)), fast_mode=False)


@pytest.mark.parametrize("which", HALVES)
def test_no_gradient_below_the_lowest_adapter(which):
    half = HALVES[which][0]("all", bias=False, recompute_projections=False)
    x = torch.randn(TOKENS, DIM, **DOUBLE)
    after(half, x).sum().backward()
    assert x.grad is None
    assert all(tensor.grad is not None for tensor in trained(half))
    nothing = HALVES[which][0]("none", bias=False, recompute_projections=False)
    assert not after(nothing, x).requires_grad


@pytest.mark.parametrize("which", HALVES)
@pytest.mark.parametrize("recompute_projections", [True, False])
def test_two_passes_before_the_first_way_back(which, recompute_projections):
    """Memory is not reused while a backward pass may still need it."""
    half = HALVES[which][0]("all", bias=False, recompute_projections=recompute_projections)
    xs = [torch.randn(TOKENS, DIM, **DOUBLE) for _ in range(2)]
    alone = []
    for x in xs:
        alone.append(torch.autograd.grad(after(half, x).square().sum(), trained(half)))
    losses = [after(half, x).square().sum() for x in xs]
    for loss, gradients in zip(losses, alone, strict=True):
        torch.testing.assert_close(torch.autograd.grad(loss, trained(half)), gradients)


@pytest.mark.parametrize("dora", DORA)
@pytest.mark.parametrize("which", HALVES)
def test_what_is_kept_is_left_as_it_was(which, dora):
    """The backward pass can run twice."""
    half = HALVES[which][0]("all", bias=True, recompute_projections=False, dora=dora)
    x = torch.randn(TOKENS, DIM, **DOUBLE, requires_grad=True)
    loss = after(half, x).square().sum()
    first = torch.autograd.grad(loss, [x, *trained(half)], retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, [x, *trained(half)]), first)


@pytest.mark.parametrize("adapted", ["all", "output", "none"])
def test_the_second_half_needs_no_copy_of_a_sum_that_is_known(adapted):
    first = self_attention(adapted, bias=True, recompute_projections=False, dora="all")
    second = feed_forward("all", bias=True, recompute_projections=False, dora="all")
    x = torch.randn(TOKENS, DIM, **DOUBLE, requires_grad=True)

    def both(*, summands_kept: bool) -> list[Tensor]:
        middle, summands = first(x)
        assert (summands is None) == (adapted == "none")
        half = replace(second, summands=summands if summands_kept else None)
        kept: list[int] = []

        def keep(tensor: Tensor) -> Tensor:
            kept.append(tensor.data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = half(middle)
        assert (middle.data_ptr() in kept) == (half.summands is None)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *trained(first), *trained(second)])]

    for ours, expected in zip(both(summands_kept=True), both(summands_kept=False), strict=True):
        assert torch.equal(ours, expected)
