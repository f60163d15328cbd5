"""Check that a GGUF file holds what its header says, before anything reads the rest.

gguf's own reader believes every count: an array of 2⁶⁰ numbers in a file of a kilobyte keeps it
busy for ever and takes all memory. The rules are those of llama.cpp's reader (ggml's gguf.cpp).
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from veneer.errors import ModelError

FORMATS = {  # of struct, for kinds of a fixed size
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
DIMENSIONS = 4  # GGML_MAX_DIMS
ALIGNMENT = "general.alignment"
# Settings by which readers allocate memory before they look at weights. No WIDTH is larger than the
# widest tensor, and there are no more blocks than tensors.
WIDTHS = (
    *("embedding_length", "feed_forward_length", "vocab_size", "rope.dimension_count"),
    *("attention.head_count", "attention.head_count_kv"),
    *("attention.key_length", "attention.value_length"),
    *("expert_count", "expert_feed_forward_length", "expert_shared_feed_forward_length"),
    *("ssm.inner_size", "ssm.state_size", "ssm.conv_kernel", "ssm.time_step_rank"),
)
COUNTS = ("block_count", "decoder_block_count")


@dataclass(frozen=True)
class Header:
    """A GGUF file's single values by key, without lists, and its tensors' names and sizes.

    sizes: how many numbers each tensor has, and in how many bytes.
    """

    values: Mapping[str, Any]
    sizes: Mapping[str, tuple[int, int]]

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(self.sizes)


def is_gguf(path: Path) -> bool:
    """Return whether a file begins as a GGUF file does; its name does not matter."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def read_header(path: Path) -> Header:
    """Return a GGUF file's header, all of which is checked.

    Raises ValueError for counts, lengths, kinds, shapes and offsets that are impossible or beyond
    the end of the file.
    """
    status = path.stat()
    return _read(path, status.st_size, status.st_mtime_ns)


def check_header(path: Path) -> None:
    """Raise ModelError where `read_header` raises ValueError."""
    try:
        read_header(path)
    except (OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
        raise ModelError(
            f"{path} cannot be read as a GGUF file ({error}). It must be a whole .gguf file."
        ) from error


@lru_cache(maxsize=16)  # a changed file has another size or time
def _read(path: Path, size: int, changed: int) -> Header:
    if size < 24:
        raise ValueError("it ends within its header")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _Walk(data).header()


class _Walk:
    """One walk through a header, from its first byte on."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.order = data, 0, "<"
        self.values: dict[str, Any] = {}

    def header(self) -> Header:
        if self.data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self.at = 4
        if self.number("I") & 0xFFFF == 0:
            self.order = ">"  # written on a machine of the other byte order
        tensors, pairs = self.count(), self.count()
        keys: set[str] = set()
        for _ in range(pairs):
            key = self.text()
            if key in keys:
                raise ValueError(f"the key {key[:100]!r} is there twice")
            keys.add(key)
            self.value(key, self.kind())
        shapes = {}
        for _ in range(tensors):
            name = self.text()
            if name in shapes:
                raise ValueError(f"the tensor {name[:100]!r} is there twice")
            shapes[name] = self.tensor(name)
        self.places(shapes)
        self.widths(shapes)
        sizes = {name: (math.prod(shape), size) for name, (shape, size, _) in shapes.items()}
        return Header(self.values, sizes)

    def scalar(self, form: str) -> Any:
        """Read a value of a fixed size."""
        begin, self.at = self.at, self.at + struct.calcsize(form)
        if self.at > len(self.data):
            raise ValueError("it ends within its header")
        return struct.unpack_from(self.order + form, self.data, begin)[0]

    def number(self, form: str) -> int:
        """Read a whole number."""
        return int(self.scalar(form))

    def skip(self, size: int) -> int:
        """Skip `size` bytes and return their offset."""
        begin, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise ValueError(f"{size:,} bytes at {begin:,} would end beyond the file's end")
        return begin

    def count(self, least: int = 1) -> int:
        """Read how many items follow, each of at least `least` bytes."""
        number = self.number("Q")
        if number * least > len(self.data) - self.at:
            raise ValueError(f"{number:,} items at {self.at:,} would end beyond the file's end")
        return number

    def text(self) -> str:
        """Read a length and a text of that length."""
        begin = self.skip(self.count())
        return str(self.data[begin : self.at], "utf-8")

    def kind(self) -> GGUFValueType:
        return GGUFValueType(self.number("I"))

    def value(self, key: str, kind: GGUFValueType, depth: int = 0) -> None:
        """Read a value, and keep it unless it is in an array."""
        if kind in FORMATS:
            self.values[key] = self.scalar(FORMATS[kind])
        elif kind == GGUFValueType.STRING and depth:
            self.skip(self.count())
        elif kind == GGUFValueType.STRING:
            self.values[key] = self.text()
        elif depth:
            raise ValueError(f"{key[:100]!r} has arrays within an array")
        else:
            self.array(key, self.kind())

    def array(self, key: str, kind: GGUFValueType) -> None:
        if kind in FORMATS:
            size = struct.calcsize(FORMATS[kind])
            self.skip(self.count(size) * size)
            return
        for _ in range(self.count(8)):
            self.value(key, kind, depth=1)

    def tensor(self, name: str) -> tuple[tuple[int, ...], int, int]:
        """Read a tensor's shape, size in bytes, and offset from where the tensors begin."""
        dimensions = self.number("I")
        if not 1 <= dimensions <= DIMENSIONS:
            raise ValueError(f"{name[:100]!r} has {dimensions:,} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(self.number("I"))]
        if min(shape) < 1:
            raise ValueError(f"{name[:100]!r} cannot have the shape {shape}")
        if shape[0] % block:
            raise ValueError(f"{name[:100]!r} has rows of {shape[0]:,}, which are no whole blocks")
        return shape, math.prod(shape) // block * size, self.number("Q")

    def places(self, tensors: dict[str, tuple[tuple[int, ...], int, int]]) -> None:
        """Check that the tensors follow one another within the file."""
        step = self.values.get(ALIGNMENT, 32)
        if not isinstance(step, int) or step < 1 or step & (step - 1):
            raise ValueError(f"{ALIGNMENT} is {step!r}, and no power of two")
        begin = -(self.at // -step) * step
        place = end = 0
        for name, (_, size, offset) in tensors.items():
            if offset != place:
                raise ValueError(f"{name[:100]!r} is at {offset:,}, and not at {place:,}")
            end = place + size
            place = -(end // -step) * step
        if tensors and begin + end > len(self.data):
            raise ValueError(f"its tensors take {end:,} bytes, and {len(self.data):,} are there")

    def widths(self, tensors: dict[str, tuple[tuple[int, ...], int, int]]) -> None:
        """Check that the settings describe nothing larger than the tensors."""
        widest = max((max(shape) for shape, _, _ in tensors.values()), default=0)
        limits = dict.fromkeys(WIDTHS, widest) | dict.fromkeys(COUNTS, len(tensors))
        whole = {key: value for key, value in self.values.items() if isinstance(value, int)}
        own = {key.partition(".")[2]: number for key, number in whole.items()}
        for name, limit in limits.items():
            if not 0 <= own.get(name, 0) <= limit:
                raise ValueError(f"{name} is {own[name]:,}, but the tensors allow {limit:,}")
        heads, length = (own.get(f"attention.{name}", 0) for name in ("head_count", "key_length"))
        if heads * length > widest:
            raise ValueError(f"{heads:,} heads of {length:,} are more than the tensors have")
