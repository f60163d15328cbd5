"""Whether a GGUF file holds what its header promises, before anybody reads it on that word.

gguf's own reader believes every count: an array of 2⁶⁰ numbers in a file of a kilobyte keeps it
busy for good, and takes all memory. The rules are those of llama.cpp's reader (ggml's gguf.cpp).
"""

from __future__ import annotations

import math
import mmap
import struct
from functools import lru_cache
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from veneer.errors import ModelError

SIZES = {  # bytes of a value of each kind that has a fixed size
    GGUFValueType.UINT8: 1,
    GGUFValueType.INT8: 1,
    GGUFValueType.BOOL: 1,
    GGUFValueType.UINT16: 2,
    GGUFValueType.INT16: 2,
    GGUFValueType.UINT32: 4,
    GGUFValueType.INT32: 4,
    GGUFValueType.FLOAT32: 4,
    GGUFValueType.UINT64: 8,
    GGUFValueType.INT64: 8,
    GGUFValueType.FLOAT64: 8,
}
WHOLE = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.UINT16: "H",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
}
DIMENSIONS = 4  # GGML_MAX_DIMS
ALIGNMENT = "general.alignment"
# Settings by which memory is taken before any weight is looked at. None is larger than the widest
# of the tensors, and there are no more blocks than tensors.
WIDTHS = (
    "embedding_length",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
    "expert_count",
    "expert_feed_forward_length",
    "expert_shared_feed_forward_length",
    "ssm.inner_size",
    "ssm.state_size",
    "ssm.conv_kernel",
    "ssm.time_step_rank",
)
COUNTS = ("block_count", "decoder_block_count")


def check_header(path: Path) -> None:
    """Raise ModelError for a file whose header promises more than the file holds, or what cannot
    be: counts, lengths, kinds, shapes and places."""
    try:
        found = path.stat()
        _checked(path, found.st_size, found.st_mtime_ns)
    except (OSError, ValueError) as error:  # also of bytes that are no text
        raise ModelError(
            f"{path} cannot be read as a GGUF file ({error}). It must be a whole .gguf file."
        ) from error


@lru_cache(maxsize=16)  # by what tells one state of a file from another
def _checked(path: Path, size: int, changed: int) -> None:
    if size < 24:
        raise ValueError("it ends within its header")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _Walk(data).check()


class _Walk:
    """One walk through a header, from its first byte on."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.order = data, 0, "<"
        self.settings: dict[str, int] = {}

    def check(self) -> None:
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

    def number(self, kind: str) -> int:
        """Read a whole number."""
        begin, self.at = self.at, self.at + struct.calcsize(kind)
        if self.at > len(self.data):
            raise ValueError("it ends within its header")
        return int(struct.unpack_from(self.order + kind, self.data, begin)[0])

    def skip(self, size: int) -> int:
        """Step over so many bytes and return where they began."""
        begin, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise ValueError(f"{size:,} bytes are promised at {begin:,}, beyond its end")
        return begin

    def count(self, least: int = 1) -> int:
        """Read how many things follow, of `least` bytes or more each."""
        number = self.number("Q")
        if number * least > len(self.data) - self.at:
            raise ValueError(f"{number:,} things are promised at {self.at:,}, beyond its end")
        return number

    def text(self) -> str:
        """Read a length and so many bytes of text."""
        begin = self.skip(self.count())
        return str(self.data[begin : self.at], "utf-8")

    def kind(self) -> GGUFValueType:
        return GGUFValueType(self.number("I"))

    def value(self, key: str, kind: GGUFValueType, depth: int = 0) -> None:
        """Step over a value, and note it where it is a whole number."""
        if kind in WHOLE:
            self.settings[key] = self.number(WHOLE[kind])
        elif kind in SIZES:
            self.skip(SIZES[kind])
        elif kind == GGUFValueType.STRING:
            self.skip(self.count())
        elif depth:
            raise ValueError(f"{key[:100]!r} has arrays within an array")
        else:
            self.array(key, self.kind())

    def array(self, key: str, kind: GGUFValueType) -> None:
        if kind in SIZES:
            self.skip(self.count(SIZES[kind]) * SIZES[kind])
            return
        for _ in range(self.count(8)):
            self.value(key, kind, depth=1)

    def tensor(self, name: str) -> tuple[tuple[int, ...], int, int]:
        """Read a tensor's shape, its bytes, and its place from where the tensors begin."""
        dimensions = self.number("I")
        if not 1 <= dimensions <= DIMENSIONS:
            raise ValueError(f"{name[:100]!r} has {dimensions:,} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(self.number("I"))]
        if shape[0] % block:
            raise ValueError(f"{name[:100]!r} has rows of {shape[0]:,}, which are no whole blocks")
        return shape, math.prod(shape) // block * size, self.number("Q")

    def places(self, tensors: dict[str, tuple[tuple[int, ...], int, int]]) -> None:
        """Check that the tensors lie one behind the other, within the file."""
        step = self.settings.get(ALIGNMENT, 32)
        if step < 1 or step & (step - 1):
            raise ValueError(f"{ALIGNMENT} is {step}, and no power of two")
        begin = -(self.at // -step) * step
        place = end = 0
        for name, (_, size, offset) in tensors.items():
            if offset != place:
                raise ValueError(f"{name[:100]!r} lies at {offset:,}, and not at {place:,}")
            end = place + size
            place = -(end // -step) * step
        if tensors and begin + end > len(self.data):
            raise ValueError(f"its tensors take {end:,} bytes, and {len(self.data):,} are there")

    def widths(self, tensors: dict[str, tuple[tuple[int, ...], int, int]]) -> None:
        """Check that the settings describe nothing larger than what is there."""
        widest = max((max(shape) for shape, _, _ in tensors.values()), default=0)
        limits = dict.fromkeys(WIDTHS, widest) | dict.fromkeys(COUNTS, len(tensors))
        own = {key.partition(".")[2]: number for key, number in self.settings.items()}
        for name, limit in limits.items():
            if not 0 <= own.get(name, 0) <= limit:
                raise ValueError(f"{name} is {own[name]:,}, but the tensors allow {limit:,}")
        heads, length = (own.get(f"attention.{name}", 0) for name in ("head_count", "key_length"))
        if heads * length > widest:
            raise ValueError(f"{heads:,} heads of {length:,} are more than the tensors have")
