"""Tensors that stay in their file, and reading ahead of a walk through them."""

from __future__ import annotations

import ctypes
import json
import mmap
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.quant.weight import QuantizedWeight

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
POPULATE_READ = 22  # of madvise(2), since Linux 5.14: read the pages in and map them


def map_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, which the system reads when they are used.

    None of them may be written to. Raises ValueError for a file that is none, or cut short.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 0 < length <= size - 8:
            raise ValueError("its header is longer than the file")
        header: dict[str, Any] = json.loads(opened.read(length))
    whole = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        first, last = (8 + length + offset for offset in entry["data_offsets"])
        if last > size:
            raise ValueError(f"it ends before {name}")
        tensors[name] = whole[first:last].view(DTYPES[entry["dtype"]]).view(entry["shape"])
    return tensors


class ReadAhead:
    """Has the system read the next part while one is used, in the direction of the walk, and unmap
    the last: what it then lets go first, where memory is short, is what was used longest ago.

    A part is what is used together, such as a decoder layer. A forward pass walks up, a backward
    pass down; that is all that needs to be known.
    """

    def __init__(self, parts: Sequence[Iterable[QuantizedWeight]]) -> None:
        self._parts = [[t for weight in part for t in _large(weight)] for part in parts]
        self._at, self._asked = -1, -1
        self._reader = ThreadPoolExecutor(1, "veneer-read-ahead")
        for number, part in enumerate(parts):
            for weight in part:
                weight.before_use = _Place(self, number)

    def at(self, number: int) -> None:
        """Take note that part `number` is in use."""
        if number == self._at:
            return
        step = -1 if number == self._at - 1 else 1  # a jump back is the start of another walk up
        if self._at >= 0:
            self._reader.submit(_let_go, self._parts[self._at])
            if self._asked == self._at:
                self._asked = -1  # it may be asked for again
        self._at = number
        following = number + step
        if 0 <= following < len(self._parts) and following != self._asked:
            self._asked = following
            self._reader.submit(_populate, self._parts[following])


class _Place:
    """Tells a reader that its part is in use."""

    def __init__(self, reader: ReadAhead, number: int) -> None:
        self.reader, self.number = reader, number

    def __call__(self) -> None:
        self.reader.at(self.number)


def _large(weight: QuantizedWeight) -> list[Tensor]:
    return [t for t in weight.tensors().values() if t.nbytes >= mmap.PAGESIZE]


def _populate(tensors: Sequence[Tensor]) -> None:
    if not _advise(tensors, POPULATE_READ):  # an older system at least reads
        _advise(tensors, mmap.MADV_WILLNEED)


def _let_go(tensors: Sequence[Tensor]) -> None:
    """Unmap the pages that hold nothing but these tensors, which stay in their file."""
    _advise(tensors, mmap.MADV_DONTNEED, whole=True)


def _advise(tensors: Sequence[Tensor], advice: int, *, whole: bool = False) -> bool:
    """Tell the system what is intended with tensors' pages, and say whether it knew the advice.

    `whole` leaves pages out that tensors share with others. It takes tensors, not addresses: what
    waits to be advised must not be unmapped meanwhile.
    """
    libc, known, page = ctypes.CDLL(None), True, mmap.PAGESIZE
    for tensor in tensors:
        first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        first = -(first // -page) * page if whole else first // page * page
        last = last // page * page if whole else last
        if last > first:
            length = ctypes.c_size_t(last - first)
            known &= libc.madvise(ctypes.c_void_p(first), length, advice) == 0
    return known
