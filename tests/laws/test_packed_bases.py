"""The laws over bases whose linear layers are packed in 4 or 8 bits."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import veneer
from support.random_adapters import distance, examples, ids, logits, shake, snapshot, targets_named
from support.tiny_models import ARCHITECTURES, quantized, source, tiny
from veneer.adapter.active import ActiveAdapters
from veneer.adapter.layers import lora_layers
from veneer.adapter.linear import LoRALinear
from veneer.adapter.merge import rounded_away
from veneer.data.packing import pack
from veneer.fused.forward import choose_forward
from veneer.models.fingerprint import fingerprint, parameter_count
from veneer.models.quantize import quantize as quantize_weight
from veneer.models.quantize import quantized_model
from veneer.quant.weight import QuantizedLinear, QuantizedWeight, quantized_layers

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
BITS = [4, 8]
ROWS = examples([17, 5, 30, 12, 24])


def adapted(architecture: str, bits: int = 4, targets: str = "everything") -> Any:
    model = quantized(architecture, bits)
    config = veneer.LoRA(rank=2, targets=targets_named(model, targets))
    return shake(veneer.attach(model, config, seed=1))


def codes(model: Any) -> dict[str, Tensor]:
    return {
        f"{path.removesuffix('.original')}.{name}": tensor.clone()
        for path, layer in quantized_layers(model).items()
        for name, tensor in layer.quantized_weight.tensors().items()
    }


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_linear_layer_but_the_head_is_packed(architecture, bits):
    model, own = quantized(architecture, bits), tiny(architecture)
    assert parameter_count(model) == parameter_count(own)
    linear = {p for p, m in own.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    head = next(p for p, m in own.named_modules() if m is own.get_output_embeddings())
    # Falcon's linear layers are a class of their own.
    expected = linear - {head} or {
        p for p, m in own.named_modules() if "FalconLinear" in repr(type(m))
    }
    assert quantized_layers(model).keys() == expected
    near = 0.5 if bits == 4 else 0.1
    assert 0 < distance(logits(model), logits(own)) < near
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cpu"}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_law_1_a_fresh_adapter_is_an_identity(architecture, bits):
    model = quantized(architecture, bits)
    base = logits(model)
    config = veneer.LoRA(rank=3, targets=targets_named(model, "everything"))
    veneer.attach(model, config)
    assert torch.equal(logits(model), base)
    veneer.detach(model)
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_law_2_what_is_packed_does_not_change(architecture):
    model = adapted(architecture)
    before, rest = codes(model), snapshot(model)
    marks = fingerprint(model)
    course = veneer.TrainConfig(steps=3, lr=0.05, tokens_per_step=40, tokens_per_batch=25)
    losses = [e.loss for e in veneer.train(model, ROWS, course) if hasattr(e, "loss")]
    assert len(losses) == 3
    after, now = codes(model), snapshot(model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    changed = {name for name in now if not torch.equal(now[name], rest[name])}
    assert changed == {name for name in now if ".adapters." in name}
    assert fingerprint(model) == marks


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("acting", [{"a": 1.0}, {"a": 0.5, "b": -1.5}])
def test_law_3_a_layer_passes_gradcheck(acting, bits, bias):
    torch.manual_seed(0)
    weight = quantize_weight(torch.randn(4, 6), bits, torch.float32)
    original = QuantizedLinear(weight, nn.Linear(6, 4, bias=bias)).double()
    active_adapters = ActiveAdapters()
    layer = LoRALinear(original, active_adapters)
    for number, name in enumerate(acting, 2):
        layer.add(name, veneer.LoRA(rank=number), "x", None)
        active_adapters.configs[name] = veneer.LoRA(rank=number)
    layer.double()
    for part in layer.parameters():
        torch.nn.init.normal_(part)
    active_adapters.use(acting)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    trained = [part for part in layer.parameters() if part.requires_grad]
    assert len(trained) == 2 * len(acting)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *trained), fast_mode=False)


def loss_of(model: Any) -> Tensor:
    tokens = ids(3, 15)
    out = model(tokens, use_cache=False).logits
    return F.cross_entropy(out[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: w.grad.clone() for n, w in model.named_parameters() if w.grad is not None}


# With "attention", packed layers stand that no adapter lies on.
@pytest.mark.parametrize("targets", ["attention", "everything"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_law_3_gradients_are_those_over_the_unpacked_base(architecture, bits, targets):
    model = adapted(architecture, bits, targets)
    dense = shake(
        veneer.attach(
            veneer.merge(quantized(architecture, bits)),
            veneer.LoRA(rank=2, targets=targets_named(model, targets)),
            seed=1,
        )
    )
    assert not quantized_layers(dense)
    found, wanted = gradients(model, loss_of(model)), gradients(dense, loss_of(dense))
    assert found.keys() == wanted.keys() != set()
    for name in wanted:
        assert distance(found[name], wanted[name]) < 1e-5, name


@pytest.mark.parametrize(("architecture", "bits"), itertools.product(ARCHITECTURES, BITS))
def test_law_4_merged_equals_unmerged(architecture, bits):
    model = adapted(architecture, bits)
    before, said = codes(model), logits(model)
    plain = veneer.merge(model)
    assert not quantized_layers(plain)
    assert not list(lora_layers(plain))
    assert [type(m) for m in plain.modules()] == [type(m) for m in tiny(architecture).modules()]
    torch.testing.assert_close(logits(plain), said, **CLOSE)
    assert rounded_away(model, plain) < 1e-5
    assert "quantization_config" not in plain.config.to_dict()

    assert torch.equal(logits(model), said)
    veneer.detach(model)
    assert torch.equal(logits(model), logits(quantized(architecture, bits)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in codes(model).items())


def test_law_4_what_rounding_costs_is_told():
    model = quantized("llama", dtype=torch.bfloat16)
    shake(veneer.attach(model, veneer.LoRA(rank=2, targets="all"), seed=1), size=0.01)
    assert 0.1 < rounded_away(model, veneer.merge(model)) < 1


@pytest.mark.parametrize("format", ["native", "peft"])
@pytest.mark.parametrize("bits", BITS)
def test_law_5_what_is_saved_loads_over_the_packed_and_the_dense_base(bits, format, tmp_path):
    model = adapted("qwen2", bits, "all")
    veneer.save(model, tmp_path / "a", format=format)
    again = veneer.load(quantized("qwen2", bits), tmp_path / "a")
    assert torch.equal(logits(again), logits(model))
    # One fingerprint: an adapter that was trained over the packed base goes over the dense one.
    assert fingerprint(quantized("qwen2", bits)) == fingerprint(tiny("qwen2"))
    veneer.load(tiny("qwen2"), tmp_path / "a")
    if format == "native":
        with pytest.raises(veneer.AdapterError, match="another base"):
            veneer.load(tiny("qwen2", seed=5), tmp_path / "a")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_law_7_packed_padded_and_one_by_one(architecture, bits):
    model = adapted(architecture, bits)
    chosen, notices = choose_forward(model, ROWS)
    falls_back = architecture == "falcon"
    assert bool(notices) == falls_back
    assert bool(chosen.layers) == (architecture in ("llama", "mistral", "qwen2"))
    wanted = sum(chosen(model, pack(ROWS, [i])) for i in range(len(ROWS)))
    reference = gradients(model, wanted)
    ways = [replace(chosen, recompute=how) for how in ("none", "selective", "full")]
    for way in [*ways, replace(chosen, packed=False, layers=())]:
        loss = way(model, pack(ROWS, range(len(ROWS))))
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
        found = gradients(model, loss)
        assert found.keys() == reference.keys()
        assert all(distance(found[name], reference[name]) < 1e-5 for name in reference)


def test_a_packed_head():
    model = quantized("qwen2", head=True)
    assert "lm_head" in quantized_layers(model)
    veneer.attach(model, veneer.LoRA(rank=2, targets=["all", "lm_head"]), seed=1)
    chosen, notices = choose_forward(shake(model), ROWS)
    assert chosen.labelled_head
    assert not notices
    plain = veneer.merge(model)
    torch.testing.assert_close(logits(plain), logits(model), **CLOSE)
    with pytest.raises(veneer.ConfigError, match="embedding too"):
        quantized("llama", head=True)


@pytest.mark.parametrize(
    ("bits", "value", "says"),
    [
        (4, float("inf"), "has values that"),
        (8, float("nan"), "has values"),
        (8, 1e6, "be quantized"),
    ],
)
def test_weights_that_cannot_be_packed(bits, value, says):
    weights = source("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    weights.read(name)[3, 4] = value
    with pytest.raises(veneer.ModelError, match=rf"layers\.1\.mlp\.up_proj\.weight .*{says}"):
        quantized_model(weights, bits, torch.float32)


def test_a_quantized_head_is_dequantized_for_its_products_alone(monkeypatch):
    model = quantized("qwen2", head=True)
    veneer.attach(model, veneer.LoRA(rank=2), seed=1)
    chosen, _ = choose_forward(shake(model), ROWS)
    whole = []
    dequantize = QuantizedWeight.dequantize
    monkeypatch.setattr(
        QuantizedWeight, "dequantize", lambda self: whole.append(self) or dequantize(self)
    )
    chosen(model, pack(ROWS, range(len(ROWS)))).backward()
    assert not whole  # products take some rows at a time
