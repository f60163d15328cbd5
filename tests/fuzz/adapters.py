"""Directories of adapters, whose settings are foreign and whose weights are as they should be."""

from __future__ import annotations

import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import veneer
from support.random_adapters import shake
from support.tiny_models import tiny
from veneer.adapter.method import Method
from veneer.checksums import SUMS

# Kinds of adapters, by what only their settings have.
KINDS: dict[bytes, Any] = {
    b'_tokens"': Method("prefix", virtual_tokens=3),
    b'dora": true': veneer.LoRA(rank=2, targets="all", dora=True),
    b"": veneer.LoRA(rank=2, targets="qv", rank_pattern={r".*0\..*q_proj": 3}),
}
PLAIN = KINDS | {b"": veneer.LoRA(rank=2, targets="qv")}  # for formats with one rank for all layers


@cache
def _base() -> Any:
    return tiny("llama")


@cache
def _home() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fuzz-")


@cache
def good(format: Any, mark: bytes) -> Path:
    """Return a directory that holds a good adapter of a kind."""
    place = Path(_home().name) / f"{format}-{list(KINDS).index(mark)}"
    config = (PLAIN if format == "mlx" else KINDS)[mark]
    veneer.save(shake(veneer.attach(tiny("llama"), config, seed=0)), place, format=format)
    (place / SUMS).unlink()  # which refuses whatever is spoilt, before it is read
    return place


def settings(format: Any, name: str, marks: tuple[bytes, ...]) -> list[bytes]:
    """Return the file of settings, by its name, of a good adapter of each kind."""
    return [(good(format, mark) / name).read_bytes() for mark in marks]


def load(format: Any, name: str, marks: tuple[bytes, ...], data: bytes, place: Path) -> None:
    """Load the adapter whose file of settings holds `data`, beside the weights of its kind."""
    source = good(format, next((mark for mark in marks if mark in data), b""))
    spoilt = place / source.name
    if not spoilt.exists():
        shutil.copytree(source, spoilt)
    (spoilt / name).write_bytes(data)
    try:
        veneer.load(_base(), spoilt)
    finally:
        veneer.detach(_base())
