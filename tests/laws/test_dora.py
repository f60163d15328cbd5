"""DoRA: the paper's formula, PEFT's numbers, and no dense product."""

import itertools
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
from support.random_adapters import distance, examples, ids, logits, shake, targets_named
from support.tiny_models import ARCHITECTURES, VOCAB, quantized, tiny
from veneer.adapter import layers
from veneer.adapter.active import ActiveAdapters
from veneer.adapter.adapter import Adapter
from veneer.adapter.config import LoRA
from veneer.adapter.embedding import LoRAEmbedding
from veneer.adapter.layers import AdaptedLayer, lora_layers
from veneer.adapter.linear import LoRALinear
from veneer.kernels import gain, gated
from veneer.kernels.gain import apply_gain_, gain_backward, swiglu_gain_backward
from veneer.kernels.gated import swiglu_backward
from veneer.kernels.native import kernel
from veneer.lowrank import formula
from veneer.lowrank.formula import updated_norms
from veneer.models.quantize import quantized_model
from veneer.models.source import Source
from veneer.quant.nf4 import NF4
from veneer.quant.weight import QuantizedLinear
from veneer.training.config import TrainConfig

IN, OUT = 64, 8
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
DOUBLE = {"dtype": torch.float64}
MIXES = [{"a": 1.0}, {"a": 0.5}, {"a": 1.0, "b": 1.0, "plain": 1.0}, {"a": -0.3, "plain": 2.0}]


def adapter(W: Tensor, rank: int, *, plain: bool, dropout: float = 0.0) -> Adapter:
    A, B = torch.randn(rank, W.shape[1], **DOUBLE), torch.randn(W.shape[0], rank, **DOUBLE)
    lengths = (W + 0.5 * rank * B @ A).norm(dim=1)
    magnitude = None if plain else lengths * (0.5 + torch.rand(W.shape[0], **DOUBLE))
    return Adapter(A, B, scaling=0.5 * rank, dropout=dropout, magnitude=magnitude)


def without_kernels(compiled: bool, monkeypatch: Any) -> None:
    """Leave only the formulas in torch, unless `compiled`."""
    for room in () if compiled else (formula, gain, gated):
        monkeypatch.setattr(room, "kernel", lambda name, like: None)


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


def change(layer: AdaptedLayer) -> Tensor:
    """Return Σ w ΔW by the formula, through which gradients go but for the norms."""
    W = layer.by_outputs(layer.dense_base_weight).double()
    total = torch.zeros_like(W)
    for part, weight in layer.active():
        V = W + part.scaling * part.lora_B @ part.lora_A
        if part.magnitude is None:
            total = total + weight * (V - W)
        else:
            scales = part.magnitude / V.norm(dim=1).detach()
            total = total + weight * (scales[:, None] * V - W)
    return total


KINDS = list(itertools.product(["linear", "conv1d", "nf4"], [True, False], MIXES))


@pytest.mark.parametrize(("kind", "bias", "weights"), KINDS)
def test_linear_layers_equal_the_formula_both_ways(kind, bias, weights):
    layer = with_adapters(linear(kind, bias=bias), weights)
    dtype = torch.float32 if kind == "nf4" else torch.float64
    x = torch.randn(2, 3, IN, dtype=dtype, requires_grad=True)
    W = layer.dense_base_weight.double() + change(layer)
    wanted = F.linear(x.double(), W, layer.original.bias)
    found = layer(x)
    inputs = [x, *(weight for weight in layer.parameters() if weight.requires_grad)]
    dy = torch.randn(2, 3, OUT, dtype=dtype)
    got = torch.autograd.grad(found, inputs, dy)
    right = torch.autograd.grad(wanted, inputs, dy.double())
    for a, b in zip((found, *got), (wanted, *right), strict=True):
        assert distance(a.double(), b) < (1e-5 if kind == "nf4" else 1e-12)


@pytest.mark.parametrize("weights", MIXES)
def test_embeddings_equal_the_formula_both_ways(weights):
    torch.manual_seed(0)
    layer = with_adapters(LoRAEmbedding(nn.Embedding(20, 6, **DOUBLE), ActiveAdapters()), weights)
    tokens = torch.randint(20, (3, 4))
    wanted = F.embedding(tokens, layer.dense_base_weight + change(layer).T)
    found = layer(tokens)
    inputs = [weight for weight in layer.parameters() if weight.requires_grad]
    dy = torch.randn(3, 4, 6, **DOUBLE)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, dy), torch.autograd.grad(wanted, inputs, dy)
    )


@pytest.mark.parametrize("weights", MIXES)
def test_dropped_inputs_concern_the_low_rank_part_alone(weights):
    layer = with_adapters(linear("linear", bias=True), weights, dropout=0.5)
    x = torch.randn(4000, IN, **DOUBLE)
    mean = torch.stack([layer.train()(x[:4]) for _ in range(4000)]).mean(0)
    assert distance(mean, layer.eval()(x[:4])) < 0.05
    off = dict.fromkeys(weights, 0.0)
    layer.active_adapters.use(off)
    torch.testing.assert_close(layer.train()(x), layer.original(x))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 3, 40])
def test_norms_of_the_sum_without_the_sum(rank, dtype, compiled, monkeypatch):
    without_kernels(compiled, monkeypatch)
    torch.manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    W, A, B = (torch.randn(*s).to(dtype) for s in ((50, 70), (rank, 70), (50, rank)))
    squares = W.to(wide).square().sum(1)
    found = updated_norms(squares, W @ A.T, A.to(wide), B.to(wide), 0.3)
    wanted = (W.double() + 0.3 * B.double() @ A.double()).norm(dim=1)
    near = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(found.double(), wanted, rtol=near, atol=0)
    nothing = torch.zeros(50, rank, dtype=wide)
    fresh = updated_norms(squares, W @ A.T, A.to(wide), nothing, 0.3)
    torch.testing.assert_close(fresh, squares.sqrt(), rtol=1e-6, atol=0)
    none = updated_norms(0 * squares, 0 * W @ A.T, A.to(wide), nothing, 0.3)
    assert torch.equal(none, torch.ones_like(none))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 130, 700])
@pytest.mark.parametrize("columns", [1, 63, 200])
def test_gain_kernels_equal_torch(rows, columns, bias, dtype, compiled, monkeypatch):
    without_kernels(compiled, monkeypatch)
    torch.manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    z, dy = (torch.randn(rows, columns).to(dtype) for _ in range(2))
    b = torch.randn(columns).to(dtype) if bias else None
    gains = 1 + torch.rand(columns).to(wide)
    z64 = z.double().requires_grad_()
    g64 = gains.double().requires_grad_()
    offset = 0 if b is None else b.double()
    wanted = (z64 - offset) * g64 + offset
    y = apply_gain_(z.clone(), gains, b)
    dz, d_gain = gain_backward(dy, y, gains, b)
    again = dy.clone()
    in_place, _ = gain_backward(again, y, gains, b, in_place=True)
    assert torch.equal(in_place, dz)
    if kernel("gain_backward", y) is not None and compiled:
        assert in_place is again
    right = torch.autograd.grad(wanted, (z64, g64), dy.double())
    near = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for a, c in zip((y, dz, d_gain), (wanted, *right), strict=True):
        assert distance(a.double(), c) < near


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("rows", [1, 130, 700])
def test_gains_within_swiglu_equal_both_apart(rows, biased, dtype, compiled, monkeypatch):
    without_kernels(compiled, monkeypatch)
    torch.manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    dy, gate, up = (torch.randn(rows, 63).to(dtype) for _ in range(3))
    gains = tuple(0.5 + torch.rand(63).to(wide) for _ in range(2))
    biases = tuple(torch.randn(63).to(dtype) if b else None for b in biased)
    dz, d_gains, inner = swiglu_gain_backward(dy, gate, up, gains, biases)
    *d_inputs, wanted = swiglu_backward(dy.double(), gate.double(), up.double())
    near = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert distance(inner.double(), wanted) < near
    for i, (d, y) in enumerate(zip(d_inputs, (gate, up), strict=True)):
        bias = None if biases[i] is None else biases[i].double()
        right = gain_backward(d, y.double(), gains[i].double(), bias)
        assert distance(dz[i].double(), right[0]) < near
        assert distance(d_gains[i].double(), right[1]) < near


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", ["attention", "everything"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_fresh_one_changes_no_bit(architecture, targets, dtype):
    base = logits(tiny(architecture, dtype=dtype))
    model = tiny(architecture, dtype=dtype)
    fresh = logits(dora(model, targets))
    assert torch.equal(fresh, base)
    assert torch.equal(logits(dora(quantized("llama"))), logits(quantized("llama")))


@pytest.mark.parametrize("targets", ["all", "everything"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merged_equals_unmerged(architecture, targets):
    model = shake(dora(tiny(architecture), targets))
    said = logits(model)
    assert distance(said, logits(tiny(architecture))) > 1e-2
    torch.testing.assert_close(logits(veneer.merge(model)), said, rtol=1e-5, atol=1e-5)


def test_merged_equals_unmerged_over_four_bits_and_in_a_mix():
    model = dora(quantized("llama"))
    veneer.attach(model, LoRA(rank=2, targets="mlp"), name="other")
    veneer.use(model, {"default": 0.7, "other": -1.3})
    shake(model)
    torch.testing.assert_close(logits(veneer.merge(model)), logits(model), rtol=1e-4, atol=1e-4)


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
    """Return one base, packed by us and by bitsandbytes, whose rows are long enough for it."""
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
    shake(dora(ours, targets))
    veneer.save(ours, tmp_path / "adapter", format="peft")
    # Training: in evaluation bitsandbytes computes in bfloat16 on a CPU, whatever it is told.
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter", is_trainable=True).train()
    tokens, said = ids(), []
    for model in (ours, theirs):
        output = model(tokens, labels=tokens, use_cache=False)
        said.append(output.logits.detach())
        output.loss.backward()
    torch.testing.assert_close(*said, rtol=1e-5, atol=1e-5)
    found, wanted = our_gradients(ours), peft_gradients(theirs)
    assert found.keys() == wanted.keys()
    assert sum("magnitude" in name for name in found) == sum("lora_A" in name for name in found)
    for name, gradient in wanted.items():
        assert distance(found[name], gradient) < 1e-5, name


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
    said = logits(theirs.eval())
    theirs.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(veneer.load(tiny(base), tmp_path)), said, **CLOSE)


def paths(base: str, targets: str) -> list[str]:
    return [path for path, _ in lora_layers(dora(tiny(base), targets))]


@pytest.mark.parametrize("format", ["native", "peft"])
@pytest.mark.parametrize("targets", ["all", "everything"])
def test_what_is_saved_loads(targets, format, tmp_path):
    model = shake(dora(tiny("qwen2"), targets))
    veneer.save(model, tmp_path / "a", format=format)
    again = veneer.load(tiny("qwen2"), tmp_path / "a")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)
    assert veneer.adapters(again)["default"].dora


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


def test_norms_of_a_frozen_adapter_are_made_once_and_anew_when_it_changed(tmp_path, monkeypatch):
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
    assert distance(logits(loaded), logits(veneer.merge(loaded))) < 1e-5
    # An optimizer's own way of writing, which versions do not count.
    for weight in (w for n, w in loaded.named_parameters() if "lora_" in n):
        weight.requires_grad_(True)
    for _ in veneer.train(loaded, examples([9, 14]), TrainConfig(steps=2, lr=0.1)):
        pass
    loaded.requires_grad_(False)
    assert distance(logits(loaded), logits(veneer.merge(loaded))) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_leaves_the_norms_alone(dtype, monkeypatch):
    model = shake(dora(tiny("llama", dtype=dtype)))
    wanted = logits(model)
    made: list[Tensor] = []

    def noted(*given: Any) -> Tensor:
        made.append(updated_norms(*given))
        return made[-1]

    monkeypatch.setattr(layers, "updated_norms", noted)
    plain = logits(model)
    count = len(made)
    with torch.autocast("cpu", torch.bfloat16):
        cast = logits(model)
    assert torch.equal(plain, wanted)
    assert distance(cast.float(), wanted.float()) < 0.05
    for one, other in zip(made[:count], made[count:], strict=True):
        assert one.dtype == other.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=1e-2, atol=0)


def test_a_row_of_zeros_in_a_mix_is_what_the_others_make_of_it():
    layer = linear("linear", bias=False)
    with torch.no_grad():
        layer.original.weight[0] = 0
    layer.add("a", LoRA(rank=2, dora=True), "q", None)
    layer.add("b", LoRA(rank=2), "q", None)
    for part in layer.adapters.values():
        torch.nn.init.normal_(part.lora_B)
    for weights in ({"a": 1.0, "b": 1.0}, {"a": 1.0}, {"a": 0.5, "b": -2.0}):
        layer.active_adapters.configs.update(dict.fromkeys(weights, LoRA()))
        layer.active_adapters.use(weights)
        x = torch.randn(5, IN, **DOUBLE)
        found = layer(x)
        assert distance(found, x @ (layer.dense_base_weight + layer.delta()).T) < 1e-5
