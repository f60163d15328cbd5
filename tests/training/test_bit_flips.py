"""Of a hundred flipped bits, wherever they are, each is seen: by whom, and when."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import veneer
from support.random_adapters import examples, shake, tokenizer
from support.tiny_models import tiny
from veneer.checksums import problems_of
from veneer.errors import AdapterError
from veneer.formats.merged import write_model
from veneer.formats.quantized import write_quantized
from veneer.models.load import load_base, open_base
from veneer.quant.mapped import are_mapped
from veneer.training import checkpoint
from veneer.training.frozen import FrozenBase, quantized_tensors

FLIPS = 100


def seen_in_file(file: Path, is_seen: Callable[[], bool], seed: int = 0) -> int:
    """Return how many of the flips in a file, one at a time, are seen."""
    whole, generator, seen = file.read_bytes(), random.Random(seed), 0
    for _ in range(FLIPS):
        data = bytearray(whole)
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        file.write_bytes(data)
        seen += is_seen()
    file.write_bytes(whole)
    assert not is_seen()
    return seen


def fails(read: Callable[[], object]) -> bool:
    try:
        read()
    except AdapterError:
        return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("format", ["native", "peft", "mlx"])
def test_in_an_adapter_when_it_is_loaded(format, tmp_path):
    veneer.save(shake(veneer.attach(tiny("llama"), veneer.LoRA(rank=2))), tmp_path, format=format)
    model = tiny("llama")
    (file,) = (f for f in tmp_path.iterdir() if f.suffix in (".pt", ".safetensors"))

    def load() -> None:
        veneer.load(model, tmp_path)
        veneer.detach(model)

    assert seen_in_file(file, lambda: fails(load)) == FLIPS


@pytest.mark.slow
@pytest.mark.parametrize("name", [checkpoint.STATE, checkpoint.TENSORS])
def test_in_a_checkpoint_when_a_run_goes_on(name, tmp_path):
    model = veneer.attach(tiny("llama"), veneer.LoRA(rank=2), seed=0)
    course = veneer.TrainConfig(steps=1)
    list(veneer.train(model, examples([9, 9]), course, directory=tmp_path))
    file = tmp_path / "step-000001" / name
    assert seen_in_file(file, lambda: fails(lambda: checkpoint.newest(tmp_path))) == FLIPS


@pytest.mark.slow
def test_in_a_quantized_base_when_it_is_verified(tmp_path):
    write_model(tiny("llama"), tokenizer(), tmp_path / "base")
    source, own, _ = open_base(str(tmp_path / "base"))
    list(write_quantized(source, own, tmp_path / "q", bits=4, name="base"))
    (file,) = (tmp_path / "q").glob("*.safetensors")
    assert seen_in_file(file, lambda: bool(problems_of(tmp_path / "q"))) == FLIPS


@pytest.mark.slow
def test_in_a_mapped_base_at_the_end_of_a_run(tmp_path):
    write_model(tiny("llama"), tokenizer(), tmp_path / "base")
    source, own, _ = open_base(str(tmp_path / "base"))
    list(write_quantized(source, own, tmp_path / "q", bits=4, name="base"))
    model = load_base(tmp_path / "q").model.requires_grad_(False)
    stored = [tensor for _, tensor in quantized_tensors(model)]
    mapped = [tensor for tensor, is_so in zip(stored, are_mapped(stored), strict=True) if is_so]
    assert mapped
    base, generator, seen = FrozenBase(model), random.Random(0), 0
    for _ in range(FLIPS):
        data = generator.choice(mapped).reshape(-1).view(torch.uint8)
        at, bit = generator.randrange(len(data)), 1 << generator.randrange(8)
        whole = data[at].item()
        data[at] ^= bit  # of this process's own copy of the page, which is private
        seen += bool(base.changed(all=True))
        data[at] = whole  # the page may be the file's again by now
    assert seen == FLIPS
    assert not base.changed(all=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_in_a_base_in_memory_at_the_end_of_a_run(dtype, tmp_path):
    write_model(tiny("llama", dtype=torch.bfloat16), tokenizer(), tmp_path)
    model = load_base(tmp_path, dtype=dtype).model.requires_grad_(False)
    base, generator = FrozenBase(model), random.Random(0)
    weights = [weight.detach().reshape(-1).view(torch.uint8) for weight in model.parameters()]
    assert base.bytes == sum(map(len, weights))
    seen = 0
    for _ in range(FLIPS):
        data = generator.choice(weights)
        at, bit = generator.randrange(len(data)), 1 << generator.randrange(8)
        data[at] ^= bit
        seen += bool(base.changed(all=True))
        data[at] ^= bit
    assert seen == FLIPS
    assert not base.changed(all=True)
