"""DoRA's gain: each kernel equals its formula in torch."""

from typing import Any, get_args

import pytest
import torch

from support.random_adapters import distance
from veneer.kernels import activation, gain
from veneer.kernels.activation import Activation, activate_backward
from veneer.kernels.gain import activate_gain_backward, apply_gain_, gain_backward
from veneer.kernels.native import kernel
from veneer.lowrank import formula
from veneer.lowrank.formula import updated_norms


def without_kernels(compiled: bool, monkeypatch: Any) -> None:
    """Leave only the formulas in torch, unless `compiled`."""
    for module in () if compiled else (formula, gain, activation):
        monkeypatch.setattr(module, "kernel", lambda *_, **__: None)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 3, 40])
def test_norms_of_the_sum_without_the_sum(rank, dtype, compiled, monkeypatch):
    without_kernels(compiled, monkeypatch)
    torch.manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    W, A, B = (torch.randn(*s).to(dtype) for s in ((50, 70), (rank, 70), (50, rank)))
    squares = W.to(wide).square().sum(1)
    norms = updated_norms(squares, W @ A.T, A.to(wide), B.to(wide), 0.3)
    expected = (W.double() + 0.3 * B.double() @ A.double()).norm(dim=1)
    near = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(norms.double(), expected, rtol=near, atol=0)
    nothing = torch.zeros(50, rank, dtype=wide)
    fresh = updated_norms(squares, W @ A.T, A.to(wide), nothing, 0.3)
    torch.testing.assert_close(fresh, squares.sqrt(), rtol=1e-6, atol=0)
    none = updated_norms(0 * squares, 0 * W @ A.T, A.to(wide), nothing, 0.3)
    assert torch.equal(none, torch.ones_like(none))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 130, 700])
@pytest.mark.parametrize("columns", [1, 63, 200])
def test_gain_kernels_equal_torch(rows, columns, bias, dtype, compiled, monkeypatch):
    without_kernels(compiled, monkeypatch)
    torch.manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    z, dy = (torch.randn(rows, columns).to(dtype) for _ in range(2))
    b = torch.randn(columns).to(dtype) if bias else None
    gains = 1 + torch.rand(columns).to(wide)
    z64 = z.double().requires_grad_()
    g64 = gains.double().requires_grad_()
    offset = 0 if b is None else b.double()
    expected = (z64 - offset) * g64 + offset
    y = apply_gain_(z.clone(), gains, b)
    dz, d_gain = gain_backward(dy, y, gains, b)
    again = dy.clone()
    in_place, _ = gain_backward(again, y, gains, b, in_place=True)
    assert torch.equal(in_place, dz)
    if kernel("gain_backward", y) is not None and compiled:
        assert in_place is again
    exact = torch.autograd.grad(expected, (z64, g64), dy.double())
    near = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for a, c in zip((y, dz, d_gain), (expected.detach(), *exact), strict=True):
        assert distance(a.double(), c) < near


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("rows", [1, 130, 700])
@pytest.mark.parametrize("kind", get_args(Activation))
@pytest.mark.thinned(pairs=True)
def test_gains_within_a_gate_equal_both_apart(kind, rows, biased, dtype, compiled, monkeypatch):
    without_kernels(compiled, monkeypatch)
    torch.manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    dy, gate, up = (torch.randn(rows, 63).to(dtype) for _ in range(3))
    gains = tuple(0.5 + torch.rand(63).to(wide) for _ in range(2))
    biases = tuple(torch.randn(63).to(dtype) if b else None for b in biased)
    dz = both_columns(rows, 63, dtype)
    d_gains, inner = activate_gain_backward(kind, dy, gate, up, gains, biases, *dz)
    d_inputs = [torch.empty(rows, 63, dtype=torch.float64) for _ in range(2)]
    expected = activate_backward(kind, dy.double(), gate.double(), up.double(), *d_inputs)
    near = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert distance(inner.double(), expected) < near
    for i, (d, y) in enumerate(zip(d_inputs, (gate, up), strict=True)):
        bias = None if biases[i] is None else biases[i].double()
        exact = gain_backward(d, y.double(), gains[i].double(), bias)
        assert distance(dz[i].double(), exact[0]) < near
        assert distance(d_gains[i].double(), exact[1]) < near


@pytest.mark.parametrize("compiled", [True, False])
def test_gate_and_up_of_one_matrix(compiled, monkeypatch):
    without_kernels(compiled, monkeypatch)
    torch.manual_seed(0)
    dy, gains = torch.randn(20, 30), (torch.rand(30) + 0.5, torch.rand(30) + 0.5)
    gate, up = torch.randn(20, 60).split(30, 1)
    part, whole = both_columns(20, 30, torch.float32), both_columns(20, 30, torch.float32)
    arguments = (gains, (None, None))
    results = activate_gain_backward("gelu", dy, gate, up, *arguments, *part)
    copies = (gate.contiguous(), up.contiguous())
    expected = activate_gain_backward("gelu", dy, *copies, *arguments, *whole)
    torch.testing.assert_close((results, part), (expected, whole))


def both_columns(rows: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Return two empty matrices side by side in one."""
    return torch.empty(rows, 2 * columns, dtype=dtype).split(columns, 1)
