"""Rotary embedding: the kernel equals the formula in torch, and what transformers computes."""

import pytest
import torch
from torch import Tensor
from transformers.models.cohere import modeling_cohere
from transformers.models.glm4 import modeling_glm4
from transformers.models.llama import modeling_llama

from support.closeness import assert_no_further
from veneer.kernels import rotary
from veneer.kernels.rotary import Rotary

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def rotary_of(tokens: int, pairs: int, dtype: torch.dtype, *, interleaved: bool = False) -> Rotary:
    angles = 3 * torch.randn(tokens, pairs, dtype=torch.float64)
    return Rotary(angles.cos().to(dtype), angles.sin().to(dtype), interleaved)


def exact(own: Rotary, x: Tensor, *, back: bool) -> Tensor:
    """Return x times each angle's e^(iφ), pair by pair, as complex numbers in float64."""
    pairs = own.cos.shape[1]
    turn = torch.complex(own.cos.double(), own.sin.double() * (-1 if back else 1))
    y = x.double().clone()
    for i in range(pairs):
        a, b = (2 * i, 2 * i + 1) if own.interleaved else (i, i + pairs)
        turned = torch.complex(x[..., a].double(), x[..., b].double()) * turn[:, i, None]
        y[..., a], y[..., b] = turned.real, turned.imag
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize(("dim", "pairs"), [(8, 4), (128, 64), (80, 16), (9, 2), (5, 1)])
def test_rotation(dim, pairs, back, interleaved, dtype, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(130, 3, dim).to(dtype)
    own = rotary_of(130, pairs, dtype, interleaved=interleaved)
    y = own.rotate(x, back=back)
    assert y.is_contiguous()
    assert torch.equal(y[..., 2 * pairs :], x[..., 2 * pairs :])
    in_place = x.clone()
    assert own.rotate_(in_place, back=back) is in_place
    assert torch.equal(in_place, y)
    rows = torch.randn(130, 7 * dim + 5).to(dtype)
    part = rows[:, 2 * dim : 5 * dim].unflatten(1, (3, dim)).copy_(x)
    assert torch.equal(own.rotate(part, back=back), y)
    every_second = torch.randn(130, 3, 2 * dim).to(dtype)[..., ::2].copy_(x)
    assert torch.equal(own.rotate(every_second, back=back), y)
    monkeypatch.setattr(rotary, "kernel", lambda *_: None)
    formula, reference = own.rotate(x, back=back), exact(own, x, back=back)
    slack = 1e-15 if dtype == torch.float64 else 1e-6
    assert_no_further(y, formula, reference, slack=slack)
    assert torch.equal(own.rotate(part, back=back), formula)
    assert torch.equal(own.rotate_(x.clone(), back=back), formula)


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_way_back(interleaved):
    torch.manual_seed(0)
    own = rotary_of(20, 3, torch.float64, interleaved=interleaved)
    x = torch.randn(20, 2, 8, dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(x)
    (dx,) = torch.autograd.grad(exact(own, x, back=False), x, dy)
    torch.testing.assert_close(own.rotate(dy, back=True), dx)
    there = own.rotate(x.detach())
    torch.testing.assert_close(own.rotate(there, back=True), x.detach())


@pytest.mark.parametrize(
    ("module", "interleaved", "pairs"),
    [(modeling_llama, False, 8), (modeling_cohere, True, 8), (modeling_glm4, True, 4)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_transformers_computes(dtype, module, interleaved, pairs):
    torch.manual_seed(0)
    x, own = torch.randn(30, 3, 16).to(dtype), rotary_of(30, pairs, dtype, interleaved=interleaved)
    cohere = module is modeling_cohere
    cos, sin = (t.repeat_interleave(2, 1) if cohere else t.repeat(1, 2) for t in (own.cos, own.sin))
    q = x.transpose(0, 1)[None]  # (1, heads, tokens, dim)
    expected = module.apply_rotary_pos_emb(q, q, cos[None], sin[None])[0][0].transpose(0, 1)
    assert_no_further(own.rotate(x), expected, exact(own, x, back=False))


def test_angles_of_another_dtype():
    own, x = rotary_of(30, 4, torch.float32), torch.randn(30, 2, 8).to(torch.bfloat16)
    assert own.rotate(x).dtype == x.dtype
    assert_no_further(
        own.rotate(x), exact(own, x, back=False).to(x.dtype), exact(own, x, back=False)
    )
