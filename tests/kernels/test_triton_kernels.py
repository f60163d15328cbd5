"""Kernels in Triton: each is as near to float64 as the formula in torch that stands beside it."""

from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from support.closeness import assert_no_further
from support.interpreted import DEVICE, DTYPES, MARKS
from veneer.kernels import activation, choice, cross_entropy, low_rank
from veneer.kernels.activation import Activation
from veneer.kernels.cross_entropy import Logits
from veneer.kernels.dropout import Mask
from veneer.kernels.gain import apply_gain
from veneer.kernels.mixed import FactorTable
from veneer.kernels.rotary import Rotary

pytestmark = [*MARKS, pytest.mark.parametrize("dtype", DTYPES)]


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


@pytest.mark.parametrize("is_gated", [True, False])
@pytest.mark.parametrize("kind", get_args(Activation))
def test_activations(kind, is_gated, dtype):
    from veneer.kernels import triton_activation

    torch.manual_seed(0)
    rows, columns = 3, 70
    gate, both = random(rows, columns, dtype=dtype), random(rows, 2 * columns, dtype=dtype)
    up = both[:, columns:] if is_gated else None  # a part of longer rows
    dy = random(rows, columns, dtype=dtype)
    gate[0, 0] = 0

    def by_formula(dtype):
        d_gate, d_up = torch.empty_like(gate, dtype=dtype), torch.empty_like(gate, dtype=dtype)
        wide_up = None if up is None else up.to(dtype)
        d_up = None if up is None else d_up
        y = activation._value(kind, gate.to(dtype))
        d = dy.to(dtype) if wide_up is None else dy.to(dtype) * wide_up
        d_gate = activation._gradient(kind, d, gate.to(dtype))
        return [y if up is None else y * wide_up, d_gate, None if up is None else dy.to(dtype) * y]

    d_both = torch.empty_like(both)
    d_gate, d_up = d_both[:, :columns], d_both[:, columns:] if is_gated else None
    y = triton_activation.activate_backward(kind, dy, gate, up, d_gate, d_up)
    assert torch.equal(triton_activation.activate(kind, gate, up), y)
    for ours, theirs, exact in zip(
        (y, d_gate, d_up), by_formula(dtype), by_formula(torch.float64), strict=True
    ):
        if ours is not None:
            assert_no_further(ours, theirs, exact, kind)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("heads", "dim", "pairs"), [(6, 20, 8), (1, 6, 3), (5, 16, 8)])
def test_rotation(heads, dim, pairs, interleaved, dtype):
    from veneer.kernels import triton_rotary

    torch.manual_seed(0)
    x = random(5, heads + 1, 2 * dim, dtype=dtype)[:, 1:, :dim]  # a part of longer rows
    rotary = Rotary(random(5, pairs, dtype=dtype), random(5, pairs, dtype=dtype), interleaved)
    for back in (False, True):
        sin = -rotary.sin if back else rotary.sin
        settings = {"back": back, "interleaved": interleaved}
        out = torch.empty(x.shape, dtype=dtype, device=DEVICE)
        y = triton_rotary.rotate(x, rotary.cos, rotary.sin, out, **settings)
        wide = Rotary(rotary.cos.double(), sin.double(), interleaved)
        exact = wide._rotated(x.double(), sin.double())
        assert_no_further(y, rotary._rotated(x, sin), exact)
        assert torch.equal(y[..., 2 * pairs :], x[..., 2 * pairs :])
        own = x.contiguous()
        assert torch.equal(triton_rotary.rotate(own, rotary.cos, rotary.sin, own, **settings), y)


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.3, None), (2.0, 30.0)])
@pytest.mark.parametrize("vocab", [1, 37, 5000])
def test_cross_entropy(vocab, scale, softcap, dtype):
    from veneer.kernels import triton_cross_entropy

    torch.manual_seed(0)
    z, logits = 5 * random(4, vocab, dtype=dtype), Logits(scale, softcap)
    targets = torch.randint(vocab, (4,), device=DEVICE)
    wide = z.double().requires_grad_()
    exact = F.cross_entropy(logits(wide), targets, reduction="none")
    (gradient,) = torch.autograd.grad(exact.sum(), wide)
    there = z.cpu()  # on a card the same kernel would compute it
    peers = cross_entropy.cross_entropy(there, targets.cpu(), torch.empty_like(there), logits)
    losses, peer = (x.to(DEVICE) for x in peers)
    for out in (torch.empty_like(z), z):  # the last over what it reads
        ours = triton_cross_entropy.cross_entropy(z, targets, out, scale=scale, softcap=softcap)
        assert_no_further(ours, losses, exact.detach(), "losses")
        assert_no_further(out, peer, gradient, "gradient")


@pytest.mark.parametrize(("n", "k", "columns"), [(1, 1, 1), (5, 3, 37), (4, 2, 1100)])
def test_weighted_sums(n, k, columns, dtype):
    from veneer.kernels import triton_rows

    torch.manual_seed(0)
    rows, weights = random(7, columns, dtype=dtype), random(n, k, dtype=dtype)
    places = torch.randint(7, (n, k), device=DEVICE)
    ours = triton_rows.weighted_sums(rows, places, weights, torch.empty_like(rows[:n]))
    exact = (rows.double()[places] * weights.double()[..., None]).sum(1)
    assert_no_further(ours, (rows[places] * weights[..., None]).sum(1), exact)


@pytest.mark.parametrize("seed", [0, 7, 2**62 - 1])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 37), (3, 2050)])
def test_dropout_has_the_processors_mask(rows, columns, seed, dtype):
    from veneer.kernels import triton_dropout

    torch.manual_seed(0)
    x, y = random(rows, columns + 3, dtype=dtype)[:, 3:], random(rows, columns, dtype=dtype)
    mask = Mask(0.3, seed)
    settings = {"seed": seed, "dropped": mask._dropped}
    dropped = triton_dropout.write(x, torch.empty_like(y), adds=False, **settings)
    assert torch.equal(dropped.cpu(), mask.apply(x.cpu()))
    assert torch.equal(triton_dropout.write(x, y.clone(), adds=True, **settings), y + dropped)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("tokens", "out", "rank"), [(70, 130, 5), (1, 3, 1), (64, 64, 40)])
def test_low_rank_product_with_a_gain(tokens, out, rank, has_bias, dtype):
    from veneer.kernels.triton_gain import add_with_gain

    torch.manual_seed(0)
    y, B, bias = (random(*shape, dtype=dtype) for shape in ((tokens, out), (out, rank), (out,)))
    h = random(tokens, rank + 3, dtype=dtype)[:, 3:]  # a projection's part of longer rows
    gain = torch.rand(out, device=DEVICE)

    def by_formula(y, h, B, gain, bias):
        return apply_gain(y.addmm(h, B.T), gain, bias if has_bias else None)

    exact = by_formula(*(x.double() for x in (y, h, B, gain, bias)))
    peer = by_formula(y, h, B, gain, bias).to(dtype)
    assert_no_further(add_with_gain(y.clone(), h, B, gain, bias if has_bias else None), peer, exact)


@pytest.mark.parametrize(("tokens", "columns", "out"), [(1, 40, 30), (18, 140, 150)])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_rows_with_factors_of_their_own(is_transposed, tokens, columns, out, dtype):
    from veneer.kernels.triton_mixed import add_own

    torch.manual_seed(0)
    pairs = [
        (
            random(rank, columns, dtype=dtype),
            random(*((rank, out) if is_transposed else (out, rank)), dtype=dtype),
        )
        for rank in (3, 17, 8)
    ]
    numbers = torch.tensor([1, -1, 0, 2, 1, 3], device=DEVICE)  # the last has nothing
    x, y = (random(len(numbers), tokens, n, dtype=dtype) for n in (columns, out))
    table = FactorTable.of([*pairs, None], B_is_transposed=is_transposed)
    ours = add_own(x, y.clone(), numbers, table)
    for row, number in enumerate(numbers.tolist()):
        if number in (-1, 3):
            assert torch.equal(ours[row], y[row])
            continue
        A, B = pairs[number]
        B = B if is_transposed else B.T
        exact = y[row].double() + x[row].double() @ A.double().T @ B.double()
        assert_no_further(ours[row], y[row] + x[row] @ A.T @ B, exact, f"row {row}")


@pytest.mark.parametrize("shares_A", [False, True])
def test_rows_with_experts_of_their_own(shares_A, dtype, monkeypatch):
    torch.manual_seed(0)
    experts, columns, out = 3, 40, 30
    pairs = [
        (
            random(*(() if shares_A else (experts,)), rank, columns, dtype=dtype),
            random(experts, rank, out, dtype=dtype),
        )
        for rank in (3, 17)
    ]
    which, expert = (torch.tensor(t, device=DEVICE) for t in ([1, -1, 0, 1, 0], [2, 0, 1, 0, 2]))
    x, y = random(5, columns, dtype=dtype), random(5, out, dtype=dtype)

    def by(way: str, dtype: torch.dtype) -> Tensor:
        monkeypatch.setattr(choice, "mixed", lambda *_: way)
        wide = [tuple(t.to(dtype) for t in pair) for pair in pairs]
        return low_rank.add_by_rows(x.to(dtype), wide, which, expert, y.to(dtype))

    monkeypatch.setattr(low_rank, "kernel", lambda *_: None)
    assert_no_further(by("triton", dtype), by("torch", dtype), by("torch", torch.float64))
