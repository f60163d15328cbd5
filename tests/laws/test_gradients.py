"""Law 3: the fused forward and backward equal plain autograd."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from support.closeness import assert_gradients_no_further, assert_no_further
from support.kinds import each_kind, in_share
from support.plain import plain_pair
from support.random_adapters import ids, shake
from support.tiny_models import tiny
from veneer.adapter.active import ActiveAdapters
from veneer.adapter.adapter import Adapter
from veneer.adapter.attach import attach
from veneer.adapter.config import LoRA
from veneer.adapter.embedding import LoRAEmbedding
from veneer.adapter.linear import LoRALinear
from veneer.adapter.use import use
from veneer.kernels.dropout import Mask
from veneer.lowrank.linear import LowRankLinear
from veneer.models.quantize import quantize
from veneer.quant.weight import QuantizedLinear

IN, OUT, RANK = 5, 4, 2
DOUBLE = {"dtype": torch.float64}


def base_layer(base: str, *, bias: bool) -> nn.Module:
    if base == "conv1d":
        layer = Conv1D(OUT, IN).double()
        nn.init.normal_(layer.bias)
        if not bias:
            layer.bias = None
        return layer
    if base in ("nf4", "int8"):
        quantized = quantize(torch.randn(OUT, IN), {"nf4": 4, "int8": 8}[base], torch.float32)
        return QuantizedLinear(quantized, nn.Linear(IN, OUT, bias=bias)).double()
    return nn.Linear(IN, OUT, bias=bias, **DOUBLE)


def lora_linear(
    weights: dict[str, float], *, bias: bool = True, base: str = "linear", dropout: float = 0.0
) -> LoRALinear:
    torch.manual_seed(0)
    active_adapters = ActiveAdapters()
    original = base_layer(base, bias=bias)
    layer = LoRALinear(original, active_adapters, transposed=base == "conv1d")
    for number, name in enumerate(weights, 1):
        # Of several adapters, every other one drops inputs out, so that all ways are gone.
        layer.attach(name, adapter(number + 1, 0.5 + number, dropout * (number % 2)))
        active_adapters.configs[name] = LoRA()
    active_adapters.use(weights)
    return layer


def plain(layer: LoRALinear, x: Tensor) -> Tensor:
    y = F.linear(x, layer.dense_base_weight.to(x.dtype), layer.original.bias)
    for adapter, weight in layer.active():
        y = y + weight * adapter.scaling * F.linear(F.linear(x, adapter.lora_A), adapter.lora_B)
    return y


def adapter(rank: int, scaling: float, dropout: float) -> Adapter:
    return Adapter(
        torch.randn(rank, IN, **DOUBLE),
        torch.randn(OUT, rank, **DOUBLE),
        scaling=scaling,
        dropout=dropout,
    )


MIXES = [{"a": 1.0}, {"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 0.3, "b": -1.5}]


# How many adapters act concerns no bias, which a base adds before any of them.
@pytest.mark.parametrize(
    ("weights", "bias"), [*((mix, True) for mix in MIXES), (MIXES[0], False)], ids=str
)
@pytest.mark.parametrize("base", ["linear", "conv1d", "nf4", "int8"])
@pytest.mark.thinned
def test_a_linear_layer_equals_plain_autograd(weights, base, bias):
    for dropout, shape in ((0.5, (3, IN)), (0.0, (2, 2, IN))):
        layer = lora_linear(weights, bias=bias, base=base, dropout=dropout).train()
        x = torch.randn(shape, **DOUBLE, requires_grad=True)

        def forward(x: Tensor, *_: Tensor, layer: LoRALinear = layer) -> Tensor:
            torch.manual_seed(3)  # the same masks each time
            return layer(x)

        trained = [weight for weight in layer.parameters() if weight.requires_grad]
        assert len(trained) == 2 * len(weights)
        assert torch.autograd.gradcheck(forward, (x, *trained), fast_mode=False)
    layer.eval()
    for shape in ((3, IN), (2, 3, IN), (IN,)):
        x = torch.randn(shape, **DOUBLE, requires_grad=True)
        torch.testing.assert_close(layer(x), plain(layer, x))


@pytest.mark.parametrize("needs", itertools.product([True, False], repeat=3))
def test_dropped_inputs_and_gradients_only_where_needed(needs):
    torch.manual_seed(0)
    x, A, B = (
        torch.randn(shape, **DOUBLE, requires_grad=needed)
        for shape, needed in zip([(6, IN), (RANK, IN), (OUT, RANK)], needs, strict=True)
    )
    W, b = torch.randn(OUT, IN, **DOUBLE), torch.randn(OUT, **DOUBLE)
    mask = Mask(0.4, seed=0)
    keep = mask.apply(torch.ones_like(x))
    ours = LowRankLinear.apply(x, W, b, A, B, ((RANK, mask),))
    expected = F.linear(x, W, b) + (x * keep) @ A.T @ B.T
    torch.testing.assert_close(ours, expected)
    inputs = [tensor for tensor in (x, A, B) if tensor.requires_grad]
    assert ours.requires_grad == bool(inputs)
    if inputs:
        dy = torch.randn(6, OUT, **DOUBLE)
        torch.testing.assert_close(
            torch.autograd.grad(ours, inputs, dy), torch.autograd.grad(expected, inputs, dy)
        )


def test_backward_makes_no_product_that_nobody_needs():
    tokens = 7
    layer = lora_linear({"a": 1.0})
    y = layer(torch.randn(tokens, IN, **DOUBLE))
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    rank = layer.adapters["a"].rank
    assert counter.get_total_flops() == 2 * tokens * rank * (OUT + OUT + IN)  # dh, dB, dA
    assert layer.original.weight.grad is None


def test_one_copy_of_x_is_kept():
    layer = lora_linear({"a": 1.0, "b": 1.0})
    x = torch.randn(100, IN, **DOUBLE)
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.shape[0] == len(x):
            kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x)
    ranks = sum(adapter.rank for adapter in layer.adapters.values())
    assert sorted(kept.values()) == sorted([x.numel(), 100 * ranks])


@pytest.mark.parametrize("scale", [None, 3.0])
@pytest.mark.parametrize("weights", MIXES)
def test_embedding_passes_gradcheck(weights, scale):
    torch.manual_seed(0)
    original = nn.Embedding(7, OUT, **DOUBLE)
    if scale is not None:
        original.embed_scale = scale
    active_adapters = ActiveAdapters()
    layer = LoRAEmbedding(original, active_adapters)
    for number, name in enumerate(weights, 1):
        A, B = torch.randn(number, 7, **DOUBLE), torch.randn(OUT, number, **DOUBLE)
        layer.attach(name, Adapter(A, B, scaling=0.5 + number))
        active_adapters.configs[name] = LoRA()
    active_adapters.use(weights)
    tokens = torch.tensor([[0, 3, 3], [6, 0, 1]])
    trained = [weight for weight in layer.parameters() if weight.requires_grad]
    assert torch.autograd.gradcheck(lambda *_: layer(tokens), trained)
    expected = original(tokens) + layer.delta()[tokens].double() * (scale or 1.0)
    torch.testing.assert_close(layer(tokens), expected, rtol=1e-6, atol=1e-6)


def summed(logits: Tensor) -> Tensor:
    """Return a number that depends on every logit."""
    return logits.logsumexp(-1).sum() + logits[..., ::3].square().sum()


@each_kind(fast=in_share(4))
def test_gradients_of_a_whole_model(kind):
    model = kind.shaken()
    plain, exact = plain_pair(kind, model)
    logits = kind.logits(model)
    trained = {name: w for name, w in model.named_parameters() if w.requires_grad}
    gradients = torch.autograd.grad(summed(logits), list(trained.values()), allow_unused=True)
    ours = {name: g for name, g in zip(trained, gradients, strict=True) if g is not None}
    expected, peers = exact.logits(kind.inputs()), plain.logits(kind.inputs())
    assert_no_further(logits, peers, expected, "logits")
    assert_gradients_no_further(
        ours, plain.gradients(summed(peers)), exact.gradients(summed(expected))
    )


def test_only_the_active_adapter_has_gradients():
    model = tiny("llama")
    for name in ("a", "b"):
        attach(model, LoRA(rank=2), name=name)
    shake(model)
    model.requires_grad_(True)
    use(model, "a")
    model(ids()).logits.sum().backward()
    for path, weight in model.named_parameters():
        if ".adapters.a." in path:
            assert weight.grad is not None, path
        elif ".adapters.b." in path:
            assert weight.grad is None, path
