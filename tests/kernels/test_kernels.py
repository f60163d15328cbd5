"""The compiled kernels equal the formulas in torch that stand beside them."""

import itertools
from typing import get_args

import pytest
import torch
from torch import Tensor

from veneer.kernels import attention, cross_entropy, native, norm, rows, score_blocks
from veneer.kernels.activation import Activation, activate

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
# Of one number, in units of its own size: two roundings of the narrower dtypes.
CLOSE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}
MODULES = (rows, score_blocks, cross_entropy)


@pytest.fixture
def formulas(monkeypatch):
    """Return a function that computes something by the formulas in torch alone."""

    def alone(work):
        with monkeypatch.context() as patch:
            for module in MODULES:
                patch.setattr(module, "kernel", lambda *_: None)
            return work()

    return alone


def assert_equal(tensors, expected, dtype: torch.dtype) -> None:
    for ours, theirs in zip(tensors, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=CLOSE[dtype], atol=CLOSE[dtype])


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype)


def test_there_is_a_compiler():
    library, why_not = native.load()
    if library is None:
        pytest.skip(f"the compiled kernels are not tested: {why_not}")
    assert native.kernel("norm", torch.zeros(1, dtype=torch.bfloat16)) is not None
    assert native.kernel("norm", torch.zeros(1, dtype=torch.float16)) is None


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.3, None), (1.0, 4.0), (2.0, 30.0)])
@pytest.mark.parametrize("vocab", [1, 5, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy(dtype, vocab, scale, softcap, formulas):
    torch.manual_seed(0)
    z, targets = 5 * random(9, vocab, dtype=dtype), torch.randint(0, vocab, (9,))
    logits = cross_entropy.Logits(scale, softcap)

    def work():
        return cross_entropy.cross_entropy(z, targets, torch.empty_like(z), logits)

    assert_equal(work(), formulas(work), dtype)
    in_place = z.clone()
    ours = cross_entropy.cross_entropy(in_place, targets, in_place, logits)
    assert torch.equal(ours[1], work()[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_so(dtype, bad):
    logits, targets = random(4, 50, dtype=dtype), torch.zeros(4, dtype=torch.long)
    logits[2, 7] = bad
    losses, _ = cross_entropy.cross_entropy(logits, targets, torch.empty_like(logits))
    assert torch.isfinite(losses).tolist() == [True, True, False, True]
    gate = random(4, 50, dtype=dtype)
    gate[1, 3] = float("nan")
    for kind in get_args(Activation):
        assert torch.isnan(activate(kind, gate, gate)[1, 3])
    normed, _ = norm.Norm(torch.ones(50, dtype=dtype), eps=1e-5).forward(gate)
    assert torch.isnan(normed[1]).all()
    assert torch.isfinite(normed[0]).all()


@pytest.mark.parametrize(
    ("window", "softcap", "lengths"),
    itertools.product([None, 1, 7, 40], [None, 1.5], [[1], [5, 40, 39, 3], [33] * 4]),
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.thinned(pairs=True)
def test_attention_in_blocks(dtype, window, softcap, lengths, formulas, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(score_blocks, "QUERY_BLOCK", 16)  # several blocks in these short rows
    tokens = sum(lengths)
    q, dy = (random(tokens, 4, 8, dtype=dtype) for _ in range(2))
    k, v = (random(tokens, 2, 8, dtype=dtype) for _ in range(2))
    attend = attention.Attention(attention.Packing(lengths), 0.3, window, softcap)

    def work():
        y, log_sums = attend.forward(q, k, v)
        return [y, *attend.backward(dy, q, k, v, y, log_sums)]

    results = work()
    assert_equal(results, formulas(work), dtype)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    y = attend.composed(*leaves)
    expected = [y, *torch.autograd.grad(y, leaves, dy.double())]
    for ours, exact in zip(results, expected, strict=True):
        limit = 2 * CLOSE[dtype] * max(1.0, float(exact.abs().max()))
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=limit)


def test_keys_with_a_large_common_offset():
    """The gradient of scores is rounded to bfloat16; what all keys share must not matter."""
    torch.manual_seed(0)
    attend = attention.Attention(attention.Packing([40, 24]), 0.125)
    q, dy = (random(64, 4, 64, dtype=torch.bfloat16) for _ in range(2))
    k, v = (random(64, 2, 64, dtype=torch.bfloat16) for _ in range(2))
    errors = []
    for offset in (0.0, 30.0):
        keys = (k + offset * torch.randn(1, 2, 64)).to(torch.bfloat16)
        y, log_sums = attend.forward(q, keys, v)
        gradients = attend.backward(dy, q, keys, v, y, log_sums)
        leaves = [x.double().requires_grad_() for x in (q, keys, v)]
        expected = torch.autograd.grad(attend.composed(*leaves), leaves, dy.double())
        errors.append(
            max(
                float(torch.dist(a.double(), b) / b.norm())
                for a, b in zip(gradients, expected, strict=True)
            )
        )
    assert errors[0] < 0.02
    assert errors[1] < 0.02


def test_whole_numbers_where_fractions_are_meant():
    torch.manual_seed(0)
    x, weight = random(3, 4, dtype=torch.float32), torch.ones(4)
    whole, fraction = (norm.Norm(weight, eps=eps, offset=eps) for eps in (1, 1.0))
    torch.testing.assert_close(whole.forward(x), fraction.forward(x), rtol=0, atol=0)
    q = random(9, 2, 4, dtype=torch.float32)
    gradients = []
    for scale in (1, 1.0):
        attend = attention.Attention(attention.Packing([9]), scale)
        y, log_sums = attend.forward(q, q, q)
        gradients.append(attend.backward(q, q, q, q, y, log_sums))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


@pytest.mark.parametrize("label", [-1, 50])
def test_a_label_outside_of_the_vocabulary(label):
    logits = random(2, 50, dtype=torch.float32)
    with pytest.raises(IndexError, match="50 tokens"):
        cross_entropy.cross_entropy(logits, torch.tensor([0, label]), logits)


def test_kernels_take_no_strided_tensors():
    kernel = native.kernel("norm", torch.empty(0))
    if kernel is None:
        pytest.skip("there is no compiler here")
    x = torch.randn(4, 6).T
    with pytest.raises(ValueError, match="strides"):
        kernel(x, x, x, *x.shape)
