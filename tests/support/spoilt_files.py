"""Read files that are spoilt in many ways, in a process of their own with bounded memory.

python tests/support/spoilt_files.py KIND FIRST COUNT prints one line of JSON: how each seed ended,
the faults, and by how much memory grew. An end is "loaded", and then correctly, or the name of a
VeneerError.
"""

import json
import math
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import gguf
import numpy as np
import torch

import veneer
from support import mutated_files
from support.endings import ending, stop
from support.random_adapters import logits, same, shake, snapshot
from support.tiny_models import tiny
from veneer.adapter.layers import lora_layers
from veneer.checksums import SUMS
from veneer.cli.console import quieten_libraries
from veneer.files import read_tensors

ADDRESSES = 2**31  # bytes of address space beyond what the process has at the start
NUMPY = {"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1"}


@dataclass(frozen=True)
class Reader:
    """A kind of file: `write` makes a good folder, `spoil` damages its `file`, and `read` loads the
    folder and raises AssertionError if it was read wrongly."""

    write: Callable[[Path], None]
    file: str
    spoil: Callable[[bytes, Random], bytes]
    read: Callable[[Path], None]


@cache
def base() -> Any:
    return tiny("minigpt")


@cache
def base_state() -> dict[str, torch.Tensor]:
    return snapshot(base())


def write_adapter(place: Path, format: Any, **config: Any) -> None:
    usual = {"rank": 2, "targets": "qv", "rank_pattern": {r".*0\..*q_proj": 3}}
    model = shake(veneer.attach(tiny("minigpt"), veneer.LoRA(**(usual | config)), seed=0))
    veneer.save(model, place, format=format)
    (place / SUMS).unlink()  # which refuses whatever is spoilt, before it is read


def read_adapter(place: Path) -> None:
    """Load the adapter: refused, it must leave no trace; loaded, it must be what its files say."""
    model = base()
    try:
        veneer.load(model, place)
    except veneer.VeneerError:
        assert veneer.adapters(model) == {}
        assert same(snapshot(model), base_state())
        raise
    try:
        check_factors(model, place)
        logits(model)
    finally:
        veneer.detach(model)
    assert same(snapshot(model), base_state())


def check_factors(model: Any, place: Path) -> None:
    config = veneer.adapters(model)["default"]
    if (place / "adapter_config.json").is_file():
        stored = json.loads((place / "adapter_config.json").read_text())
        assert (config.rank, config.alpha) == (stored["r"], stored["lora_alpha"])
        tensors = safetensors_by_hand(place / "adapter_model.safetensors")
        factors = {
            f"base_model.model.{path}.{name}.weight": getattr(layer.adapters["default"], name)
            for path, layer in lora_layers(model)
            for name in ("lora_A", "lora_B")
        }
    else:
        stored = json.loads((place / "lora_config.json").read_text())
        assert (config.rank, config.alpha) == (stored["rank"], stored["alpha"])
        tensors = {n: t.numpy() for n, t in read_tensors(place / "lora_weights.pt").items()}
        factors = {
            f"{path}.{name}": getattr(layer.adapters["default"], name)
            for path, layer in lora_layers(model)
            for name in ("lora_A", "lora_B")
        }
    assert set(factors) == set(tensors)
    for name, factor in factors.items():
        assert np.array_equal(factor.detach().numpy(), tensors[name].astype("f4")), name
    for _, layer in lora_layers(model):
        adapter = layer.adapters["default"]
        assert math.isfinite(adapter.scaling)
        assert adapter.scaling > 0


def safetensors_by_hand(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a safetensors file, by a reader that shares no code with ours."""
    raw = path.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:begin])
    header.pop("__metadata__", None)
    arrays = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        data = raw[begin + first : begin + last]
        if entry["dtype"] == "BF16":
            wide = np.frombuffer(data, "<u2").astype("u4") << 16
            arrays[name] = wide.view("f4").reshape(entry["shape"])
        else:
            arrays[name] = np.frombuffer(data, NUMPY[entry["dtype"]]).reshape(entry["shape"])
    return arrays


def write_gguf(place: Path) -> None:
    """Write a LLaMA of two layers, as llama.cpp stores one."""
    place.mkdir()
    writer = gguf.GGUFWriter(place / "model.gguf", "llama")
    width, inner, heads, layers = 32, 64, 2, 2
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(chr(0x100 + i) for i in range(5)),
        *map(chr, range(33, 127)),
        "ab",
    ]
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // heads)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * (len(tokens) - 3)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), width), "output_norm": (width,)}
    for block in range(layers):
        shapes |= {
            f"blk.{block}.{name}": shape
            for name, shape in {
                "attn_q": (width, width),
                "attn_k": (width // 2, width),
                "attn_v": (width // 2, width),
                "attn_output": (width, width),
                "ffn_gate": (inner, width),
                "ffn_up": (inner, width),
                "ffn_down": (width, inner),
                "attn_norm": (width,),
                "ffn_norm": (width,),
            }.items()
        }
    for name, shape in shapes.items():
        tensor = random.normal(0, 0.1, shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0 if "ffn_up" in name else None
        data = gguf.quantize(tensor, kind) if kind else tensor
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@cache
def places_of(size: int) -> list[int]:
    with tempfile.TemporaryDirectory() as home:
        write_gguf(Path(home) / "good")
        return mutated_files.gguf_places(Path(home) / "good" / "model.gguf")


def spoil_gguf(content: bytes, random: Random) -> bytes:
    return mutated_files.gguf_file(content, random, places_of(len(content)))


def read_gguf(place: Path) -> None:
    path = place / "model.gguf"
    loaded = veneer.load_base(path, dtype="float32")
    model = loaded.model
    norm = next(t for t in gguf.GGUFReader(path).tensors if t.name == "output_norm.weight")
    data = path.read_bytes()[norm.data_offset :][: 4 * model.config.hidden_size]
    assert model.model.norm.weight.detach().numpy().tobytes() == data
    output = logits(model, torch.zeros(1, 2, dtype=torch.long))
    assert output.shape == (1, 2, model.config.vocab_size)


READERS = {
    "safetensors": Reader(
        partial(write_adapter, format="peft"),
        "adapter_model.safetensors",
        mutated_files.safetensors,
        read_adapter,
    ),
    "adapter_config": Reader(
        partial(write_adapter, format="peft"),
        "adapter_config.json",
        mutated_files.json_text,
        read_adapter,
    ),
    "lora_config": Reader(
        partial(write_adapter, format="native"),
        "lora_config.json",
        mutated_files.json_text,
        read_adapter,
    ),
    "lora_weights": Reader(
        partial(write_adapter, format="native"),
        "lora_weights.pt",
        mutated_files.any_bytes,
        read_adapter,
    ),
    "gguf": Reader(write_gguf, "model.gguf", spoil_gguf, read_gguf),
}


def main(kind: str, first: int, count: int) -> None:
    quieten_libraries()
    reader = READERS[kind]
    signal.signal(signal.SIGPROF, stop)
    with tempfile.TemporaryDirectory() as home:
        good = Path(home) / "good"
        reader.write(good)
        content = (good / reader.file).read_bytes()
        for _ in range(2):
            reader.read(good)  # it is right as it is, and all that is needed is imported
        spoilt = Path(home) / "spoilt"
        shutil.copytree(good, spoilt)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + ADDRESSES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        ends: Counter[str] = Counter()
        faults = []
        for seed in range(first, first + count):
            (spoilt / reader.file).write_bytes(reader.spoil(content, Random(seed)))
            end, wrong = ending(partial(reader.read, spoilt))
            ends[end] += 1
            if wrong:
                faults.append({"seed": seed, "end": end, "wrong": wrong[-3000:]})
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    print(json.dumps({"ends": ends, "faults": faults, "grown": grown}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
