"""What a step multiplies with, and gradients, have the bits of autograd without its graph."""

import pytest
import torch

from veneer.lowrank.masters import Masters

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("own", DTYPES)
def test_the_same_bits_as_by_autograd(own, dtype):
    torch.manual_seed(0)
    A, B = (torch.randn(shape).to(own).requires_grad_() for shape in [(3, 40), (50, 3)])
    wide = torch.promote_types(own, torch.float32)
    rounded = A.to(dtype), (B.to(wide) * 1.7).to(dtype)
    masters = Masters(A, B, 1.7)
    for by_hand, by_autograd in zip(masters.rounded(dtype), rounded, strict=True):
        assert not by_hand.requires_grad
        assert torch.equal(by_hand, by_autograd)
    gradients = [torch.randn(factor.shape).to(dtype) for factor in rounded]
    expected = torch.autograd.grad(rounded, (A, B), gradients)
    for by_hand, by_autograd in zip(masters.gradients(*gradients), expected, strict=True):
        assert by_hand.dtype == own
        assert torch.equal(by_hand, by_autograd)


def test_what_does_not_train_has_no_gradient():
    masters = Masters(torch.randn(2, 5), torch.randn(7, 2, requires_grad=True), 2.0)
    dB = torch.randn(7, 2)
    dA, own_dB = masters.gradients(None, dB)
    assert dA is None
    assert torch.equal(own_dB, 2 * dB)
