"""What the page says of an adapter's changes, beside the weights themselves."""

import pytest
import torch

import veneer
from support.random_adapters import shake
from support.server import BASE, call, running, scripted
from support.tiny_models import quantized, tiny
from veneer.models.fingerprint import base_parameters
from veneer.serve.engine import base_weights
from veneer.serve.engine.base_weights import BaseWeights
from veneer.serve.page.changed import changed


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3_moe"])
def test_each_change_is_that_of_the_merged_weight(architecture, tmp_path, monkeypatch):
    monkeypatch.setattr(base_weights, "NUMBERS_AT_ONCE", 100)  # of many pieces
    base = tiny(architecture).requires_grad_(False)
    model = shake(veneer.attach(tiny(architecture), veneer.LoRA(rank=2, targets="all")))
    veneer.save(model, tmp_path / "one")
    shown = changed(tmp_path / "one", 1, BaseWeights(base))
    merged, plain = (base_parameters(m) for m in (veneer.merge(model), base))
    expected = {}
    for path, weight in plain.items():
        if not torch.equal(weight, merged[path]):
            difference = (merged[path].double() - weight.double()).norm()
            expected[path] = (float(difference), float(weight.double().norm()))
    got = sorted((cell["change"], cell["weight"]) for cell in shown["cells"])
    assert got == [pytest.approx(pair, rel=1e-4) for pair in sorted(expected.values())]
    assert {cell["row"] for cell in shown["cells"]} == {*shown["rows"]}
    assert {cell["column"] for cell in shown["cells"]} == {*shown["columns"]}


@pytest.mark.parametrize(
    ("architecture", "path"),
    [
        ("llama", "model.layers.0.mlp.up_proj"),
        pytest.param("qwen3_moe", "model.layers.0.mlp.experts.down_proj", marks=pytest.mark.slow),
    ],
)
def test_a_quantized_weight_is_measured_as_it_computes(architecture, path):
    base = quantized(architecture, 4)
    module = base.get_submodule(path)
    weight = module.weight if architecture == "llama" else module.dense()
    weights = BaseWeights(base)
    assert weights.norm(path) == pytest.approx(float(weight.double().norm()), rel=1e-5)
    assert weights.norm("model.layers.99.mlp.up_proj") is None


def test_the_route(two):
    with running(scripted(two)) as server:
        status, _, body = call(server.url, "/api/adapters/law/layers")
        assert (status, body["columns"]) == (200, ["q_proj", "k_proj", "v_proj", "o_proj"])
        assert body["cells"][0]["weight"] is None  # an engine without weights
        for name, expected in ((BASE, 400), ("nobody", 404)):
            assert call(server.url, f"/api/adapters/{name}/layers")[0] == expected
