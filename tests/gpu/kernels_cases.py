"""What kernels compute on a card, but for those in Triton: shapes, and what waits for the card."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch

from support.fake_card import CARD, card, on_card
from veneer.kernels import choice
from veneer.kernels.attention import Attention, Packing
from veneer.lowrank.expert_gates import KnownGate
from veneer.lowrank.expert_stacks import Experts, Stack, StackUpdate
from veneer.lowrank.experts import routed_experts
from veneer.quant.nf4 import NF4
from veneer.quant.weight import product, product_back

HOPPER = choice.Device("cuda", (9, 0), flash=True)
BF16 = {"dtype": torch.bfloat16, "device": CARD}


def attention(window: int | None, has_sinks: bool) -> dict[str, Any]:
    with card() as watch, patch.object(choice, "device_of", lambda device: HOPPER):
        packing = Packing([7, 30, 1], CARD)
        q, k = torch.randn(38, 4, 24, **BF16), torch.randn(38, 2, 24, **BF16)
        v = torch.randn(38, 2, 20, **BF16)
        sinks = torch.zeros(4, **BF16) if has_sinks else None
        attend = Attention(packing, 0.2, window, sinks=sinks)
        with watch.counting() as waits:
            y, kept = attend.forward(q, k, v)
            gradients = attend.backward(torch.ones_like(y), q, k, v, y, kept)
        shapes = [list(x.shape) for x in (y, *gradients)]
        return {
            "waits": waits,
            "shapes": shapes,
            "dtypes": sorted({str(x.dtype) for x in gradients}),
        }


def block_mask() -> dict[str, Any]:
    with card() as watch:
        packing = Packing([7, 300, 1], CARD)
        with watch.counting() as waits:
            mask = packing.block_mask(64)
        return {"waits": waits, "shape": list(mask.shape)}


def experts(rank: int, shares_A: bool) -> dict[str, Any]:
    with card() as watch, patch.object(choice, "device_of", lambda device: HOPPER):

        def stack(out: int, columns: int) -> Stack:
            A = torch.randn(*(() if shares_A else (8,)), rank, columns, **BF16).requires_grad_()
            Bt = torch.randn(8, rank, out, **BF16).requires_grad_()
            weight, bias = torch.randn(8, out, columns, **BF16), torch.randn(8, out, **BF16)
            return Stack(weight, bias=bias, update=StackUpdate(A, Bt))

        mixture = Experts(stack(64, 48), stack(48, 32), KnownGate("silu"))
        x = torch.randn(20, 48, **BF16).requires_grad_()
        index = torch.zeros(20, 2, dtype=torch.long, device=CARD)
        weights = torch.rand(20, 2, **BF16).requires_grad_()
        leaves = [x, weights, *mixture.trained()]
        with watch.counting() as waits:
            y = routed_experts(x, index, weights, mixture)
            gradients = torch.autograd.grad(y.sum(), leaves)
        shapes = {
            "y": list(y.shape),
            "as leaves": [g.shape == p.shape for g, p in zip(gradients, leaves, strict=True)],
        }
        return {"waits": waits, **shapes}


def nf4(tokens: int) -> dict[str, Any]:
    weight = NF4.quantize(torch.randn(48, 64), torch.bfloat16)
    with card() as watch:
        weight.codes, weight.state = on_card((weight.codes, weight.state))
        weight.device = CARD
        x = torch.randn(tokens, 64, **BF16)
        with watch.counting() as waits:
            few = weight.product_of_few(x)
            y = product(x, weight, x.new_empty(tokens, 48))
            dx = product_back(y, weight)
        return {"waits": waits, "by codes": few is not None, "dx": list(dx.shape)}


CASES = {
    "nf4, few tokens": lambda: nf4(4),
    "nf4, many tokens": lambda: nf4(600),
    "attention": lambda: attention(None, False),
    "attention in a window": lambda: attention(5, False),
    "attention with sinks": lambda: attention(None, True),
    "block mask": block_mask,
    "experts": lambda: experts(8, False),
    "experts of an odd rank": lambda: experts(3, False),
    "experts that share A": lambda: experts(3, True),
}
