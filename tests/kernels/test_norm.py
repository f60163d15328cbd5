"""Norms: each kernel is as near to float64 as the formula in torch and transformers' modules."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from support.closeness import assert_no_further
from support.norms import KINDS, exact, norm_of
from veneer.kernels import norm
from veneer.kernels.norm import Norm

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
MODULES = {
    "llama": LlamaRMSNorm,
    "gemma": GemmaRMSNorm,
    "gemma3": Gemma3RMSNorm,
    "olmo2": Olmo2RMSNorm,
    "cohere": CohereLayerNorm,
    "layer_norm": nn.LayerNorm,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (64, 576), (600, 33), (50, 3, 128)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_ways(dtype, shape, kind, monkeypatch):
    torch.manual_seed(0)
    x = (2 * torch.randn(shape) + 1).to(dtype)
    dy, residual = (torch.randn(shape).to(dtype) for _ in range(2))
    own = norm_of(kind, shape[-1], dtype)

    def work() -> list[Tensor]:
        y, statistics = own.forward(x)
        backward = [own.backward(dy, x, statistics, added) for added in (residual, None)]
        return [y, statistics, *backward]

    results = work()
    with monkeypatch.context() as patch:
        patch.setattr(norm, "kernel", lambda *_: None)
        formulas = work()
    leaf = x.double().requires_grad_()
    y = exact(own, leaf)
    (dx,) = torch.autograd.grad(y, leaf, dy.double())
    rows = leaf.detach().view(-1, shape[-1])
    mean = rows.mean(-1) if own.centred else torch.zeros(len(rows), dtype=torch.float64)
    rstd = ((rows - mean[:, None]).square().mean(-1) + own.eps).rsqrt()
    references = [y.detach(), torch.stack([mean, rstd], 1), dx + residual.double(), dx]
    slack = 1e-13 if dtype == torch.float64 else 1e-6
    names = ("y", "statistics", "dx + residual", "dx")
    for ours, theirs, reference, name in zip(results, formulas, references, names, strict=True):
        assert ours.dtype == theirs.dtype
        # The gradient of a row of few numbers may cancel to almost nothing: judged by its terms.
        least = float(dy.double().norm() * rstd.max()) if "dx" in name else 0.0
        assert_no_further(ours, theirs, reference, name, slack=slack, least=least)
        assert_no_further(theirs, ours, reference, name, slack=slack, least=least)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_by_differences(kind):
    torch.manual_seed(0)
    own = norm_of(kind, 5, torch.float64)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            y, statistics = own.forward(x)
            ctx.save_for_backward(x, statistics)
            return y

        @staticmethod
        def backward(ctx: Any, *dy: Tensor) -> Tensor:
            return own.backward(dy[0], *ctx.saved_tensors, None)

    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Function.apply, (x,))


@pytest.mark.parametrize(("name", "dim"), itertools.product(MODULES, [64, 576, 2048]))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modules_of_transformers(dtype, name, dim):
    torch.manual_seed(0)
    module: Any = MODULES[name](dim, eps=1e-5).to(dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    kind = name.removesuffix("3")
    settings = {k: v for k, v in KINDS[kind].items() if k != "bias"}
    bias = getattr(module, "bias", None)
    own = Norm(module.weight.detach(), bias=bias, eps=1e-5, **settings)
    x, dy = (torch.randn(200, dim).to(dtype) for _ in range(2))
    leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    y, statistics = own.forward(x)
    expected, reference = module(leaf), exact(own, wide)
    assert_no_further(y, expected, reference, name)
    (theirs,), (dx,) = (
        torch.autograd.grad(out, of, dy.to(out.dtype))
        for out, of in ((expected, leaf), (reference, wide))
    )
    assert_no_further(own.backward(dy, x, statistics, None), theirs, dx, f"{name}, backward")
    if name not in ("layer_norm", "cohere"):
        # To the bit, but where the sum of squares in another order rounds 1 / σ to its neighbour.
        assert (y != expected).float().mean() < (0.02 if dtype == torch.bfloat16 else 0.5)


def test_formulas_equal_transformers_to_the_bit(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(norm, "kernel", lambda *_: None)
    x = torch.randn(20, 96).to(torch.bfloat16)
    for name in ("llama", "gemma", "gemma3", "olmo2", "cohere"):
        module: Any = MODULES[name](96, eps=1e-5).to(torch.bfloat16)
        nn.init.normal_(module.weight)
        own = Norm(module.weight.detach(), eps=1e-5, **KINDS[name.removesuffix("3")])
        assert torch.equal(own.forward(x)[0], module(x)), name


@pytest.mark.parametrize("kind", ["llama", "layer_norm"])
def test_strided_rows(kind):
    torch.manual_seed(0)
    own = norm_of(kind, 8, torch.float32)
    x, dy, residual = (torch.randn(6, 24)[:, 8:16] for _ in range(3))
    y, statistics = own.forward(x)
    assert torch.equal(y, own.forward(x.contiguous())[0])
    expected = own.backward(*(t.contiguous() for t in (dy, x, statistics, residual)))
    assert torch.equal(own.backward(dy, x, statistics, residual), expected)


def test_a_weight_of_another_dtype():
    x = torch.randn(4, 8).to(torch.bfloat16)
    own = Norm(torch.randn(8), eps=1e-5)
    y, statistics = own.forward(x)
    assert y.dtype == x.dtype
    assert_no_further(y, exact(own, x).to(x.dtype), exact(own, x))
    assert own.backward(y, x, statistics, None).dtype == x.dtype
