"""DoRA: the paper's formula, PEFT's numbers, and no dense product."""

import itertools
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import veneer
from support.closeness import assert_as_near, assert_no_further
from support.plain import Float64, exact_logits
from support.random_adapters import copy_of, distance, examples, ids, logits, shake, targets_named
from support.tiny_models import VOCAB, tiny
from veneer.adapter import layers
from veneer.adapter.active import ActiveAdapters
from veneer.adapter.adapter import Adapter
from veneer.adapter.config import LoRA
from veneer.adapter.embedding import LoRAEmbedding
from veneer.adapter.layers import AdaptedLayer, lora_layers
from veneer.adapter.linear import LoRALinear
from veneer.kernels.gain import apply_gain_, gain_backward
from veneer.lowrank.formula import updated_norms
from veneer.models.quantize import quantized_model
from veneer.models.source import Source
from veneer.quant.nf4 import NF4
from veneer.quant.weight import QuantizedLinear
from veneer.training.config import TrainConfig

IN, OUT = 64, 8
DOUBLE = {"dtype": torch.float64}
MIXES = [{"a": 1.0}, {"a": 0.5}, {"a": 1.0, "b": 1.0, "plain": 1.0}, {"a": -0.3, "plain": 2.0}]


def adapter(W: Tensor, rank: int, *, plain: bool, dropout: float = 0.0) -> Adapter:
    A, B = torch.randn(rank, W.shape[1], **DOUBLE), torch.randn(W.shape[0], rank, **DOUBLE)
    lengths = (W + 0.5 * rank * B @ A).norm(dim=1)
    magnitude = None if plain else lengths * (0.5 + torch.rand(W.shape[0], **DOUBLE))
    return Adapter(A, B, scaling=0.5 * rank, dropout=dropout, magnitude=magnitude)


def with_adapters(layer: AdaptedLayer, weights: dict[str, float], dropout: float = 0.0) -> Any:
    W = layer.by_outputs(layer.dense_base_weight).double()
    for rank, name in enumerate(weights, 1):
        one = adapter(W, rank, plain=name == "plain", dropout=dropout)
        layer.attach(name, one)
        layer.active_adapters.configs[name] = LoRA()
    layer.active_adapters.use(weights)
    return layer


def linear(kind: str, *, bias: bool) -> LoRALinear:
    torch.manual_seed(0)
    original: nn.Module = nn.Linear(IN, OUT, bias=bias, **DOUBLE)
    if kind == "conv1d":
        original = Conv1D(OUT, IN).double()
        original.bias = nn.Parameter(torch.randn(OUT, **DOUBLE)) if bias else None
    if kind == "nf4":
        original = QuantizedLinear(NF4.quantize(original.weight.float(), torch.float32), original)
    return LoRALinear(original, ActiveAdapters(), transposed=kind == "conv1d")


def change(layer: AdaptedLayer, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return Σ w ΔW by the formula, through which gradients go but for the norms."""
    W = layer.by_outputs(layer.dense_base_weight).to(dtype)
    total = torch.zeros_like(W)
    for each, weight in layer.active():
        V = W + each.scaling * each.lora_B.to(dtype) @ each.lora_A.to(dtype)
        if each.magnitude is None:
            total = total + weight * (V - W)
        else:
            scales = each.magnitude.to(dtype) / V.norm(dim=1).detach()
            total = total + weight * (scales[:, None] * V - W)
    return total


KINDS = list(itertools.product(["linear", "conv1d", "nf4"], [True, False], MIXES))


@pytest.mark.parametrize(("kind", "bias", "weights"), KINDS)
def test_linear_layers_equal_the_formula_both_ways(kind, bias, weights):
    layer = with_adapters(linear(kind, bias=bias), weights)
    dtype = torch.float32 if kind == "nf4" else torch.float64
    x = torch.randn(2, 3, IN, dtype=dtype, requires_grad=True)
    inputs = [x, *(weight for weight in layer.parameters() if weight.requires_grad)]
    dy = torch.randn(2, 3, OUT, dtype=dtype)

    def both(y: Tensor) -> tuple[Tensor, ...]:
        return y, *torch.autograd.grad(y, inputs, dy.to(y.dtype))

    def by_formula(dtype: torch.dtype) -> tuple[Tensor, ...]:
        W, bias = layer.dense_base_weight.to(dtype), layer.original.bias
        W = W + change(layer, dtype)
        return both(F.linear(x.to(dtype), W, None if bias is None else bias.to(dtype)))

    ours, exact = both(layer(x)), by_formula(torch.float64)
    if kind == "nf4":
        for a, b, c in zip(ours, by_formula(torch.float32), exact, strict=True):
            assert_no_further(a, b, c, slack=1e-5)  # norms come from squares, not from the sum
    else:
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weights", MIXES)
def test_embeddings_equal_the_formula_both_ways(weights):
    torch.manual_seed(0)
    layer = with_adapters(LoRAEmbedding(nn.Embedding(20, 6, **DOUBLE), ActiveAdapters()), weights)
    tokens = torch.randint(20, (3, 4))
    expected = F.embedding(tokens, layer.dense_base_weight + change(layer).T)
    ours = layer(tokens)
    inputs = [weight for weight in layer.parameters() if weight.requires_grad]
    dy = torch.randn(3, 4, 6, **DOUBLE)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(
        torch.autograd.grad(ours, inputs, dy), torch.autograd.grad(expected, inputs, dy)
    )


@pytest.mark.parametrize("weights", MIXES)
def test_dropped_inputs_concern_the_low_rank_part_alone(weights):
    layer = with_adapters(linear("linear", bias=True), weights, dropout=0.5)
    x = torch.randn(4000, IN, **DOUBLE)
    many = x[:4].expand(100, 4, IN)  # all with masks of their own
    mean = torch.cat([layer.train()(many) for _ in range(40)]).mean(0)
    assert distance(mean, layer.eval()(x[:4])) < 0.05
    off = dict.fromkeys(weights, 0.0)
    layer.active_adapters.use(off)
    torch.testing.assert_close(layer.train()(x), layer.original(x))


def test_a_gain_of_zero_and_a_row_of_zeros_give_numbers():
    y = apply_gain_(torch.ones(3, 2), torch.tensor([0.0, 2.0]), None)
    _, d_gain = gain_backward(torch.ones(3, 2), y, torch.tensor([0.0, 2.0]), None)
    assert torch.equal(d_gain, torch.tensor([0.0, 3.0]))
    layer = linear("linear", bias=False)
    with torch.no_grad():
        layer.original.weight[2] = 0
    layer.add("a", LoRA(rank=2, dora=True), "q", None)
    layer.active_adapters.configs["a"] = LoRA()
    layer.active_adapters.use("a")
    x = torch.randn(3, IN, **DOUBLE)
    assert torch.equal(layer.double()(x), layer.original(x))
    layer(x).sum().backward()
    assert all(w.grad.isfinite().all() for w in layer.adapters.parameters())


def dora(model: Any, targets: str = "all", **options: Any) -> Any:
    config = LoRA(rank=3, dora=True, targets=targets_named(model, targets), **options)
    return veneer.attach(model, config, seed=0)


def peft_gradients(model: Any) -> dict[str, Tensor]:
    return {
        name.removeprefix("base_model.model.")
        .replace(".default", "")
        .replace("lora_A.weight", "lora_A")
        .replace("lora_B.weight", "lora_B")
        .replace("lora_magnitude_vector.weight", "magnitude")
        .replace("lora_embedding_", "lora_"): weight.grad
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }


def our_gradients(model: Any) -> dict[str, Tensor]:
    return {
        name.replace(".adapters.default", ""): weight.grad
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }


def pair(base: str, _: Path) -> tuple[Any, Any]:
    return tiny(base), tiny(base)


def in_four_bits(_: str, place: Path) -> tuple[Any, Any]:
    """Return one base, quantized by us and by bitsandbytes, whose rows are long enough for it."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(**shape, vocab_size=VOCAB, num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(0)
    dense = LlamaForCausalLM(config)
    dense.save_pretrained(place / "base")
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(config)
    four = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    theirs = LlamaForCausalLM.from_pretrained(
        place / "base", quantization_config=four, dtype=torch.float32
    )
    ours = quantized_model(Source.of_model(skeleton, dense), 4, torch.float32)
    return ours, theirs


CASES = [
    ("llama", "all"),
    ("qwen2", "all"),
    ("gpt2", "all"),
    ("llama", "embedding"),
    ("gpt2", "everything"),
    ("nf4", "all"),
]


@pytest.mark.parametrize(("base", "targets"), CASES)
def test_logits_and_gradients_are_pefts(base, targets, tmp_path):
    """Linear with and without bias, Conv1D, embedding, and over a base in four bits."""
    ours, plain = (in_four_bits if base == "nf4" else pair)(base, tmp_path)
    exact = copy_of(veneer.merge(ours))  # dense
    shake(dora(ours, targets))
    veneer.save(ours, tmp_path / "adapter", format="peft")
    veneer.load(exact, tmp_path / "adapter").double()
    for name, weight in exact.named_parameters():
        weight.requires_grad_(".adapters." in name)
    # Training: in evaluation bitsandbytes computes in bfloat16 on a CPU, whatever the dtype.
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter", is_trainable=True).train()
    tokens, outputs = ids(), []
    for model in (ours, theirs, exact):
        with Float64() if model is exact else nullcontext():
            output = model(tokens, use_cache=False).logits
            F.cross_entropy(output[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        outputs.append(output.detach())
    assert_as_near(*outputs)
    gradients, peers, exactly = our_gradients(ours), peft_gradients(theirs), our_gradients(exact)
    assert gradients.keys() == peers.keys() == exactly.keys()
    assert sum("magnitude" in n for n in gradients) == sum("lora_A" in n for n in gradients)
    for name, gradient in exactly.items():
        assert_as_near(gradients[name], peers[name], gradient, name)


@pytest.mark.parametrize(("base", "targets"), [("qwen2", "all"), ("gpt2", "everything")])
def test_what_peft_wrote_is_read(base, targets, tmp_path):
    model = tiny(base)
    names = sorted({path.rpartition(".")[2] for path in paths(base, targets)})
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=names, use_dora=True)
    theirs = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "lora_magnitude" in name:
                weight.mul_(0.8 + 0.4 * torch.rand(weight.shape))
            elif "lora_" in name:
                weight.copy_(0.1 * torch.randn(weight.shape))
    expected = logits(theirs.eval())
    theirs.save_pretrained(tmp_path)
    ours = veneer.load(tiny(base), tmp_path)
    assert_as_near(logits(ours), expected, exact_logits(ours, ids()))


def paths(base: str, targets: str) -> list[str]:
    return [path for path, _ in lora_layers(dora(tiny(base), targets))]


class Seen(TorchDispatchMode):
    """Notes the shapes of all that is made, but for views of one tensor."""

    def __init__(self, known: Tensor) -> None:
        super().__init__()
        self.known = known.untyped_storage().data_ptr()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() != self.known:
            self.shapes.add(tuple(out.shape))
        return out


def test_nothing_as_large_as_the_weight_is_made():
    layer = linear("linear", bias=False)
    layer.add("a", LoRA(rank=2, dora=True), "q", None)
    layer.active_adapters.configs["a"] = LoRA()
    layer.active_adapters.use("a")
    layer.double()
    with Seen(layer.original.weight) as seen:
        layer(torch.randn(5, IN, **DOUBLE)).sum().backward()
    assert (OUT, 2) in seen.shapes  # W Aᵀ
    assert not {(OUT, IN), (IN, OUT)} & seen.shapes
    with Seen(layer.original.weight) as seen:
        layer.delta()
    assert (OUT, IN) in seen.shapes


def test_norms_of_a_resting_adapter_are_made_once_and_anew_when_it_changed(tmp_path, monkeypatch):
    model = shake(dora(tiny("llama")))
    veneer.save(model, tmp_path / "a")
    loaded = veneer.load(tiny("llama"), tmp_path / "a")
    made = []
    monkeypatch.setattr(layers, "updated_norms", lambda *x: made.append(x) or updated_norms(*x))
    for _ in range(3):
        logits(loaded)
    assert len(made) == len(list(lora_layers(loaded)))
    with torch.no_grad():
        for _, layer in lora_layers(loaded):
            layer.adapters["default"].lora_B.mul_(2)
    assert_as_near(logits(loaded), logits(veneer.merge(loaded)), exact_logits(loaded, ids()))
    # An optimizer's own way of writing, which versions do not count.
    for weight in (w for n, w in loaded.named_parameters() if "lora_" in n):
        weight.requires_grad_(True)
    for _ in veneer.train(loaded, examples([9, 14]), TrainConfig(steps=2, lr=0.1)):
        pass
    loaded.requires_grad_(False)
    assert_as_near(logits(loaded), logits(veneer.merge(loaded)), exact_logits(loaded, ids()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_leaves_the_norms_alone(dtype, monkeypatch):
    model = shake(dora(tiny("llama", dtype=dtype)))
    expected = logits(model)
    made: list[Tensor] = []

    def noted(*given: Any) -> Tensor:
        made.append(updated_norms(*given))
        return made[-1]

    monkeypatch.setattr(layers, "updated_norms", noted)
    plain = logits(model)
    count = len(made)
    with torch.autocast("cpu", torch.bfloat16):
        cast = logits(model)
    assert torch.equal(plain, expected)
    assert distance(cast.float(), expected.float()) < 0.05
    for one, other in zip(made[:count], made[count:], strict=True):
        assert one.dtype == other.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=1e-2, atol=0)


def test_a_row_of_zeros_in_a_mix_is_what_the_others_make_of_it():
    layer = linear("linear", bias=False)
    with torch.no_grad():
        layer.original.weight[0] = 0
    layer.add("a", LoRA(rank=2, dora=True), "q", None)
    layer.add("b", LoRA(rank=2), "q", None)
    for each in layer.adapters.values():
        torch.nn.init.normal_(each.lora_B)
    for weights in ({"a": 1.0, "b": 1.0}, {"a": 1.0}, {"a": 0.5, "b": -2.0}):
        layer.active_adapters.configs.update(dict.fromkeys(weights, LoRA()))
        layer.active_adapters.use(weights)
        x = torch.randn(5, IN, **DOUBLE)
        ours = layer(x)
        assert distance(ours, x @ (layer.dense_base_weight + layer.delta()).T) < 1e-5
