"""The certificate of a merge: its figures against float64, and which merges it refuses."""

import math

import pytest
import torch
from torch.nn import functional as F

import veneer
from support.random_adapters import logits, same, shake, snapshot, tokenizer, with_new_tokens
from support.tiny_models import quantized, tiny
from veneer.adapter.certify import LARGEST_LOST_EFFECT
from veneer.adapter.merge import rounded_away
from veneer.data.probe import probe_rows


def adapted(size: float = 0.1, *, dtype: torch.dtype = torch.float32, bits: int | None = None):
    model = quantized("llama", bits, dtype=dtype) if bits else tiny("llama", dtype=dtype)
    return shake(veneer.attach(model, veneer.LoRA(rank=2, targets="all"), seed=0), size=size)


def certified(model):
    return veneer.certify(model, veneer.merge(model), tokenizer())


def test_figures_are_those_of_float64():
    model = adapted(0.02, dtype=torch.bfloat16)
    plain = veneer.merge(model)
    report = veneer.certify(model, plain, tokenizer())
    base = tiny("llama", dtype=torch.bfloat16)
    rows = [torch.tensor([row]) for row in probe_rows(tokenizer(), context=64)]
    assert report.tokens == sum(row.numel() for row in rows) > 500
    outputs = [
        torch.cat([logits(x, row)[0] for row in rows]).double() for x in (model, plain, base)
    ]
    ours, merged, alone = (output.log_softmax(-1) for output in outputs)
    assert report.logit_difference == pytest.approx(float((outputs[0] - outputs[1]).abs().max()))
    for figure, other in ((report.divergence, merged), (report.effect, alone)):
        expected = F.kl_div(other, ours, log_target=True, reduction="sum") / report.tokens
        assert figure == pytest.approx(float(expected), rel=1e-6)

    paths = [layer.path for layer in report.layers]
    assert len(paths) == len(set(paths)) == 14
    for rounding in report.layers:
        layer = model.get_submodule(rounding.path)
        adapter, weight = layer.adapters["default"], layer.original.weight.double()
        delta = adapter.scaling * (adapter.lora_B.double() @ adapter.lora_A.double()).detach()
        error = plain.get_submodule(rounding.path).weight.double() - (weight + delta)
        assert rounding.change == pytest.approx(float(delta.norm()), rel=1e-5)
        assert rounding.error == pytest.approx(float(error.norm()), rel=1e-4)
        assert rounding.lost == pytest.approx(float(error.norm() / delta.norm()), rel=1e-4)
        assert rounding.error_in_float32 < 1e-4 * rounding.error
    assert report.lost == rounded_away(model, plain)
    assert report.worst == max(report.layers, key=lambda layer: layer.lost)


def test_certifying_leaves_the_model_as_it_was():
    model = adapted()
    veneer.attach(model, veneer.LoRA(rank=1), name="idle", seed=1)
    veneer.use(model, {"default": 0.5})
    model.train()
    before, output = snapshot(model), logits(model.eval())
    model.train()
    plain = veneer.merge(model)
    veneer.certify(model, plain, tokenizer())
    assert model.training
    assert veneer.in_use(model) == {"default": 0.5}
    assert same(snapshot(model), before)
    assert torch.equal(logits(model.eval()), output)


def test_float32_keeps_what_bf16_rounds_away():
    small = 2e-3
    model = adapted(small, dtype=torch.bfloat16)
    report = certified(model)
    assert report.dtype == "bfloat16"
    assert report.lost > 0.9
    with pytest.raises(veneer.MergeError) as refused:
        report.check()
    message = str(refused.value)
    assert f"takes {report.lost:.1%} of the adapter's change" in message
    assert "float32" in message
    assert "keep the adapter" in message

    report = certified(adapted(small))
    assert report.lost < 1e-3
    assert report.divergence < LARGEST_LOST_EFFECT * report.effect
    assert report.problems() == []
    report.check()


def test_an_ordinary_change_passes_in_bf16():
    report = certified(adapted(0.2, dtype=torch.bfloat16))
    assert 0 < report.lost < 0.1
    assert 0 < report.divergence < 0.1 * report.effect
    report.check()


def test_fresh_and_idle_adapters_lose_nothing():
    for which in ("default", None):
        model = veneer.attach(tiny("qwen2", dtype=torch.bfloat16), veneer.LoRA(rank=2), seed=0)
        if which is None:
            shake(model)
        veneer.use(model, which)
        report = certified(model)
        assert (report.lost, report.divergence, report.effect) == (0, 0, 0)
        assert report.logit_difference == 0
        report.check()


@pytest.mark.parametrize("wrong", ["weights", "nan"])
def test_a_model_that_is_not_the_merged_one_is_refused(wrong):
    model = adapted()
    plain = veneer.merge(model)
    with torch.no_grad():
        weight = plain.model.layers[0].mlp.up_proj.weight
        weight.mul_(1.5) if wrong == "weights" else weight[0, 0].fill_(torch.nan)
    report = veneer.certify(model, plain, tokenizer())
    with pytest.raises(veneer.MergeError):
        report.check()
    assert math.isinf(report.divergence) == (wrong == "nan")
    assert math.isinf(report.logit_difference) == (wrong == "nan")
    assert report.worst.path == "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("bits", [4, 8])
def test_quantizing_again_is_measured(bits):
    model = adapted(0.03, bits=bits)
    plain = veneer.merge(model)
    report = veneer.certify(model, plain, tokenizer())
    report.check()
    assert report.lost < 1e-4
    # What `veneer quantize` would make of the merged model.
    error = change = 0.0
    for rounding in report.layers:
        layer, merged = (x.get_submodule(rounding.path) for x in (model, plain))
        again = layer.base_weight.quantize(merged.weight, torch.float32).dequantize()
        error += float((again - layer.dense_base_weight - layer.delta()).square().sum())
        change += float(layer.delta().square().sum())
        merged.weight = torch.nn.Parameter(again, requires_grad=False)
    assert report.lost_requantized == pytest.approx((error / change) ** 0.5, rel=1e-3)
    assert report.lost_requantized > (0.9 if bits == 4 else 0.2)
    divergence = veneer.certify(model, plain, tokenizer()).divergence
    assert report.divergence_requantized == pytest.approx(divergence, rel=1e-3)
    assert report.divergence_requantized > 100 * report.divergence
    assert report.lost_packed_again == report.lost_requantized
    assert report.divergence_packed_again == report.divergence_requantized
    report = certified(adapted())
    assert report.lost_requantized is report.divergence_requantized is None


def test_new_tokens_are_no_reason_to_refuse():
    model, tokens = tiny("llama"), tokenizer()
    with_new_tokens(model, tokens)
    shake(veneer.attach(model, veneer.LoRA(rank=2), seed=0))
    report = veneer.certify(model, veneer.merge(model), tokens)
    assert 0 < report.effect < math.inf
    report.check()


@pytest.mark.parametrize("options", [{"dora": True}, {"init": "pissa"}, {"rslora": True}])
def test_every_kind_of_adapter(options):
    model = tiny("llama")
    shake(veneer.attach(model, veneer.LoRA(rank=2, targets="all", **options), seed=0))
    report = certified(model)
    assert report.lost < 1e-5
    assert report.effect > 0.01
    report.check()


def test_the_rows_of_a_file_are_the_probe(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"text": "one two three"}\n{"prompt": "Well?", "completion": "No."}\n' * 20)
    rows = probe_rows(tokenizer(), path)
    assert len(rows) == 16
    model = adapted()
    report = veneer.certify(model, veneer.merge(model), tokenizer(), probe=path)
    assert report.tokens == sum(map(len, rows))
    for missing in (tmp_path / "none.jsonl", tmp_path / "own.xyz"):
        with pytest.raises(veneer.DataError):
            veneer.certify(model, veneer.merge(model), tokenizer(), probe=missing)


def test_the_probe_fits_the_context():
    assert max(map(len, probe_rows(tokenizer(), context=9))) == 9
    assert len(probe_rows(tokenizer())) == 16
