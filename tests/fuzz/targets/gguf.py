"""GGUF files: their headers, adapters, and bases' settings and vocabularies."""

import tempfile
from functools import cache
from pathlib import Path
from random import Random

import veneer
from support import mutated_files
from support.random_adapters import shake
from support.spoilt_files import write_gguf
from support.tiny_models import tiny
from veneer.formats.base_structure import BaseStructure
from veneer.formats.options import FormatOptions
from veneer.formats.table import detect
from veneer.formats.table import read as read_adapter
from veneer.models import gguf
from veneer.models.gguf_header import check_header, read_header

MODULES = (
    *("veneer.models.gguf_header", "veneer.models.gguf"),
    *("veneer.formats.gguf.adapter", "veneer.formats.gguf.mapping"),
)


@cache
def structure() -> BaseStructure:
    return BaseStructure(tiny("llama"))


@cache
def seeds() -> list[bytes]:
    with tempfile.TemporaryDirectory() as home:
        base, adapter = Path(home) / "base", Path(home) / "adapter.gguf"
        write_gguf(base)
        model = shake(veneer.attach(tiny("llama"), veneer.LoRA(rank=2, targets="qv"), seed=0))
        veneer.save(model, adapter, format="gguf")
        return [(base / "model.gguf").read_bytes(), adapter.read_bytes()]


@cache
def places_of(data: bytes) -> list[int]:
    with tempfile.TemporaryDirectory() as home:
        file = Path(home) / "good.gguf"
        file.write_bytes(data)
        return mutated_files.gguf_places(file)


def mutate(data: bytes, random: Random) -> bytes:
    good = random.choice(seeds())
    return mutated_files.gguf_file(good, random, places_of(good))


def read(data: bytes, place: Path) -> None:
    file = place / "model.gguf"
    file.write_bytes(data)
    check_header(file)
    read_header(file)
    if detect(file) is not None:
        read_adapter(file, FormatOptions(base=structure()))
    else:
        gguf.load_config(file)
