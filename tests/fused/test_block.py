"""Law 3 for the halves of a decoder layer: outputs and gradients equal the plain operations'."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from support.dense_attention import score_mask
from support.plain_halves import (
    DIM,
    DOUBLE,
    LENGTHS,
    TOKENS,
    layer_norm,
    normed,
    projected,
    projection,
    rms,
    rotary,
    turned,
)
from veneer.fused.block import FeedForward, Half, SelfAttention
from veneer.fused.heads import Heads
from veneer.kernels.arena import Arena
from veneer.kernels.attention import Attention
from veneer.kernels.dropout import Mask
from veneer.kernels.norm import Norm
from veneer.kernels.packing import Packing
from veneer.lowrank.group import Group

HEADS, KEY_HEADS, HEAD_DIM, INNER = 4, 2, 6, 7
SIZES = (HEADS * HEAD_DIM, KEY_HEADS * HEAD_DIM, KEY_HEADS * HEAD_DIM)
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


# What makes a half of some model: made anew for each, as all have random numbers.
ATTENTIONS: dict[str, Any] = {
    "llama": lambda: {"norm": rms(DIM), "rotary": rotary(HEAD_DIM // 2)},
    "qwen3": lambda: {
        "norm": rms(DIM),
        "rotary": rotary(HEAD_DIM // 2),
        "q_norm": rms(HEAD_DIM),
        "k_norm": rms(HEAD_DIM),
        "q_factor": torch.rand(TOKENS, 1, 1, **DOUBLE),
    },
    "gemma2": lambda: {
        "norm": rms(DIM, offset=1.0),
        "post_norm": rms(DIM, offset=1.0),
        "rotary": rotary(HEAD_DIM // 2),
    },
    "olmo2": lambda: {
        "norm": None,
        "post_norm": rms(DIM),
        "multiplier": 0.3,
        "rotary": rotary(2, interleaved=True),
        "q_norm": rms(SIZES[0]),
        "k_norm": rms(SIZES[1]),
    },
    "gpt_neox": lambda: {
        "norm": layer_norm(DIM),
        "rotary": rotary(2),
        "order": "by key head",
        "parallel": True,
        "bias": True,
    },
    "gpt2": lambda: {"norm": layer_norm(DIM), "rotary": None, "order": "blocks", "bias": True},
    "phi3 with norms": lambda: {
        "norm": rms(DIM),
        "rotary": rotary(HEAD_DIM // 2),
        "order": "blocks",
        "q_norm": rms(HEAD_DIM),
        "k_norm": layer_norm(HEAD_DIM),
    },
}
FEED_FORWARDS: dict[str, Any] = {
    "llama": lambda: {"norm": rms(DIM)},
    "with biases": lambda: {"norm": rms(DIM), "bias": True},
    "gemma2": lambda: {
        "norm": rms(DIM, offset=1.0),
        "post_norm": rms(DIM, offset=1.0),
        "activation": "gelu_tanh",
    },
    "olmo2": lambda: {"norm": None, "post_norm": rms(DIM), "multiplier": 0.3},
    "phi3": lambda: {"norm": rms(DIM), "joined": True},
    "up first": lambda: {"norm": rms(DIM), "joined": True, "gate_first": False, "bias": True},
    "gate second": lambda: {"norm": rms(DIM), "gate_first": False},
    "gpt2": lambda: {
        "norm": layer_norm(DIM),
        "activation": "gelu_tanh",
        "is_gated": False,
        "bias": True,
    },
    "gpt_neox": lambda: {
        "norm": layer_norm(DIM),
        "activation": "gelu",
        "is_gated": False,
        "parallel": True,
    },
}
HALVES = [("attention", name) for name in ATTENTIONS] + [("feed", name) for name in FEED_FORWARDS]
TWO = [("attention", "llama"), ("feed", "llama")]


def half_of(
    which: tuple[str, str],
    adapted: str,
    *,
    dora: str = "none",
    recompute: bool = False,
    drops: bool = False,
) -> tuple[Half, bool]:
    """Return a half with random numbers, and whether it is one of a parallel layer."""
    torch.manual_seed(0)
    half, name = which
    settings = (ATTENTIONS if half == "attention" else FEED_FORWARDS)[name]()
    bias, parallel = settings.pop("bias", False), settings.pop("parallel", False)
    settings["dropout"] = Mask.drawn(0.3) if drops else None
    if half == "attention":
        names = ("rotary", "q_norm", "k_norm", "q_factor", "order")
        of_heads = {"order": "separate"} | {n: settings.pop(n) for n in names if n in settings}
        outs = list(SIZES) if of_heads["order"] == "separate" else [sum(SIZES)]
        settings["heads"] = Heads(
            heads=HEADS, key_heads=KEY_HEADS, head_dim=HEAD_DIM, value_dim=HEAD_DIM, **of_heads
        )
        settings["attention"] = Attention(
            Packing(LENGTHS), 0.4, dropout=Mask.drawn(0.2) if drops else None
        )
        kind, inner = SelfAttention, SIZES[0]
    else:
        joined, gated = settings.pop("joined", False), settings.get("is_gated", True)
        outs = [2 * INNER] if joined else [INNER] * (1 + gated)
        settings = {"activation": "silu", **settings}
        kind, inner = FeedForward, INNER
    flags = list(zip(ADAPTED[adapted], DORA[dora], strict=True))
    inputs = Group(
        projection(DIM, out, n, bias=bias, dora=gain, drops=drops)
        for out, (n, gain) in zip(outs, flags, strict=False)
    )
    n, gain = flags[-1]
    return kind(
        inputs=inputs,
        output=Group([projection(inner, DIM, n, bias=bias, dora=gain, drops=drops)]),
        arena=Arena(),
        recompute_projections=recompute,
        **settings,
    ), parallel


# ---- the plain operations ----


def queries(norm: Norm | None, x: Tensor, heads: int) -> Tensor:
    """Return q or k, normed over each head or over all."""
    by_head = x.view(TOKENS, heads, HEAD_DIM)
    whole = norm is not None and len(norm.weight) == x.shape[1]
    return normed(norm, x).view_as(by_head) if whole else normed(norm, by_head)


def plain_attention(half: SelfAttention, outputs: list[Tensor]) -> Tensor:
    heads, shared = half.heads, HEADS // KEY_HEADS
    if heads.order == "separate":
        q, k, v = outputs
    elif heads.order == "blocks":
        q, k, v = outputs[0].split(SIZES, 1)
    else:
        groups = outputs[0].view(TOKENS, KEY_HEADS, shared + 2, HEAD_DIM)
        q, k, v = groups[:, :, :shared], groups[:, :, shared], groups[:, :, shared + 1]
        q, k, v = (x.flatten(1) for x in (q, k, v))
    q = turned(heads.rotary, queries(heads.q_norm, q, HEADS))
    q = q if heads.q_factor is None else q * heads.q_factor
    k = turned(heads.rotary, queries(heads.k_norm, k, KEY_HEADS))
    if half.attention.dropout is None:
        return half.attention.composed(q, k, v.view_as(k)).flatten(1)
    return with_same_masks(half.attention, q, k, v.view_as(k)).flatten(1)


def with_same_masks(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k_, v_ = (x.repeat_interleave(HEADS // KEY_HEADS, 1) for x in (k, v))
    t = attention.scale * torch.einsum("qhd,khd->qhk", q, k_)
    sequence = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    seen = (sequence[:, None] == sequence) & torch.ones(TOKENS, TOKENS).tril().bool()
    p = t.masked_fill(~seen[:, None], -torch.inf).softmax(2)
    kept = score_mask(attention, q.detach(), k.detach()) * attention.dropout.scale
    return torch.einsum("qhk,khd->qhd", kept * p, v_)


def plain_feed_forward(half: FeedForward, outputs: list[Tensor]) -> Tensor:
    act = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    }[half.activation]
    if not half.is_gated:
        return act(outputs[0])
    first, second = outputs if len(outputs) == 2 else outputs[0].chunk(2, 1)
    return act(first) * second if half.gate_first else act(second) * first


def plain(half: Half, x: Tensor, residual: Tensor | None) -> Tensor:
    outputs = [projected(p, normed(half.norm, x)) for p in half.inputs]
    is_attention = isinstance(half, SelfAttention)
    inner = (plain_attention if is_attention else plain_feed_forward)(half, outputs)
    added = normed(half.post_norm, projected(half.output[0], inner))
    if half.dropout is not None:
        added = added * half.dropout.apply(torch.ones_like(added)) * half.dropout.scale
    return (x if residual is None else residual) + half.multiplier * added


def trained(half: Half) -> list[Tensor]:
    return [tensor for p in (*half.inputs, *half.output) for tensor in p.trained()]


CASES = [
    *itertools.product(HALVES, ADAPTED, DORA, [True, False], [False]),
    *itertools.product(HALVES, ["two on some"], ["some"], [True, False], [True]),
    *itertools.product(HALVES, ["all"], ["none"], [True, False], [True]),
]


@pytest.mark.parametrize(("which", "adapted", "dora", "recompute", "drops"), CASES)
@pytest.mark.thinned(pairs=True)
def test_equals_the_plain_operations(which, adapted, dora, recompute, drops):
    half, parallel = half_of(which, adapted, dora=dora, recompute=recompute, drops=drops)
    x, dy = torch.randn(TOKENS, DIM, **DOUBLE, requires_grad=True), torch.randn(TOKENS, DIM)
    residual = torch.randn(TOKENS, DIM, **DOUBLE, requires_grad=True) if parallel else None
    inputs = [x, *([] if residual is None else [residual]), *trained(half)]
    y, expected = half(x, residual)[0], plain(half, x, residual)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y, inputs, dy.double()),
        torch.autograd.grad(expected, inputs, dy.double()),
    )


@pytest.mark.parametrize("dora", ["none", "all"])
@pytest.mark.parametrize("which", TWO)
def test_passes_gradcheck(which, dora):
    half, _ = half_of(which, "all", dora=dora)
    x = torch.randn(TOKENS, DIM, **DOUBLE, requires_grad=True)

    def forward(x: Tensor, *tensors: Tensor) -> Tensor:
        new = iter(tensors)
        fresh = [
            replace(p, A=next(new), B=next(new), gain=p.gain if p.gain is None else next(new))
            for p in (*half.inputs, *half.output)
        ]
        return replace(half, inputs=Group(fresh[:-1]), output=Group(fresh[-1:]))(x)[0]

    assert torch.autograd.gradcheck(forward, (x, *trained(half)), fast_mode=False)


@pytest.mark.parametrize("which", HALVES)
def test_no_gradient_below_the_lowest_adapter(which):
    half, _ = half_of(which, "all")
    x = torch.randn(TOKENS, DIM, **DOUBLE)
    half(x)[0].sum().backward()
    assert x.grad is None
    assert all(tensor.grad is not None for tensor in trained(half))
    assert not half_of(which, "none")[0](x)[0].requires_grad


@pytest.mark.parametrize("which", TWO)
@pytest.mark.parametrize("recompute", [True, False])
def test_two_passes_before_the_first_way_back(which, recompute):
    """Memory is not reused while a backward pass may still need it."""
    half, _ = half_of(which, "all", recompute=recompute)
    xs = [torch.randn(TOKENS, DIM, **DOUBLE) for _ in range(2)]
    alone = [torch.autograd.grad(half(x)[0].square().sum(), trained(half)) for x in xs]
    losses = [half(x)[0].square().sum() for x in xs]
    for loss, gradients in zip(losses, alone, strict=True):
        torch.testing.assert_close(torch.autograd.grad(loss, trained(half)), gradients)


@pytest.mark.parametrize("dora", DORA)
@pytest.mark.parametrize("which", HALVES)
def test_what_is_kept_is_left_as_it_was(which, dora):
    """The backward pass can run twice."""
    half, _ = half_of(which, "all", dora=dora)
    x = torch.randn(TOKENS, DIM, **DOUBLE, requires_grad=True)
    loss = half(x)[0].square().sum()
    first = torch.autograd.grad(loss, [x, *trained(half)], retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, [x, *trained(half)]), first)


@pytest.mark.parametrize("adapted", ["all", "output", "none"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2"])
def test_the_second_half_needs_no_copy_of_a_sum_that_is_known(name, adapted):
    first, _ = half_of(("attention", name), adapted, dora="all")
    second, _ = half_of(("feed", name), "all", dora="all")
    x = torch.randn(TOKENS, DIM, **DOUBLE, requires_grad=True)

    def both(*, sum_kept: bool) -> list[Tensor]:
        middle, made_of = first(x)
        assert (made_of is None) == (adapted == "none" and first.post_norm is None)
        half = replace(second, made_of=made_of if sum_kept else None)
        kept: list[int] = []

        def keep(tensor: Tensor) -> Tensor:
            kept.append(tensor.data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = half(middle)[0]
        assert (middle.data_ptr() in kept) == (half.made_of is None)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *trained(first), *trained(second)])]

    for ours, expected in zip(both(sum_kept=True), both(sum_kept=False), strict=True):
        assert torch.equal(ours, expected)
