"""Sums over rows: each kernel equals its formula in torch."""

import pytest
import torch

from veneer.kernels import rows
from veneer.kernels.rows import row_dots, weighted_sums


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 63, 1100])
def test_sums_over_rows(columns, dtype, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(rows, "kernel", lambda *_: None)
    torch.manual_seed(0)
    a, b = (torch.randn(30, columns).to(dtype) for _ in range(2))
    places = torch.randint(30, (20, 3))
    wide = torch.promote_types(dtype, torch.float32)
    near = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}[dtype]
    dots = row_dots(a, b)
    assert dots.dtype == wide
    sizes = (a.double() * b.double()).abs().sum(1)
    assert ((dots - (a.double() * b.double()).sum(1)).abs() <= near * sizes).all()
    for weights in (torch.randn(20, 3), torch.randn(3, 20).to(dtype).T):
        sums = weighted_sums(a, places, weights)
        terms = a.double()[places] * weights.double()[..., None]
        rounding = torch.finfo(dtype).eps
        assert sums.dtype == dtype
        limit = (near + rounding) * terms.abs().sum(1)
        assert ((sums - terms.sum(1)).abs() <= limit).all()
