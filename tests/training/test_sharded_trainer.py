"""Adapters over a model that FSDP2 shards: what is saved, and what accelerate cannot do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import veneer
from support.kinds import KINDS, Kind
from support.random_adapters import logits
from support.tiny_models import quantized, tiny
from veneer.adapter.layers import lora_layers
from veneer.formats.capture import capture
from veneer.models.blocks import decoder_layers
from veneer.training import with_accelerate
from veneer.training.with_accelerate import check_sharding


def kind_of(name: str) -> Kind:
    return next(kind for kind in KINDS if str(kind) == name)


@pytest.fixture
def world(tmp_path) -> Iterator[None]:
    """A process group of this process alone: its pieces of a weight are all of it, and DTensors."""
    rendezvous = f"file://{tmp_path / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(model: Any) -> Any:
    for block in decoder_layers(model):
        fully_shard(block)
    return fully_shard(model)


@pytest.mark.parametrize(
    "name",
    ["dora, llama", "pissa, mistral", "new tokens, llama", "saved as one, llama", "prefix, llama"],
)
def test_a_sharded_adapter_is_saved_whole(world, name):
    kind = kind_of(name)
    model = sharded(kind.shaken())
    loss = model(**kind.inputs(), labels=kind.inputs()["input_ids"]).loss
    loss.backward()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert all(isinstance(weight, DTensor) for weight in trained)
    torch.optim.SGD(trained, lr=0.1).step()
    veneer.save(model, "adapter")
    state = capture(model)
    everything = [*state.tensors.values(), *state.modules_to_save.values()]
    assert not any(isinstance(tensor, DTensor) for tensor in everything)
    fresh = kind.base()
    veneer.load(fresh, "adapter")  # which is refused over a base of another fingerprint
    assert torch.equal(kind.says(fresh), kind.says(model))
    assert not torch.equal(kind.says(fresh), kind.says(kind.shaken()))


def test_the_weight_of_a_sharded_layer_is_its_own(world):
    model = sharded(kind_of("dora, llama").shaken())
    for path, layer in lora_layers(model):
        if path.endswith("q_proj"):
            assert layer.weight is layer.original.weight


def test_a_compiled_kernel_takes_no_sharded_weight(world):
    model = sharded(kind_of("dora, llama").shaken())
    layer = next(layer for path, layer in lora_layers(model) if path.endswith("q_proj"))
    with pytest.raises(ValueError, match="in other processes"):
        layer.low_rank_update(layer.active(), torch.float32)


def plugin(**options: Any) -> SimpleNamespace:
    usual = {"fsdp_version": 2, "cpu_ram_efficient_loading": False, "ignored_modules": None}
    return SimpleNamespace(**usual | options)


@pytest.mark.parametrize(
    ("name", "options", "problem"),
    [
        ("lora, llama", {"fsdp_version": 1}, "set fsdp_version: 2"),
        (
            "lora, llama",
            {"ignored_modules": r".*\.adapters\..*"},
            r"gradients of .*lora_A and \d+ more; change fsdp_ignored_modules",
        ),
        ("pissa, mistral", {"cpu_ram_efficient_loading": True}, "what the adapter started from"),
        ("saved head, qwen2", {"cpu_ram_efficient_loading": True}, "modules to save would"),
        (
            "new tokens, llama",
            {"cpu_ram_efficient_loading": True},
            "the tie of an adapted embedding and head would be lost on the meta device; set "
            "fsdp_cpu_ram_efficient_loading: false",
        ),
        (
            "dora, qwen2, 4 bits",
            {"cpu_ram_efficient_loading": True, "ignored_modules": ".*"},
            "quantized weights would be lost.*; FSDP2 would not add up",
        ),
    ],
)
def test_what_accelerate_cannot_do_is_refused(monkeypatch, name, options, problem):
    state = SimpleNamespace(fsdp_plugin=plugin(**options))
    monkeypatch.setattr(with_accelerate, "AcceleratorState", lambda: state)
    with pytest.raises(veneer.ConfigError, match=problem):
        check_sharding(kind_of(name).fresh())


def test_deepspeed_is_refused_where_it_shards_weights(monkeypatch):
    monkeypatch.setattr(with_accelerate, "AcceleratorState", SimpleNamespace)
    monkeypatch.setattr(with_accelerate, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(veneer.ConfigError, match="use stage 2, or FSDP2"):
        check_sharding(tiny("llama"))


def test_quantized_weights_stay_whole_and_that_is_said(monkeypatch):
    state = SimpleNamespace(fsdp_plugin=plugin())
    monkeypatch.setattr(with_accelerate, "AcceleratorState", lambda: state)
    with pytest.warns(veneer.VeneerWarning, match="each process holds all of them"):
        check_sharding(quantized("llama"))


@pytest.mark.parametrize("architecture", ["llama", "qwen2_moe"])
def test_quantized_weights_are_not_lost_on_the_meta_device(architecture):
    model = quantized(architecture)
    before = logits(model)
    with pytest.raises(veneer.ModelError, match=re.escape("fsdp_cpu_ram_efficient_loading: false")):
        model.to("meta")
    assert before.isfinite().all()
