"""Law 3: the fused forward and backward equal plain autograd."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from support.closeness import assert_gradients_no_further, assert_no_further
from support.kinds import each_kind
from support.plain import plain_pair
from support.random_adapters import ids, shake
from support.tiny_models import tiny
from veneer.adapter.active import ActiveAdapters
from veneer.adapter.adapter import Adapter
from veneer.adapter.attach import attach
from veneer.adapter.config import LoRA
from veneer.adapter.embedding import LoRAEmbedding
from veneer.adapter.linear import LoRALinear
from veneer.adapter.new_tokens import NewTokenHead
from veneer.adapter.use import use
from veneer.kernels import cross_entropy
from veneer.kernels.attention import Packing, UnsupportedAttention, packed_attention
from veneer.kernels.cross_entropy import IGNORED, labelled_cross_entropy
from veneer.lowrank.projection import LowRankLinear

IN, OUT, RANK = 5, 4, 2
DOUBLE = {"dtype": torch.float64}


def base_layer(*, transposed: bool, bias: bool) -> nn.Module:
    if not transposed:
        return nn.Linear(IN, OUT, bias=bias, **DOUBLE)
    layer = Conv1D(OUT, IN).double()
    nn.init.normal_(layer.bias)
    if not bias:
        layer.bias = None
    return layer


def adapter(rank: int, scaling: float, dropout: float) -> Adapter:
    return Adapter(
        torch.randn(rank, IN, **DOUBLE),
        torch.randn(OUT, rank, **DOUBLE),
        scaling=scaling,
        dropout=dropout,
    )


def lora_linear(
    weights: dict[str, float], *, bias: bool, transposed: bool, dropout: float
) -> LoRALinear:
    torch.manual_seed(0)
    active_adapters = ActiveAdapters()
    layer = LoRALinear(
        base_layer(transposed=transposed, bias=bias), active_adapters, transposed=transposed
    )
    for number, name in enumerate(weights, 1):
        # Of several adapters, every other one drops inputs out, so that all ways are gone.
        layer.attach(name, adapter(number + 1, 0.5 + number, dropout * (number % 2)))
        active_adapters.configs[name] = LoRA()
    active_adapters.use(weights)
    return layer


def plain(layer: LoRALinear, x: Tensor) -> Tensor:
    y = F.linear(x, layer.dense_base_weight, layer.original.bias)
    for part, weight in layer.active():
        y = y + weight * part.scaling * F.linear(F.linear(x, part.lora_A), part.lora_B)
    return y


ACTING = [{"a": 1.0}, {"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 0.3, "b": -1.5}]
LAYERS = list(
    itertools.product(
        ACTING,
        [True, False],
        [True, False],
    )
)


@pytest.mark.parametrize("shape", [(3, IN), (2, 3, IN)], ids=["2d", "3d"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize(("weights", "bias", "transposed"), LAYERS)
def test_linear_layer_passes_gradcheck(weights, bias, transposed, dropout, shape):
    layer = lora_linear(weights, bias=bias, transposed=transposed, dropout=dropout).train()
    x = torch.randn(shape, **DOUBLE, requires_grad=True)

    def forward(x: Tensor, *_: Tensor) -> Tensor:
        torch.manual_seed(3)  # the same masks each time
        return layer(x)

    trained = [weight for weight in layer.parameters() if weight.requires_grad]
    assert len(trained) == 2 * len(weights)
    assert torch.autograd.gradcheck(forward, (x, *trained), fast_mode=False)


@pytest.mark.parametrize("shape", [(3, IN), (2, 3, IN), (IN,)], ids=["2d", "3d", "1d"])
@pytest.mark.parametrize(("weights", "bias", "transposed"), LAYERS)
def test_linear_layer_equals_plain_autograd(weights, bias, transposed, shape):
    layer = lora_linear(weights, bias=bias, transposed=transposed, dropout=0.5).eval()
    x = torch.randn(shape, **DOUBLE, requires_grad=True)
    dy = torch.randn(*shape[:-1], OUT, **DOUBLE)
    inputs = [x, *(weight for weight in layer.parameters() if weight.requires_grad)]
    found, wanted = layer(x), plain(layer, x)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, dy), torch.autograd.grad(wanted, inputs, dy)
    )


@pytest.mark.parametrize("needs", itertools.product([True, False], repeat=3))
def test_dropped_inputs_and_gradients_only_where_needed(needs):
    torch.manual_seed(0)
    x, A, B = (
        torch.randn(shape, **DOUBLE, requires_grad=needed)
        for shape, needed in zip([(6, IN), (RANK, IN), (OUT, RANK)], needs, strict=True)
    )
    W, b = torch.randn(OUT, IN, **DOUBLE), torch.randn(OUT, **DOUBLE)
    keep = (torch.rand(6, IN) > 0.4).double() / 0.6
    found = LowRankLinear.apply(x, W, b, A, B, keep)
    wanted = F.linear(x, W, b) + (x * keep) @ A.T @ B.T
    torch.testing.assert_close(found, wanted)
    inputs = [tensor for tensor in (x, A, B) if tensor.requires_grad]
    assert found.requires_grad == bool(inputs)
    if inputs:
        dy = torch.randn(6, OUT, **DOUBLE)
        torch.testing.assert_close(
            torch.autograd.grad(found, inputs, dy), torch.autograd.grad(wanted, inputs, dy)
        )


def test_backward_makes_no_product_that_nobody_needs():
    tokens = 7
    layer = lora_linear({"a": 1.0}, bias=True, transposed=False, dropout=0.0)
    y = layer(torch.randn(tokens, IN, **DOUBLE))
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    rank = layer.adapters["a"].rank
    assert counter.get_total_flops() == 2 * tokens * rank * (OUT + OUT + IN)  # dh, dB, dA
    assert layer.original.weight.grad is None


def test_one_copy_of_x_is_kept():
    layer = lora_linear({"a": 1.0, "b": 1.0}, bias=True, transposed=False, dropout=0.0)
    x = torch.randn(100, IN, **DOUBLE)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape[0] == len(x):
            kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    ranks = sum(part.rank for part in layer.adapters.values())
    assert sorted(kept.values()) == sorted([x.numel(), 100 * ranks])


@pytest.mark.parametrize("scale", [None, 3.0])
@pytest.mark.parametrize("weights", ACTING)
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
    wanted = original(tokens) + layer.delta()[tokens].double() * (scale or 1.0)
    torch.testing.assert_close(layer(tokens), wanted, rtol=1e-6, atol=1e-6)


def summed(logits: Tensor) -> Tensor:
    """Return a number that depends on every logit."""
    return logits.logsumexp(-1).sum() + logits[..., ::3].square().sum()


@each_kind()
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


def test_only_the_acting_adapter_has_gradients():
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


# The cross-entropy over labelled rows.

DIM, WORDS = 6, 11


def heads() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    frozen = nn.Linear(DIM, WORDS, bias=False, **DOUBLE).requires_grad_(False)
    adapted = LoRALinear(nn.Linear(DIM, WORDS, **DOUBLE), ActiveAdapters())
    adapted.attach(
        "a", Adapter(torch.randn(2, DIM).double(), torch.randn(WORDS, 2).double(), scaling=2.0)
    )
    adapted.active_adapters.weights = {"a": 1.0}
    rows = nn.Parameter(torch.randn(3, DIM, **DOUBLE))
    return {
        "frozen": frozen,
        "trained": nn.Linear(DIM, WORDS, **DOUBLE),
        "adapted": adapted,
        "new words": NewTokenHead(
            nn.Linear(DIM, WORDS - 3, bias=False, **DOUBLE), rows, WORDS - 3, ActiveAdapters()
        ),
    }


@pytest.mark.parametrize("factor", [1.0, 0.25])
@pytest.mark.parametrize("chunk", [1, 3 * WORDS, 10**6])
@pytest.mark.parametrize("labelled", [0, 1, 8, 20])
@pytest.mark.parametrize("kind", heads())
def test_labelled_cross_entropy(kind, labelled, chunk, factor, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", chunk)
    head = heads()[kind]
    hidden = torch.randn(20, DIM, **DOUBLE, requires_grad=True)
    labels = torch.full((20,), IGNORED)
    labels[torch.randperm(20)[:labelled]] = torch.randint(0, WORDS, (labelled,))
    inputs = [hidden, *(weight for weight in head.parameters() if weight.requires_grad)]
    found = labelled_cross_entropy(hidden, labels, head)
    wanted = F.cross_entropy(head(hidden), labels, ignore_index=IGNORED, reduction="sum")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(found * factor, inputs), torch.autograd.grad(wanted * factor, inputs)
    )


@pytest.mark.parametrize("kind", heads())
def test_labelled_cross_entropy_without_a_gradient_for_hidden(kind):
    head = heads()[kind]
    hidden, labels = torch.randn(5, DIM, **DOUBLE), torch.tensor([1, IGNORED, 4, 9, 0])
    trained = [weight for weight in head.parameters() if weight.requires_grad]
    found = labelled_cross_entropy(hidden, labels, head)
    assert found.requires_grad == bool(trained)
    if trained:
        wanted = F.cross_entropy(head(hidden), labels, reduction="sum")
        torch.testing.assert_close(
            torch.autograd.grad(found, trained), torch.autograd.grad(wanted, trained)
        )


def test_labelled_cross_entropy_measures_a_head_whose_adapter_rests():
    head = heads()["adapted"]
    head.active_adapters.weights = {}
    hidden, labels = torch.randn(5, DIM, **DOUBLE), torch.tensor([1, IGNORED, 4, 9, 0])
    with torch.no_grad():
        found = labelled_cross_entropy(hidden, labels, head)
        wanted = F.cross_entropy(head(hidden), labels, reduction="sum")
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)


def test_no_more_logits_than_a_chunk(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 4 * WORDS)
    head, seen, plain = heads()["frozen"], [], cross_entropy.cross_entropy

    def noted(logits: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(logits.numel())
        return plain(logits, *others)

    monkeypatch.setattr(cross_entropy, "cross_entropy", noted)
    hidden = torch.randn(30, DIM, **DOUBLE, requires_grad=True)
    labels = torch.randint(0, WORDS, (30,)).index_fill(0, torch.arange(0, 30, 3), IGNORED)
    labelled_cross_entropy(hidden, labels, head)
    assert max(seen) <= 4 * WORDS
    assert sum(seen) == 20 * WORDS


# Packed attention.


def alone(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, scaling: float | None
) -> Tensor:  # all (heads, tokens, head_dim)
    share = q.shape[0] // k.shape[0]
    at = torch.arange(q.shape[1])
    back = at[:, None] - at[None, :]
    mask = (back >= 0) & (back < (window or len(at) + 1))
    k, v = k.repeat_interleave(share, 0), v.repeat_interleave(share, 0)
    y = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=scaling)
    return y[0].transpose(0, 1)


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=7),
    heads=st.sampled_from([(4, 4), (4, 2), (4, 1)]),
    window=st.none() | st.integers(1, 9),
    scaling=st.sampled_from([None, 0.2]),
)
def test_packed_attention_equals_each_sequence_alone(lengths, heads, window, scaling):
    torch.manual_seed(sum(lengths))
    tokens = sum(lengths)
    q, k, v = (
        torch.randn(1, n, tokens, 3, **DOUBLE, requires_grad=True)
        for n in (heads[0], heads[1], heads[1])
    )
    found, _ = packed_attention(
        nn.Identity(),
        q,
        k,
        v,
        None,
        packing=Packing(lengths),
        sliding_window=window,
        scaling=scaling,
    )
    parts = zip(*(x[0].split(lengths, dim=1) for x in (q, k, v)), strict=True)
    wanted = torch.cat([alone(*part, window, scaling) for part in parts])[None]
    torch.testing.assert_close(found, wanted)
    dy = torch.randn_like(found)
    torch.testing.assert_close(
        torch.autograd.grad(found, (q, k, v), dy), torch.autograd.grad(wanted, (q, k, v), dy)
    )


@pytest.mark.parametrize(
    "options",
    [
        {"packing": None},
        {"attention_mask": torch.ones(1, 1, 4, 4)},
        {"softcap": 30.0},
        {"position_bias": torch.zeros(1)},
        {"s_aux": torch.zeros(1)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_packed_attention_refuses_what_it_does_not_do(options):
    x = torch.randn(1, 2, 4, 3)
    options = {"attention_mask": None, "packing": Packing([4])} | options
    with pytest.raises(UnsupportedAttention):
        packed_attention(nn.Identity(), x, x, x, **options)
