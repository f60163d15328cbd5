"""Law 3 for routed experts: the one function equals plain autograd over W + B A of each expert."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from support.closeness import assert_no_further
from veneer.kernels import choice, low_rank
from veneer.kernels.arena import Arena
from veneer.lowrank import grouped_experts
from veneer.lowrank.expert_gates import KnownGate, OwnGate
from veneer.lowrank.expert_stacks import Experts, Stack, StackUpdate, TokenUpdates
from veneer.lowrank.experts import routed_experts
from veneer.models.quantize import quantize
from veneer.quant.stack import QuantizedStack

EXPERTS, IN, INNER, TOKENS = 4, 64, 32, 6
DOUBLE = {"dtype": torch.float64}


def clamped(gate_up: Tensor) -> Tensor:
    """Return gpt-oss's gate, of gate and up that take turns."""
    gate, up = gate_up[..., ::2].clamp(max=1.0), gate_up[..., 1::2].clamp(-1.0, 1.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def scaled_norm(y: Tensor) -> Tensor:
    return 1.5 * y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()


SILU = KnownGate("silu")


@dataclass(frozen=True)
class Mixture:
    transposed: bool = False
    bias: bool = False
    gate: Any = SILU
    post_norm: Any = None
    bits: int | None = None
    shared_A: bool = False
    adapted: tuple[str, ...] = ("up", "down")

    def plain_gate(self, up: Tensor) -> Tensor:
        if isinstance(self.gate, OwnGate):
            return self.gate.function(up)
        if not self.gate.is_gated:
            return F.relu(up).square()
        gate, up = up.chunk(2, -1)
        return F.silu(gate) * up

    def experts(self) -> Experts:
        torch.manual_seed(0)
        gated = isinstance(self.gate, OwnGate) or self.gate.is_gated
        up = self.stack("up", INNER * (1 + gated), IN)
        return Experts(up, self.stack("down", IN, INNER), self.gate, self.post_norm)

    def stack(self, name: str, out: int, in_: int) -> Stack:
        rank, sizes = 3, (in_, out) if self.transposed else (out, in_)
        weight: Any = torch.randn(EXPERTS, *sizes, **DOUBLE) / in_**0.5
        if self.bits:
            oriented = weight.transpose(1, 2) if self.transposed else weight
            experts = [quantize(W.float(), self.bits, torch.float32) for W in oriented]
            weight = QuantizedStack(experts, transposed=self.transposed)
        bias = torch.randn(EXPERTS, out, **DOUBLE) if self.bias else None
        if name not in self.adapted:
            return Stack(weight, self.transposed, bias)
        shape = (rank, in_) if self.shared_A else (EXPERTS, rank, in_)
        A = torch.randn(shape, **DOUBLE).requires_grad_(True)
        Bt = torch.randn(EXPERTS, rank, out, **DOUBLE).requires_grad_(True)
        return Stack(weight, self.transposed, bias, StackUpdate(A, Bt))


def plain(mixture: Mixture, experts: Experts, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Return the mixture's output token by token, with ordinary operations."""

    def linear(stack: Stack, x: Tensor, token: int, expert: int) -> Tensor:
        weight, update = stack.weight[expert].to(x.dtype), stack.update
        y = F.linear(x, weight.T if stack.transposed else weight)
        if isinstance(update, TokenUpdates):
            which = int(update.which[token])
            update = None if which < 0 else update.updates[which]
        if update is not None:
            A = update.A if update.shares_A else update.A[expert]
            y = y + F.linear(x, A) @ update.Bt[expert]
        return y if stack.bias is None else y + stack.bias[expert]

    outputs = []
    for token in range(len(x)):
        total = torch.zeros_like(x[token])
        for expert, weight in zip(index[token].tolist(), weights[token], strict=True):
            if expert < EXPERTS:
                inner = mixture.plain_gate(linear(experts.up, x[token], token, expert))
                y = linear(experts.down, inner, token, expert)
                total = total + weight * (y if mixture.post_norm is None else mixture.post_norm(y))
        outputs.append(total)
    return torch.stack(outputs)


# No token, one, and all of them for an expert; one expert a token; and some beyond the experts.
ROUTES = {
    "all, one, none": [[0, 1], [0, 2], [0, 2], [0, 2], [0, 2], [0, 2]],
    "spread": [[0, 1], [3, 2], [1, 3], [2, 0], [1, 2], [3, 0]],
    "top 1": [[3], [0], [3], [3], [0], [2]],
    "beyond": [[4, 1], [4, 4], [1, 3], [2, 4], [1, 2], [3, 4]],
}
MIXTURES = {
    "gated": Mixture(),
    "transposed, biased, own gate": Mixture(transposed=True, bias=True, gate=OwnGate(clamped)),
    "not gated": Mixture(gate=KnownGate("relu_squared", is_gated=False)),
    "normed": Mixture(post_norm=scaled_norm, bias=True),
    "nf4": Mixture(bits=4),
    "8 bits, transposed": Mixture(bits=8, transposed=True, bias=True),
    "shared A": Mixture(shared_A=True),
    "down alone": Mixture(adapted=("down",)),
    "up alone, normed": Mixture(adapted=("up",), post_norm=scaled_norm),
    "base alone": Mixture(adapted=(), bias=True),
}


def inputs(route: str) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    index = torch.tensor(ROUTES[route])
    x = torch.randn(TOKENS, IN, **DOUBLE, requires_grad=True)
    return x, index, torch.rand(index.shape, **DOUBLE, requires_grad=True)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", MIXTURES)
def test_output_and_gradients_equal_plain_autograd(name, route):
    mixture = MIXTURES[name]
    experts, (x, index, weights) = mixture.experts(), inputs(route)
    leaves = [x, weights, *experts.trained()]
    expected = plain(mixture, experts, x, index, weights)
    dy = torch.randn(expected.shape, **DOUBLE)
    gradients = torch.autograd.grad(expected, leaves, dy)
    for recompute in (False, True):
        options = {"arena": Arena(), "recompute_projections": recompute}
        y = routed_experts(x, index, weights, experts, **options)
        assert_no_further(y, expected, expected, "the output", slack=1e-10)
        for ours, theirs in zip(torch.autograd.grad(y, leaves, dy), gradients, strict=True):
            assert_no_further(ours, theirs, theirs, slack=1e-10)


@pytest.mark.parametrize(
    ("way", "dtype"),
    [
        *itertools.product(["compiled", "formula"], [torch.float64, torch.float32]),
        ("grouped", torch.float32),
    ],
)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", ["gated", "transposed, biased, own gate", "shared A", "normed"])
@torch.no_grad()
def test_each_token_with_an_update_of_its_own(name, route, dtype, way, monkeypatch):
    if way == "formula":
        monkeypatch.setattr(low_rank, "kernel", lambda *_: None)
    if way == "grouped":
        monkeypatch.setattr(choice, "experts", lambda *_, **__: "grouped")
    mixture = MIXTURES[name]
    experts, (x, index, weights) = mixture.experts(), inputs(route)
    which = torch.tensor([0, -1, 2, 1, 0, 2])

    def of_tokens(stack: Stack, dtype: torch.dtype) -> Stack:
        assert isinstance(stack.update, StackUpdate)
        A, Bt = stack.update.A.to(dtype), stack.update.Bt.to(dtype)
        wide = torch.cat([A, A.flip(-1)], -2), torch.cat([Bt, Bt.flip(-1)], -2)
        updates = [StackUpdate(A, Bt), StackUpdate(*wide), StackUpdate(A, 2 * Bt)]
        weight, bias = stack.weight.to(dtype), stack.bias
        bias = None if bias is None else bias.to(dtype)
        return Stack(weight, stack.transposed, bias, TokenUpdates(updates, which))

    def mixed(dtype: torch.dtype) -> Experts:
        up, down = of_tokens(experts.up, dtype), of_tokens(experts.down, dtype)
        return replace(experts, up=up, down=down)

    expected = plain(mixture, mixed(torch.float64), x, index, weights)
    inputs_ = x.to(dtype), index, weights.to(dtype)
    peer = plain(mixture, mixed(dtype), *inputs_)
    assert_no_further(routed_experts(*inputs_, mixed(dtype)), peer, expected)


@pytest.mark.parametrize("name", ["gated", "transposed, biased, own gate"])
def test_gradcheck(name):
    experts, (x, index, weights) = MIXTURES[name].experts(), inputs("all, one, none")
    leaves = (x, weights, *experts.trained())
    assert torch.autograd.gradcheck(
        lambda x, weights, *_: routed_experts(x, index, weights, experts), leaves, fast_mode=True
    )


def test_experts_without_tokens_are_not_read():
    mixture = Mixture(bits=4)
    experts, (x, index, weights) = mixture.experts(), inputs("all, one, none")
    used: list[int] = []
    noted: list[list[int]] = []
    for stack in (experts.up, experts.down):
        assert isinstance(stack.weight, QuantizedStack)
        stack.weight.before_routed = lambda ids: noted.append([*ids])
        for number, weight in enumerate(stack.weight.experts):
            weight.before_use = lambda number=number: used.append(number)
    y = routed_experts(x, index, weights, experts)
    y.sum().backward()
    assert sorted(used) == sorted([0, 1, 2] * 4)  # two stacks, forward and back
    assert noted == [[0], [0], [1], [1], [2], [2]] * 2  # both stacks of each
    for factor in experts.trained():
        assert factor.grad is not None
        assert not factor.grad[3].any()
        assert factor.grad[0].any()


def test_the_work_is_that_of_the_routed_rows():
    x, index, weights = inputs("spread")
    sizes = [(2 * INNER, IN), (IN, INNER)]
    products = sum(2 * index.numel() * out * in_ for out, in_ in sizes)
    low_rank = sum(2 * index.numel() * 3 * (out + in_) for out, in_ in sizes)
    for adapted, most in (((), 0), (("up", "down"), low_rank)):
        experts = Mixture(adapted=adapted).experts()
        with FlopCounterMode(display=False) as counter:
            y = routed_experts(x, index, weights, experts)
        assert products <= counter.get_total_flops() <= products + most
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        # The gradients of x and A x, and of A and B, but none of W.
        assert products <= counter.get_total_flops() <= products + 2 * most


@pytest.mark.parametrize("needs", ["x", "weights", "A", "Bt"])
def test_gradients_only_where_needed(needs):
    experts, (x, index, weights) = Mixture().experts(), inputs("spread")
    tensors = {"x": x, "weights": weights, "A": experts.up.update.A, "Bt": experts.up.update.Bt}
    expected = torch.autograd.grad(
        routed_experts(x, index, weights, experts).square().sum(), tensors[needs]
    )
    A, Bt = (tensors[n] if n == needs else tensors[n].detach() for n in ("A", "Bt"))
    up = replace(experts.up, update=StackUpdate(A, Bt))
    down = replace(
        experts.down,
        update=StackUpdate(experts.down.update.A.detach(), experts.down.update.Bt.detach()),
    )
    x, weights = (tensors[n] if n == needs else tensors[n].detach() for n in ("x", "weights"))
    y = routed_experts(x, index, weights, replace(experts, up=up, down=down))
    (ours,) = torch.autograd.grad(y.square().sum(), tensors[needs])
    torch.testing.assert_close(ours, expected[0])


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", [n for n in MIXTURES if MIXTURES[n].bits is None])
def test_one_product_for_all_experts_equals_plain_autograd(name, route, monkeypatch):
    """The way of a card that has such products; the CPU has them in float32."""
    monkeypatch.setattr(choice, "experts", lambda *_, **__: "grouped")
    mixture = MIXTURES[name]
    exact, (x, index, weights) = mixture.experts(), inputs(route)
    leaves = [x, weights, *exact.trained()]
    expected = plain(mixture, exact, x, index, weights)
    dy = torch.randn(expected.shape, **DOUBLE)
    gradients = torch.autograd.grad(expected, leaves, dy)
    single = with_dtype(exact, torch.float32)
    x, weights = (t.detach().float().requires_grad_() for t in (x, weights))
    leaves = [x, weights, *single.trained()]
    peer = plain(mixture, single, x, index, weights)
    peers = torch.autograd.grad(peer, leaves, dy.float())
    for recompute in (False, True):
        y = routed_experts(x, index, weights, single, recompute_projections=recompute)
        assert_no_further(y, peer, expected, "the output")
        ours = torch.autograd.grad(y, leaves, dy.float())
        for own, other, wide in zip(ours, peers, gradients, strict=True):
            assert_no_further(own, other, wide)
    with torch.no_grad():
        y = routed_experts(x, index, weights, replace(single, exact=True))
        assert_no_further(y, peer, expected, "the output without gradients")


@pytest.mark.parametrize("rank", [3, 8])
def test_grouped_products_get_factors_that_begin_at_16_bytes(rank):
    """Trained ones are views of one tensor, and begin anywhere."""
    A = torch.randn(1 + 2 * rank * 8, dtype=torch.bfloat16)[1:].view(2, rank, 8)
    aligned = grouped_experts._aligned(A)
    assert aligned.storage_offset() % 8 == 0
    assert aligned.shape[1] % 8 == 0
    assert torch.equal(aligned[:, :rank], A)
    assert not aligned[:, rank:].any()


def with_dtype(experts: Experts, dtype: torch.dtype) -> Experts:
    """Return the same experts in another dtype, whose updates are leaves."""

    def of(stack: Stack) -> Stack:
        bias = None if stack.bias is None else stack.bias.to(dtype)
        update = stack.update
        if isinstance(update, StackUpdate):
            A, Bt = (t.detach().to(dtype).requires_grad_() for t in (update.A, update.Bt))
            update = StackUpdate(A, Bt)
        return Stack(stack.weight.to(dtype), stack.transposed, bias, update)

    return replace(experts, up=of(experts.up), down=of(experts.down))
