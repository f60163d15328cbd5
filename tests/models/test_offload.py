"""A base that is offloaded computes what it does in memory, to the bit."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import veneer
from support.random_adapters import examples, tokenizer
from support.thinned import thinned
from support.tiny_models import quantized, source, tiny
from veneer.data.packing import pack
from veneer.errors import AdapterError, ConfigError, ModelError
from veneer.formats.quantized import write_quantized
from veneer.fused.forward import choose_forward
from veneer.fused.recompute import Recompute
from veneer.models import block_buffers, offload
from veneer.models.block_buffers import passes_of, whole
from veneer.models.fingerprint import fingerprint
from veneer.models.load import load_base
from veneer.models.offload import offload_base
from veneer.quant.mapped import map_tensors
from veneer.quant.settings import Offload
from veneer.quant.stack import quantized_weights

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_tensors_too(monkeypatch):
    monkeypatch.setattr(block_buffers, "SMALL", 100)  # or most of so small models would stay


@dataclass(frozen=True)
class Case:
    architecture: str = "llama"
    bits: int | None = None
    what: Any = field(default_factory=lambda: veneer.LoRA(rank=3))
    recompute: Recompute = "none"

    def model(self, place: Offload, directory: Path) -> Any:
        model = quantized(self.architecture, self.bits) if self.bits else tiny(self.architecture)
        if place != "none":
            offload_base(model, place, CPU, directory=directory)
        veneer.attach(model, self.what, seed=0)
        generator = torch.Generator().manual_seed(1)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
        return model


CASES = {
    "lora": Case(),
    "full": Case(recompute="full"),
    "dora, NF4": Case(bits=4, what=veneer.LoRA(rank=3, dora=True)),
    "int8": Case(bits=8),
    "untied": Case("qwen2"),
    "conv1d": Case("gpt2"),
    "experts, NF4": Case("qwen3_moe", bits=4),
    "prefix": Case(what=veneer.Method("prefix", virtual_tokens=4)),
}


def passed(model: Any, recompute: Recompute) -> dict[str, Tensor]:
    """Return the losses and gradients of two passes, and logits."""
    rows = examples([9, 13, 5])
    forward, _ = choose_forward(model, rows, recompute=recompute)
    results = {}
    for turn in range(2):
        model.zero_grad()
        loss = forward(model, pack(rows, range(len(rows))))
        loss.backward()
        results[f"loss {turn}"] = loss.detach()
    results |= {n: w.grad.clone() for n, w in model.named_parameters() if w.grad is not None}
    with torch.no_grad():
        return results | {"logits": model(input_ids=torch.tensor([[3, 4, 5]])).logits}


@pytest.mark.parametrize(
    "name", thinned([*CASES], ("full", "dora, NF4", "conv1d", "experts, NF4").__contains__)
)
def test_losses_and_gradients_are_those_of_a_resident_base(name, tmp_path):
    case = CASES[name]
    expected = passed(case.model("none", tmp_path), case.recompute)
    for place in ("cpu", "disk"):
        model = case.model(place, tmp_path)
        results = passed(model, case.recompute)
        assert results.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(results[key], value), (place, key)
        assert not any(tmp_path.iterdir())


def test_two_blocks_at_most_are_whole(tmp_path, monkeypatch):
    model = Case().model("cpu", tmp_path)
    passes = passes_of(model)
    assert passes is not None
    sizes = []
    fill = offload.HostBuffer._fill

    def filled(buffer: offload.HostBuffer) -> Any:
        sizes.append(sum(x._whole.untyped_storage().nbytes() > 0 for x in passes.buffers))
        return fill(buffer)

    monkeypatch.setattr(offload.HostBuffer, "_fill", filled)
    rows = examples([9, 13, 5])
    forward, _ = choose_forward(model, rows)
    sizes.clear()
    forward(model, pack(rows, range(len(rows)))).backward()
    assert max(sizes) == 2
    assert len(sizes) >= 2 * len(passes.buffers) - 3


def test_what_is_mapped_is_read_from_its_own_file(tmp_path):
    save_file({"w": torch.arange(4096.0)}, tmp_path / "model.safetensors")
    mapped = map_tensors(tmp_path / "model.safetensors")["w"]
    reader = offload._Reader(offload._Copies(CPU))
    missing = tmp_path / "missing"
    buffer = offload.DiskBuffer([mapped], reader, missing)
    buffer.make_whole()
    assert torch.equal(buffer.views[0], mapped)
    with pytest.raises(ModelError, match="missing"):
        offload.DiskBuffer([mapped.clone()], reader, missing)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {"dtype": "float32"}),
        ("llama", {"dtype": "bf16"}),
        ("llama", {"dtype": "float32", "bits": 8}),
        ("qwen3_moe", {"dtype": "float32", "bits": 4}),
        ("llama-4", {}),
        ("qwen3_moe-4", {}),
    ],
)
def test_a_base_is_loaded_so(architecture, options, tmp_path):
    name, _, bits = architecture.partition("-")
    tiny(name).save_pretrained(tmp_path / name)
    if bits:
        options = {"bits": int(bits), "name": name}
        list(write_quantized(source(name), tokenizer(), tmp_path / architecture, **options))
        options = {"dtype": "float32"}
    load = partial(load_base, tmp_path / architecture, tokenizer=tokenizer(), **options)
    alone, base = load().model, load(offload="disk", offload_directory=tmp_path / "out").model
    assert passes_of(base) is not None
    assert fingerprint(base) == fingerprint(alone)
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    assert torch.equal(base(input_ids=ids).logits, alone(input_ids=ids).logits)


def test_what_is_in_the_memory_that_computes_is_not_offloaded_to_it(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    base = load_base(tmp_path, tokenizer=tokenizer(), device="cpu", offload="cpu")
    assert passes_of(base.model) is None
    assert "not offloaded: cpu computes in the memory" in base.notices[0]


def test_weights_are_whole_where_they_are_asked_for(tmp_path):
    expected = quantized_weights(quantized("llama", 4))
    model = offload_base(quantized("llama", 4), "disk", CPU, directory=tmp_path)
    with whole(model):
        for path, weight in quantized_weights(model).items():
            for name, tensor in weight.tensors().items():
                assert torch.equal(tensor, expected[path].tensors()[name]), (path, name)


def test_what_needs_the_whole_base_is_refused():
    model = offload_base(tiny("llama"), "cpu", CPU)
    with pytest.raises(ConfigError, match="offloaded"):
        veneer.attach(model, veneer.Method("full"))
    veneer.attach(model, veneer.LoRA(rank=2), seed=0)
    with pytest.raises(AdapterError, match="offloaded"):
        veneer.merge(model)


class Queue:
    """A stream of a device that is not there, which notes what it is asked for."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def record_event(self) -> Any:
        self.log.append(f"{self.name} records")
        return SimpleNamespace(name=self.name, synchronize=lambda: self.log.append("host waits"))

    def wait_event(self, event: Any) -> None:
        self.log.append(f"{self.name} waits for {event.name}")

    def __enter__(self) -> None:
        self.log.append(f"{self.name} takes")

    def __exit__(self, *_: object) -> None:
        self.log.append(f"{self.name} has taken")


@pytest.fixture
def log(monkeypatch):
    asked: list[str] = []
    empty = torch.empty
    monkeypatch.setattr(torch, "Stream", lambda device: Queue("copies", asked))
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: Queue("device", asked))
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **o: empty(*size, **o))
    return asked


def test_copies_wait_for_their_memory_and_the_device_for_copies(log):
    copies = offload._Copies(torch.device("cuda", 1))
    target, source = torch.zeros(8, dtype=torch.uint8), torch.ones(8, dtype=torch.uint8)
    copied = copies.begin(target, [offload._Piece(0, source)], copies.ready())
    assert torch.equal(target, source)
    copied.wait()
    copying = ["copies waits for device", "copies takes", "copies has taken", "copies records"]
    assert log == ["device records", *copying, "device waits for copies"]


def test_a_pinned_block_is_written_when_its_copy_is_done(log, tmp_path):
    save_file({str(n): torch.full((64,), n) for n in range(5)}, tmp_path / "model.safetensors")
    mapped = map_tensors(tmp_path / "model.safetensors")
    reader = offload._Reader(offload._Copies(torch.device("cuda", 1)))
    waits, blocks = [], []
    for n in range(5):
        target = torch.zeros(512, dtype=torch.uint8)
        source = mapped[str(n)].view(torch.uint8)
        reader.begin(target, [offload._Piece(0, source)]).wait()
        assert torch.equal(target.view(torch.int64), torch.full((64,), n))
        waits.append(log.count("host waits"))
        blocks.append(reader._blocks[-1].data_ptr())
    assert waits == [0, 0, 1, 2, 3]
    assert blocks[0] == blocks[2] == blocks[4] != blocks[1] == blocks[3]


@pytest.mark.parametrize("size", [1, 2**20, 2**20 + 1, 430_000_000])
def test_pinned_memory_is_cut_into_powers_of_two(size):
    lengths = offload._lengths(size)
    assert all(length & (length - 1) == 0 for length in lengths)
    assert lengths == sorted(lengths, reverse=True)
    assert size <= sum(lengths) < size + offload.SMALLEST_PIECE
