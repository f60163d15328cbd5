"""Tensors that stay in their file, and are read ahead of their use."""

from __future__ import annotations

import ctypes
import json
import mmap
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.quant.stack import QuantizedStack
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
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
POPULATE_READ = 22  # of madvise(2), since Linux 5.14: read the pages in and map them


def map_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, which the kernel reads when they are used.

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
        dtype, data = DTYPES[entry["dtype"]], whole[first:last]
        if first % dtype.itemsize:  # nobody but this reader needs numbers to be aligned
            data = data.clone()
        tensors[name] = data.view(dtype).view(entry["shape"])
    return tensors


class ReadAhead:
    """Reads the next group of weights while one is in use, and unmaps the one before.

    A group is what is used together, such as a decoder layer. A forward pass uses the groups in
    order, a backward pass in reverse; the last two groups used tell which it is. Where memory is
    short, the kernel drops unmapped pages first, and these were used longest ago.

    Experts of `stacks` are in no group: they are read when the router has chosen them, in the order
    in which they are noted, and stay mapped, since the next pass may choose the same.
    """

    def __init__(
        self,
        groups: Sequence[Iterable[QuantizedWeight]],
        stacks: Iterable[QuantizedStack] = (),
    ) -> None:
        self._groups = [[t for weight in group for t in _large(weight)] for group in groups]
        self._current, self._requested = -1, -1
        self._reader = ThreadPoolExecutor(1, "veneer-read-ahead")
        for number, group in enumerate(groups):
            for weight in group:
                weight.before_use = partial(self.note_use, number)
        self._experts: dict[tuple[QuantizedStack, int], list[Tensor]] = {}
        for stack in stacks:
            stack.before_routed = partial(self.note_routed, stack)

    def note_use(self, number: int) -> None:
        """Take note that group `number` is in use."""
        if number == self._current:
            return
        # Any jump but one step back is the start of another forward pass.
        step = -1 if number == self._current - 1 else 1
        if self._current >= 0:
            self._reader.submit(release, self._groups[self._current])
            if self._requested == self._current:
                self._requested = -1  # it may be requested again
        self._current = number
        following = number + step
        if 0 <= following < len(self._groups) and following != self._requested:
            self._requested = following
            self._reader.submit(populate, self._groups[following])

    def note_routed(self, stack: QuantizedStack, ids: Sequence[int]) -> None:
        """Take note that these experts of a stack are used next."""
        for e in ids:
            self._reader.submit(self._populate_expert, stack, e)

    def _populate_expert(self, stack: QuantizedStack, e: int) -> None:
        tensors = self._experts.get((stack, e))
        if tensors is None:
            tensors = self._experts[stack, e] = _large(stack.expert(e))
        populate(tensors)


def _large(weight: QuantizedWeight) -> list[Tensor]:
    return [t for t in weight.tensors().values() if t.nbytes >= mmap.PAGESIZE]


def populate(tensors: Sequence[Tensor]) -> None:
    """Read the pages of mapped tensors in."""
    if not _advise(tensors, POPULATE_READ):  # an older kernel can at least read
        _advise(tensors, mmap.MADV_WILLNEED)


def are_mapped(tensors: Sequence[Tensor]) -> list[bool]:
    """Return for each tensor whether its memory is mapped from a file, where the system says so."""
    maps, ranges = Path("/proc/self/maps"), []
    for line in maps.read_text(errors="replace").splitlines() if maps.exists() else ():
        addresses, *_, path = [*line.split(maxsplit=5), ""][:6]
        if path.startswith("/") and not path.startswith(("/dev/", "/memfd:")):
            ranges.append(range(*(int(address, 16) for address in addresses.split("-"))))
    return [any(t.data_ptr() in pages for pages in ranges) for t in tensors]


def release(tensors: Sequence[Tensor]) -> None:
    """Give the pages back that hold nothing but these tensors. What is mapped stays in its file;
    of other tensors the values are gone."""
    _advise(tensors, mmap.MADV_DONTNEED, whole=True)


def _advise(tensors: Sequence[Tensor], advice: int, *, whole: bool = False) -> bool:
    """Call madvise(2) on the pages of tensors, and return whether the kernel knows the advice.

    `whole` leaves out pages that a tensor shares with others. It takes tensors and not addresses,
    so that the memory stays mapped until the advice is given.
    """
    libc, accepted, page = ctypes.CDLL(None), True, mmap.PAGESIZE
    for tensor in tensors:
        first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        first = -(first // -page) * page if whole else first // page * page
        last = last // page * page if whole else last
        if last > first:
            length = ctypes.c_size_t(last - first)
            accepted &= libc.madvise(ctypes.c_void_p(first), length, advice) == 0
    return accepted
