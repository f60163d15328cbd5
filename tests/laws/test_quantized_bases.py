"""Which weights of a base in 4 or 8 bits are quantized, and what a quantized head changes. The laws
themselves are tried over such bases in their own files."""

import pytest
import torch

import veneer
from support.closeness import assert_as_near
from support.plain import exact_logits
from support.random_adapters import distance, examples, ids, logits, shake
from support.tiny_models import ARCHITECTURES, quantized, source, tiny
from veneer.data.packing import pack
from veneer.fused.forward import choose_forward
from veneer.generate.runners.choice import runner_for
from veneer.generate.runners.runner import Chunk
from veneer.models.fingerprint import fingerprint, parameter_count
from veneer.models.quantize import quantized_model
from veneer.quant.weight import QuantizedWeight, quantized_layers
from veneer.training.events import Step

BITS = [4, 8]
ROWS = examples([17, 5, 30, 12, 24])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_linear_layer_but_the_head_is_quantized(architecture, bits):
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
def test_pefts_files_belong_to_the_base_too(bits, tmp_path):
    model = shake(veneer.attach(quantized("qwen2", bits), veneer.LoRA(rank=2, targets="all")))
    veneer.save(model, tmp_path, format="peft")
    again = veneer.load(quantized("qwen2", bits), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert fingerprint(quantized("qwen2", bits)) == fingerprint(tiny("qwen2"))
    veneer.load(tiny("qwen2"), tmp_path)


def test_a_quantized_head():
    model = quantized("qwen2", head=True)
    assert "lm_head" in quantized_layers(model)
    veneer.attach(model, veneer.LoRA(rank=2, targets=["all", "lm_head"]), seed=1)
    chosen, notices = choose_forward(shake(model), ROWS)
    assert chosen.head
    assert not notices
    merged = veneer.merge(model)
    assert_as_near(logits(merged), logits(model), exact_logits(model, ids()))
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
def test_weights_that_cannot_be_quantized(bits, value, says):
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


def test_no_whole_weight_is_dequantized(monkeypatch):
    """The head of a large vocabulary takes gigabytes: to ask for its shape or dtype makes none."""
    model, whole = quantized("qwen2", head=True), []
    dequantize = QuantizedWeight.dequantize

    def noted(weight: QuantizedWeight) -> torch.Tensor:
        whole.append(tuple(weight.shape))
        return dequantize(weight)

    monkeypatch.setattr(QuantizedWeight, "dequantize", noted)
    runner, _ = runner_for(model, 1, 64)
    assert runner.step([Chunk(0, [1, 2, 3], 0, None, logits=1)]).isfinite().all()
    jobs = dict.fromkeys(["one", "other"], veneer.Job(ROWS, veneer.TrainConfig(steps=1)))
    for name in jobs:
        veneer.attach(model, veneer.LoRA(rank=2, targets=["all", "lm_head"]), name=name)
    ends = [event for _, event in veneer.train_many(model, jobs) if isinstance(event, Step)]
    assert len(ends) == 2
    assert whole == []
