"""Norms by the kernels of a card: as near to float64 as the formula in torch."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from support.closeness import assert_no_further
from support.interpreted import DEVICE, DTYPES, MARKS
from support.norms import exact, norm_of
from veneer.kernels import choice, norm
from veneer.kernels.norm import Norm

NUMBERS: dict[str, type[float]] = {}  # what a way's kernels take for a number, if not a float


class Interpreted(float):
    """A number that says of itself that it has another dtype."""

    def to(self, _dtype: object) -> float:
        return self


def both_ways(own: Norm, x: Tensor, dy: Tensor, residual: Tensor) -> list[Tensor]:
    y, statistics = own.forward(x)
    return [y, *(own.backward(dy, x, statistics, added) for added in (residual, None))]


def assert_as_the_formula(way: str, kind: str, shape: tuple[int, ...], dtype, monkeypatch) -> None:
    torch.manual_seed(0)
    x, dy, residual = (torch.randn(shape).to(DEVICE, dtype) for _ in range(3))
    own, number = norm_of(kind, shape[-1], dtype), NUMBERS.get(way, float)
    own = replace(own, eps=number(own.eps), offset=number(own.offset))
    if DEVICE.type != "cpu":
        weight, bias = (None if w is None else w.to(DEVICE) for w in (own.weight, own.bias))
        own = replace(own, weight=weight, bias=bias)
    monkeypatch.setattr(norm, "kernel", lambda *_: None)
    monkeypatch.setattr(choice, "norm", lambda *_, **__: "torch")
    formulas = both_ways(own, x, dy, residual)
    monkeypatch.setattr(choice, "norm", lambda *_, **__: way)
    results = both_ways(own, x, dy, residual)
    leaf = x.double().requires_grad_()
    y = exact(own, leaf)
    (dx,) = torch.autograd.grad(y, leaf, dy.double())
    for ours, theirs, reference, name in zip(
        results,
        formulas,
        (y.detach(), dx + residual.double(), dx),
        ("y", "dx + residual", "dx"),
        strict=True,
    ):
        assert ours.dtype == dtype
        assert_no_further(ours, theirs, reference, name, least=float(dy.double().norm()))


@pytest.mark.parametrize("kind", ["cohere", "layer_norm", "no_weight"])
@pytest.mark.parametrize("shape", [(64, 48), (5, 3, 33)])
def test_layer_norm_by_torchs_own_kernel(shape, kind, monkeypatch):
    assert_as_the_formula("layer_norm", kind, shape, torch.float32, monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["llama", "gemma", "olmo2"])
@pytest.mark.parametrize("shape", [(6, 48), (2, 3, 33)])
class TestLiger:
    pytestmark = MARKS

    def test_rms_norm(self, shape, kind, dtype, monkeypatch):
        pytest.importorskip("liger_kernel")
        if DEVICE.type == "cpu":
            # The interpreter has neither libdevice's functions nor numbers with a dtype.
            import triton.language as tl
            from liger_kernel.ops import fused_add_rms_norm, rms_norm

            for module in (rms_norm, fused_add_rms_norm):
                monkeypatch.setattr(module, "rsqrt", lambda x: tl.rsqrt(x))
            monkeypatch.setitem(NUMBERS, "liger", Interpreted)
        assert_as_the_formula("liger", kind, shape, dtype, monkeypatch)
