"""Factors that start from the weight or its gradient: the base stays, and adapters compose."""

import copy
from typing import Any

import peft
import pytest
import torch

import veneer
from support.closeness import assert_as_near
from support.plain import exact_logits
from support.random_adapters import (
    distance,
    examples,
    ids,
    logits,
    same,
    snapshot,
    targets_named,
    tokenizer,
)
from support.tiny_models import quantized, tiny
from veneer.adapter.config import LoRA
from veneer.adapter.layers import lora_layers
from veneer.adapter.linear import LoRALinear
from veneer.adapter.start import start_from_gradients
from veneer.checksums import SUMS
from veneer.formats.merged import write_model
from veneer.lowrank.initial import from_gradient, leading, nearest_factors
from veneer.quant.weight import quantized_layers
from veneer.training.config import TrainConfig

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
ROWS = examples([9, 14, 6, 11])
STARTS = ["pissa", "olora", "lora_ga"]


def attached(model: Any, init: str, **options: Any) -> Any:
    config = LoRA(**({"rank": 3, "targets": "all", "init": init} | options))
    return veneer.attach(model, config, seed=0)


def trained(model: Any, steps: int = 3, **options: Any) -> Any:
    for _ in veneer.train(model, ROWS, TrainConfig(steps=steps, lr=1e-2, **options)):
        pass
    return model


def adapters_by_path(model: Any) -> dict[str, Any]:
    return {path: layer.adapters["default"] for path, layer in lora_layers(model)}


def theirs(init: str) -> dict[str, Any]:
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules="all-linear", init_lora_weights=init, lora_dropout=0.0
    )
    model = peft.get_peft_model(tiny("llama"), config)
    return {
        path.removeprefix("base_model.model."): module
        for path, module in model.named_modules()
        if hasattr(module, "lora_A") and "default" in module.lora_A
    }


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_factors_are_pefts(init):
    model = attached(tiny("llama"), init)
    expected = theirs(init)
    for path, adapter in adapters_by_path(model).items():
        A, B = (getattr(expected[path], f"lora_{x}")["default"].weight for x in "AB")
        assert distance(adapter.lora_B @ adapter.lora_A, B @ A) < 1e-3, path
        if init == "olora":
            torch.testing.assert_close(adapter.lora_A, A, **CLOSE)
            torch.testing.assert_close(adapter.lora_B, B, **CLOSE)
    assert adapters_by_path(model).keys() <= expected.keys()


@pytest.mark.parametrize("rank", [1, 4, 12])
def test_leading_directions_are_those_of_the_whole_decomposition(rank):
    torch.manual_seed(0)
    W = torch.randn(40, 28)
    U, S, V = leading(W, rank, torch.Generator().manual_seed(1))
    right = torch.linalg.svd(W, full_matrices=False)
    torch.testing.assert_close(S, right.S[:rank], rtol=1e-3, atol=1e-3)
    best = right.U[:, :rank] * right.S[:rank] @ right.Vh[:rank]
    assert distance(U * S @ V.T, best) < 2e-2
    A, B = nearest_factors(W, rank, 0.5, torch.Generator().manual_seed(1))
    assert distance(0.5 * B @ A, best) < 2e-2


# Each two of the three meet in all their values.
@pytest.mark.parametrize(
    ("init", "dora", "rslora"),
    [(init, dora, dora ^ (init == "olora")) for init in STARTS for dora in (True, False)],
)
def test_in_peft_it_is_plain_lora(init, dora, rslora, tmp_path):
    options = {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 5.0}}
    model = attached(tiny("qwen2"), init, dora=dora, rslora=rslora, alpha=4.0, **options)
    expected, exact = logits(trained(model)), exact_logits(model, ids())
    veneer.save(model, tmp_path / "peft", format="peft")
    plain = veneer.load(tiny("qwen2"), tmp_path / "peft")
    assert_as_near(logits(plain), expected, exact)
    assert veneer.adapters(plain)["default"].rank == 6
    other = peft.PeftModel.from_pretrained(tiny("qwen2"), tmp_path / "peft").eval()
    assert_as_near(expected, logits(other), exact)


def test_an_embedding_beside_it_is_exported_at_the_same_rank(tmp_path):
    model = tiny("qwen2")
    attached(model, "olora", targets=targets_named(model, "everything"))
    expected, exact = logits(trained(model)), exact_logits(model, ids())
    veneer.save(model, tmp_path / "peft", format="peft")
    other = peft.PeftModel.from_pretrained(tiny("qwen2"), tmp_path / "peft").eval()
    assert_as_near(expected, logits(other), exact)


def test_a_start_that_is_missing_is_named(tmp_path):
    veneer.save(trained(attached(tiny("llama"), "pissa")), tmp_path / "a")
    path = tmp_path / "a" / "lora_weights.pt"
    tensors = torch.load(path)
    key = next(key for key in tensors if key.endswith("start_A"))
    torch.save({k: v for k, v in tensors.items() if k != key}, path)
    (tmp_path / "a" / SUMS).unlink()
    with pytest.raises(veneer.AdapterError, match="where it started"):
        veneer.load(tiny("llama"), tmp_path / "a")


def test_lora_ga_starts_at_the_gradient_of_the_weight():
    model = attached(tiny("llama"), "lora_ga")
    tokens, plain = ids(), tiny("llama")
    start_from_gradients(model, lambda: model(tokens, labels=tokens, use_cache=False).loss)
    plain(tokens, labels=tokens, use_cache=False).loss.backward()
    for path, adapter in adapters_by_path(model).items():
        gradient = plain.get_submodule(path).weight.grad
        A, B = from_gradient(gradient, 3, adapter.scaling)
        assert distance(adapter.lora_B @ adapter.lora_A, B @ A) < 1e-3, path
        U, _, Vh = torch.linalg.svd(gradient)
        first, second = (
            adapter.lora_B / adapter.lora_B.norm(dim=0),
            adapter.lora_A / adapter.lora_A.norm(),
        )
        assert (U[:, :3].T @ first).norm() > 0.98 * 3**0.5
        assert (Vh[3:6] @ second.T).norm() > 0.9 * second.norm()
    assert torch.equal(logits(model), logits(plain))
    assert all(weight.grad is None for weight in model.parameters())


def test_loftq_makes_up_for_what_quantizing_took(tmp_path):
    dense = tiny("llama")
    write_model(dense, tokenizer(), tmp_path / "base")
    base = veneer.load_base(tmp_path / "base", dtype="float32", bits=4)
    before = {path: layer.weight for path, layer in quantized_layers(base.model).items()}
    again = veneer.load_base(tmp_path / "base", dtype="float32", bits=4).model
    assert torch.equal(
        logits(attached(base.model, "loftq", rank=4)), logits(attached(again, "loftq", rank=4))
    )
    for path, layer in lora_layers(base.model):
        assert isinstance(layer, LoRALinear)
        lost = dense.get_submodule(path).weight - before[path]
        assert torch.equal(layer.dense_base_weight, before[path])
        S = torch.linalg.svdvals(lost)
        left = (lost - layer.delta()).norm()
        assert left <= 1.01 * S[4:].norm(), path
    tokens = ids()
    quantized_alone = copy.deepcopy(base.model)
    veneer.use(quantized_alone, None)
    expected = logits(dense, tokens)
    alone = distance(logits(quantized_alone, tokens), expected)
    assert distance(logits(base.model, tokens), expected) < alone


def test_what_cannot_start_is_refused():
    with pytest.raises(veneer.ConfigError, match="give bits"):
        attached(tiny("llama"), "loftq")
    for init, rank in (("pissa", 33), ("olora", 17), ("lora_ga", 9)):
        with pytest.raises(veneer.ConfigError, match="directions"):
            attached(tiny("llama"), init, rank=rank)


def test_what_cannot_start_leaves_nothing_behind():
    for model, init, rank in ((tiny("llama"), "pissa", 33), (quantized("llama"), "loftq", 4)):
        before, expected = snapshot(model), logits(model)
        with pytest.raises(veneer.ConfigError):
            attached(model, init, rank=rank)
        assert same(snapshot(model), before)
        assert not list(lora_layers(model))
        assert torch.equal(logits(model), expected)
        assert torch.equal(logits(veneer.attach(model, LoRA(rank=2))), expected)
