"""Law 3 for attention over latents: outputs and gradients equal the plain operations'."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from support.plain_halves import (
    DIM,
    DOUBLE,
    LENGTHS,
    TOKENS,
    normed,
    projected,
    projection,
    rms,
    rotary,
    turned,
)
from veneer.fused.analyse_latent import latents_of
from veneer.fused.heads import LatentHeads
from veneer.fused.latent import Expansion, LatentAttention
from veneer.fused.watch import Attended, Call
from veneer.kernels.arena import Arena
from veneer.kernels.attention import Attention
from veneer.kernels.packing import Packing
from veneer.lowrank.group import Group, Projection

HEADS, FIXED, TURNING, VALUE, LATENT = 3, 5, 4, 2, 7
HEAD_DIM = FIXED + TURNING
ADAPTED = {
    "all": (1, 1, 2, 1, 1),
    "what expands": (0, 0, 1, 2, 0),
    "what compresses": (1, 1, 0, 0, 0),
    "none": (0,) * 5,
    **{f"the {n + 1}. alone": tuple(int(n == i) for i in range(5)) for n in range(5)},
}


def half_of(
    adapted: str = "all",
    *,
    dora: bool = False,
    recompute: bool = False,
    drops: bool = False,
    q_latent: bool = True,
    norms: bool = True,
    turns: bool = True,
) -> LatentAttention:
    torch.manual_seed(0)
    adapters = iter(ADAPTED[adapted])

    def linear(in_: int, out: int) -> Projection:
        return projection(in_, out, next(adapters), bias=dora, dora=dora, drops=drops)

    def expansion(out: int) -> Expansion:
        return Expansion(rms(LATENT) if norms else None, Group([linear(LATENT, out)]))

    q = linear(DIM, LATENT if q_latent else HEADS * HEAD_DIM)
    return LatentAttention(
        norm=rms(DIM),
        inputs=Group([q, linear(DIM, LATENT + TURNING)]),
        kv=expansion(HEADS * (FIXED + VALUE)),
        output=Group([linear(HEADS * VALUE, DIM)]),
        q=expansion(HEADS * HEAD_DIM) if q_latent else None,
        heads=LatentHeads(
            heads=HEADS,
            head_dim=HEAD_DIM,
            value_dim=VALUE,
            turning=TURNING,
            rotary=rotary(TURNING // 2, interleaved=q_latent) if turns else None,
            q_factor=torch.rand(TOKENS, 1, 1, **DOUBLE) if turns else None,
        ),
        attention=Attention(Packing(LENGTHS), 0.4),
        arena=Arena(),
        recompute_projections=recompute,
    )


def plain(half: LatentAttention, x: Tensor) -> Tensor:
    heads = half.heads
    q, compressed = (projected(p, normed(half.norm, x)) for p in half.inputs)
    latent, shared = compressed.split([LATENT, TURNING], 1)
    if half.q is not None:
        q = projected(half.q.group[0], normed(half.q.norm, q))
    k_and_v = projected(half.kv.group[0], normed(half.kv.norm, latent))
    k, v = k_and_v.view(TOKENS, HEADS, -1).split([FIXED, VALUE], 2)
    fixed, turning = q.view(TOKENS, HEADS, -1).split([FIXED, TURNING], 2)
    q = torch.cat([fixed, turned(heads.rotary, turning)], 2)
    q = q if heads.q_factor is None else q * heads.q_factor
    k = torch.cat([k, turned(heads.rotary, shared[:, None]).expand(-1, HEADS, -1)], 2)
    return x + projected(half.output[0], half.attention.composed(q, k, v).flatten(1))


def trained(half: LatentAttention) -> list[Tensor]:
    projections = (*half.inputs, *half.between, *half.output)
    return [tensor for p in projections for tensor in p.trained()]


CASES = [
    *({"adapted": name, "dora": dora} for name, dora in itertools.product(ADAPTED, (True, False))),
    {"drops": True},
    {"recompute": True, "dora": True},
    {"q_latent": False, "dora": True, "recompute": True},
    {"norms": False, "turns": False},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_plain_operations(case):
    half = half_of(**case)
    x, dy = (torch.randn(TOKENS, DIM, **DOUBLE) for _ in range(2))
    inputs = [x.requires_grad_(), *trained(half)]
    y, expected = half(x)[0], plain(half, x)
    torch.testing.assert_close(y, expected)
    ours = torch.autograd.grad(y, inputs, dy, retain_graph=True)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, inputs, dy))
    # What is kept is left as it was.
    torch.testing.assert_close(torch.autograd.grad(y, inputs, dy), ours)


@pytest.mark.parametrize("more", [0, 1])
def test_a_latent_of_queries_is_all_that_its_input_gives(more):
    # Otherwise there would be no gradient for the rest.
    def call(x: Tensor, out: int) -> Call:
        return Call("", torch.nn.Identity(), x, torch.empty(1, TOKENS, out))

    x = torch.empty(1, TOKENS, DIM)
    q, kv = call(x, LATENT + more), call(x, LATENT + TURNING)
    behind = [
        call(q.y[..., :LATENT], HEADS * HEAD_DIM),
        call(kv.y[..., :LATENT], HEADS * (FIXED + VALUE)),
    ]
    latents = latents_of([q, kv, *behind], norms=[])
    assert latents is not None
    read = torch.empty(1, HEADS, TOKENS, HEAD_DIM)
    structure = latents.structure(Attended(read, read, read[..., :VALUE], {}))
    assert (structure is None) == bool(more)


def test_passes_gradcheck():
    half = half_of(dora=True)
    assert half.q is not None
    x = torch.randn(TOKENS, DIM, **DOUBLE, requires_grad=True)

    def forward(x: Tensor, *tensors: Tensor) -> Tensor:
        new = iter(tensors)
        fresh = [
            replace(p, A=next(new), B=next(new), gain=next(new))
            for p in (*half.inputs, *half.between, *half.output)
        ]
        return replace(
            half,
            inputs=Group(fresh[:2]),
            kv=replace(half.kv, group=Group(fresh[2:3])),
            q=replace(half.q, group=Group(fresh[3:4])),
            output=Group(fresh[4:]),
        )(x)[0]

    assert torch.autograd.gradcheck(forward, (x, *trained(half)), fast_mode=True)
