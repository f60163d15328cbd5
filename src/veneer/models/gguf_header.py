"""The header of a GGUF file, walked once with every length checked against the file's own size.

gguf's reader believes what a file says of itself, and would count to 2⁶⁴ for one that lies.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from gguf import GGMLQuantizationType, GGUFValueType

_FORMATS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
    GGUFValueType.BOOL: "<?",
}
MAX_DIMS = 4  # GGML_MAX_DIMS


def is_gguf(path: Path) -> bool:
    """Say whether a file starts as a GGUF file does, whatever its name."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == struct.pack("<I", gguf.GGUF_MAGIC)


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself: single values by key (no lists), and its tensors' names."""

    values: dict[str, Any]
    tensors: tuple[str, ...]


def read_header(path: Path) -> Header:
    """Return what a GGUF file says of itself, having walked the whole header.

    Raises ValueError where the file is no GGUF, is of a version or byte order that is not read, or
    says something that its own size contradicts: afterwards it is safe to read it with gguf.
    """
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            raise ValueError("the file is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Walk(data).header()


class _Walk:
    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.size = data, 0, len(data)

    def header(self) -> Header:
        if self.one("<I") != gguf.GGUF_MAGIC:
            raise ValueError("it does not start as a GGUF file does")
        version = self.one("<I")
        if version not in (2, 3):
            raise ValueError(f"GGUF version {version} is not read; 2 and 3, little-endian, are")
        tensors, values = self.one("<Q"), self.one("<Q")
        found: dict[str, Any] = {}
        for _ in range(values):
            key = self.text()
            if key in found:
                raise ValueError(f"it says {key!r} twice")
            found[key] = self.value(GGUFValueType(self.one("<I")))
        placed = [self.tensor() for _ in range(tensors)]
        step = found.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(step, int) or step < 1 or step & (step - 1):
            raise ValueError(f"its alignment is {step!r}, which is no power of two")
        start = -(-self.at // step) * step
        if any(start + end > self.size for _, end in placed):
            raise ValueError("it ends before its tensors do")
        single = {key: value for key, value in found.items() if value is not None}
        return Header(single, tuple(name for name, _ in placed))

    def tensor(self) -> tuple[str, int]:
        """Return a tensor's name and where it ends, counted from where the first starts."""
        name, dims = self.text(), self.one("<I")
        if not 1 <= dims <= MAX_DIMS:
            raise ValueError(f"{name} has {dims} dimensions")
        shape = [self.one("<Q") for _ in range(dims)]
        block, size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType(self.one("<I"))]
        if min(shape) < 1 or shape[0] % block:
            raise ValueError(f"{name} cannot have the shape {shape}")
        count = 1
        for length in shape:
            count *= length
        return name, int(self.one("<Q")) + count // block * size

    def value(self, kind: GGUFValueType) -> Any:
        """Return a value, or None for an array, which is passed over."""
        if kind == GGUFValueType.STRING:
            return self.text()
        if kind != GGUFValueType.ARRAY:
            return self.one(_FORMATS[kind])
        inner, length = GGUFValueType(self.one("<I")), self.one("<Q")
        if inner == GGUFValueType.ARRAY:
            raise ValueError("it has arrays of arrays, which nothing reads")
        if inner == GGUFValueType.STRING:
            for _ in range(length):
                self.skip(self.one("<Q"))
        else:
            self.skip(length * struct.calcsize(_FORMATS[inner]))
        return None

    def text(self) -> str:
        length = self.one("<Q")
        start = self.at
        self.skip(length)
        return self.data[start : self.at].decode("utf-8")

    def one(self, form: str) -> Any:
        start = self.at
        self.skip(struct.calcsize(form))
        return struct.unpack_from(form, self.data, start)[0]

    def skip(self, count: int) -> None:
        if self.at + count > self.size:
            raise ValueError("it ends in the middle of its header")
        self.at += count
