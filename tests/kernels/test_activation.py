"""Activations: each kernel is as near to float64 as the formula in torch, forward and backward."""

from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2CLS, ACT2FN

from support.closeness import assert_no_further
from veneer.kernels import activation
from veneer.kernels.activation import Activation, activate, activate_backward, activation_of

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
KINDS = get_args(Activation)
# By their names in transformers; a name that is not here has no kernel.
KNOWN: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu_squared",
}
MODULES = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "relu_squared": "relu2",
    "quick_gelu": "quick_gelu",
}


def both_ways(kind: Activation, dy: Tensor, gate: Tensor, up: Tensor | None) -> list[Tensor]:
    """Return y, and the gradients of gate and up."""
    d_gate, d_up = torch.empty_like(gate), None if up is None else torch.empty_like(up)
    y = activate(kind, gate, up)
    again = activate_backward(kind, dy, gate, up, d_gate, d_up)
    torch.testing.assert_close(again, y)
    return [y, d_gate] if d_up is None else [y, d_gate, d_up]


def exact(kind: Activation, dy: Tensor, gate: Tensor, up: Tensor | None) -> list[Tensor]:
    """Return the same of transformers' module, by autograd in float64."""
    leaves = [x.double().requires_grad_() for x in (gate, up) if x is not None]
    y = ACT2FN[MODULES[kind]](leaves[0])
    y = y if up is None else y * leaves[1]
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.double())]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (5, 37), (80, 512)])
@pytest.mark.parametrize("size", [1.0, 60.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_ways(dtype, size, shape, gated, kind, monkeypatch):
    torch.manual_seed(0)
    gate, up, dy = (torch.randn(shape).to(dtype) for _ in range(3))
    gate *= size
    inputs = (kind, dy, gate, up if gated else None)
    results = both_ways(*inputs)
    with monkeypatch.context() as patch:
        patch.setattr(activation, "kernel", lambda *_, **__: None)
        formulas = both_ways(*inputs)
    slack = 1e-14 if dtype == torch.float64 else 1e-6
    lengths = [x.double().norm() for x in (gate, dy, dy)]  # of what may cancel to almost nothing
    for ours, theirs, reference, least in zip(
        results, formulas, exact(*inputs), lengths, strict=False
    ):
        assert_no_further(ours, theirs, reference, slack=slack, least=float(least))
        if dtype != torch.bfloat16:  # in which torch rounds between its operations
            assert_no_further(theirs, ours, reference, slack=slack, least=float(least))


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_a_range(kind):
    """Next to a float64 computation, an error is a few roundings of float32, on the tails too."""
    gate = torch.linspace(-12, 12, 100_001)[None]
    ours, slope = both_ways(kind, torch.ones_like(gate), gate, None)
    reference, expected = exact(kind, torch.ones_like(gate), gate, None)
    eps = torch.finfo(torch.float32).eps
    assert ((ours - reference).abs() <= 16 * eps * reference.abs() + eps).all()
    assert ((slope - expected).abs() <= 16 * eps * expected.abs() + 2 * eps).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gate", [-1e18, -1e12, -1e4, -90.0, 90.0, 1e4, 1e12, 1e18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_numbers(dtype, gate, kind):
    x = torch.full((1, 40), gate).to(dtype)
    y, slope = both_ways(kind, torch.ones_like(x), x, None)
    reference, expected = exact(kind, torch.ones_like(x), x, None)
    torch.testing.assert_close(y.double(), reference, rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(slope.double(), expected, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gated", [True, False])
def test_gradient_by_differences(gated, kind):
    torch.manual_seed(0)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
            ctx.save_for_backward(gate, up)
            return activate(kind, gate, up if gated else None)

        @staticmethod
        def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor, Tensor | None]:
            gate, up = ctx.saved_tensors
            _, *gradients = both_ways(kind, dy[0], gate, up if gated else None)
            return gradients[0], gradients[1] if gated else None

    gate, up = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(Function.apply, (gate, up if gated else up.detach()))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_of_one_matrix(dtype, kind, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(activation, "kernel", lambda *_, **__: None)
    torch.manual_seed(0)
    gate, up = torch.randn(70, 2 * 130).to(dtype).split(130, 1)
    dy = torch.randn(70, 131).to(dtype)[:, 1:]
    d_both = torch.zeros(70, 1 + 2 * 130, dtype=dtype)
    y = activate_backward(kind, dy, gate, up, d_both[:, 1:131], d_both[:, 131:])
    assert y.is_contiguous()
    expected = both_ways(kind, dy.contiguous(), gate.contiguous(), up.contiguous())
    torch.testing.assert_close(
        [y, d_both[:, 1:131], d_both[:, 131:], activate(kind, gate, up)],
        [*expected, expected[0]],
    )
    assert not d_both[:, 0].any()
    turned = torch.randn(130, 70).to(dtype).T
    torch.testing.assert_close(activate(kind, turned, up), activate(kind, turned.contiguous(), up))


def test_gradients_go_to_rows():
    x = torch.randn(6, 4)
    if activation.activation_kernel("activate", "silu", x) is None:
        pytest.skip("there is no compiler here")
    with pytest.raises(ValueError, match="stride"):
        activate_backward("silu", x, x, None, torch.empty(4, 6).T, None)


@pytest.mark.parametrize("name", ACT2CLS)
def test_activations_of_transformers(name):
    module = nn.PReLU() if name == "prelu" else ACT2FN[name]
    assert activation_of(module) == KNOWN.get(name)


def test_modules_that_are_no_activations():
    assert activation_of(nn.GELU()) == "gelu"
    assert activation_of(nn.Identity()) is None
    for module in (
        nn.Linear(3, 3),
        nn.Softmax(-1),
        nn.Flatten(0),
        nn.Bilinear(2, 2, 2),
        nn.MaxPool2d(3),
    ):
        assert activation_of(module) is None
