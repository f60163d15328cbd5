"""Quantized bases on disk: what is written, and what an earlier try left."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import veneer
from support.random_adapters import distance, logits, tokenizer
from support.tiny_models import quantized, source, tiny
from veneer.checksums import SUMS, problems_of
from veneer.formats.quantized import Shard, write_quantized
from veneer.models.fingerprint import fingerprint
from veneer.models.load import load_base
from veneer.models.quantize import quantized_model
from veneer.models.source import Source
from veneer.quant.weight import quantized_layers

DTYPE = {"dtype": "float32"}
ARCHITECTURES = ("llama", "gpt2", "minigpt")  # Linear, Conv1D, and our own


def write(architecture: str, out: Path, bits: int = 4, **options: Any) -> list[Shard]:
    weights, tokens = source(architecture), tokenizer()
    return list(write_quantized(weights, tokens, out, bits=bits, name="a base", **options))


def values(model: Any) -> dict[str, torch.Tensor]:
    return {path: layer.weight for path, layer in quantized_layers(model).items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() != set() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_written_is_what_is_quantized_in_memory(architecture, bits, tmp_path):
    shards = write(architecture, tmp_path / "q", bits)
    base = load_base(tmp_path / "q", **DTYPE)
    memory = quantized(architecture, bits)
    # Quantized for bfloat16 there and for float32 here: the codes are the same.
    stored = {
        p: m.quantized_weight.tensors()["weight"] for p, m in quantized_layers(memory).items()
    }
    loaded = {
        p: m.quantized_weight.tensors()["weight"] for p, m in quantized_layers(base.model).items()
    }
    assert equal(loaded, stored)
    assert equal(values(base.model), values(memory))
    assert fingerprint(base.model) == fingerprint(tiny(architecture))
    # The rest is kept in 16 bits.
    assert distance(logits(base.model), logits(memory)) < 0.02
    assert {layer.path for shard in shards for layer in shard.layers} == set(loaded)
    assert base.tokenizer.get_vocab().items() >= tokenizer().get_vocab().items()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_errors_that_are_reported(architecture, bits, tmp_path):
    (shard,) = write(architecture, tmp_path / "q", bits)
    own, loaded = tiny(architecture), values(load_base(tmp_path / "q", **DTYPE).model)
    for layer in shard.layers:
        weight = own.get_submodule(layer.path).weight.detach()
        weight = weight.T if architecture == "gpt2" else weight
        error = float((loaded[layer.path] - weight).norm() / weight.norm())
        assert layer.error == pytest.approx(error, rel=0.1)  # ours is of what bfloat16 makes of it
        assert (layer.out, layer.in_) == tuple(weight.shape)
    report = json.loads((tmp_path / "q" / "veneer.json").read_text())
    assert len(report["layers"]) == len(shard.layers)
    assert (report["base"], report["bits"]) == ("a base", bits)


def test_a_file_holds_no_more_than_was_asked_for(tmp_path):
    shards = write("llama", tmp_path / "q", shard_bytes=4000)
    assert len(shards) > 3
    whole = sum(shard.bytes for shard in shards)
    assert whole == sum(file.stat().st_size for file in (tmp_path / "q").glob("*.safetensors"))
    assert equal(values(load_base(tmp_path / "q", **DTYPE).model), values(quantized("llama")))
    index = json.loads((tmp_path / "q" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {
        file.name for file in (tmp_path / "q").glob("*.safetensors")
    }


def test_it_goes_on_after_the_last_whole_file(tmp_path):
    write("llama", tmp_path / "whole", shard_bytes=4000)
    weights, read = source("llama"), []

    def counted(name: str) -> torch.Tensor:
        read.append(name)
        return weights.read(name)

    def start() -> Any:
        slow = Source(weights.skeleton, weights.names, counted, weights.identity)
        options = {"bits": 4, "name": "a base", "shard_bytes": 4000}
        return write_quantized(slow, tokenizer(), tmp_path / "q", **options)

    shards = start()
    first = [next(shards), next(shards)]
    shards.close()  # as if it had been killed
    assert not (tmp_path / "q" / "config.json").exists()
    with pytest.raises(veneer.ModelError, match="holds no model"):
        load_base(tmp_path / "q")
    read.clear()
    again = list(start())
    assert [shard.kept for shard in again] == [True, True] + [False] * (len(again) - 2)
    assert [shard.layers for shard in again[:2]] == [shard.layers for shard in first]
    assert len(read) < len(weights.names) + 2  # of kept files one weight is looked at
    for file in (tmp_path / "whole").iterdir():
        other = tmp_path / "q" / file.name
        if file.suffix == ".safetensors":  # whose own notes come in any order
            assert equal(load_file(file), load_file(other)), file.name
        elif file.name != SUMS:
            assert file.read_bytes() == other.read_bytes(), file.name
    assert problems_of(tmp_path / "q") == {}


@pytest.mark.parametrize("change", [{"bits": 8}, {"seed": 5}, {"shard_bytes": 9000}])
def test_files_of_another_base_or_order_are_not_kept(change, tmp_path):
    out, options = tmp_path / "q", {"bits": 4, "name": "a base", "shard_bytes": 4000}
    shards = write_quantized(source("llama"), tokenizer(), out, **options)
    next(shards), next(shards)
    shards.close()
    seed = change.get("seed", 0)
    options |= {key: value for key, value in change.items() if key != "seed"}
    weights = source("llama", seed=seed)
    assert not any(shard.kept for shard in write_quantized(weights, tokenizer(), out, **options))
    # And what is left of them is not read.
    model = load_base(out, **DTYPE).model
    expected = quantized_model(source("llama", seed=seed), options["bits"], torch.float32)
    assert equal(values(model), values(expected))
    assert fingerprint(model) == fingerprint(tiny("llama", seed=seed))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    there = {file.name for file in out.glob("*.safetensors")}
    assert there == set(index["weight_map"].values())


def test_what_a_killed_process_leaves_is_no_hindrance(tmp_path):
    out = tmp_path / "q"
    out.mkdir()
    leftover = out / ".model-00001-of-00001.safetensors.k3x1"
    leftover.write_bytes(b"half a file")
    write("llama", out)
    assert not leftover.exists()
    assert equal(values(load_base(out, **DTYPE).model), values(quantized("llama")))


@pytest.mark.parametrize("what", ["model", "other", "adapter", "shard", "index", "file"])
def test_what_stands_there_is_never_touched(what, tmp_path):
    out = tmp_path / "q"
    if what == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        name = {
            "model": "config.json",
            "adapter": "adapter_model.safetensors",
            "shard": "model-00001-of-00002.safetensors",
            "index": "model.safetensors.index.json",
        }.get(what, "notes")
        (out / name).write_text("mine")
    with pytest.raises(veneer.VeneerError, match=r"holds (a model already|other things)"):
        write("llama", out)
    kept = out if what == "file" else next(out.iterdir())
    assert kept.read_text() == "mine"


def test_all_is_on_the_disk_before_the_file_that_makes_it_a_model(tmp_path, monkeypatch):
    out, on_disk, replace = tmp_path / "out", set[int](), os.replace

    def watch(source: Any, target: Any) -> None:
        if Path(target).name == "config.json":
            assert [path.name for path in out.iterdir() if path.stat().st_ino not in on_disk] == []
            on_disk.clear()
        replace(source, target)

    monkeypatch.setattr(os, "fsync", lambda handle: on_disk.add(os.fstat(handle).st_ino))
    monkeypatch.setattr(os, "replace", watch)
    write("llama", out)
    assert on_disk == {out.stat().st_ino}  # with the new name, and nothing else
