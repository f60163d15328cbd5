"""Memory for what a forward pass keeps, mapped from a file that the system writes out and reads
back as memory is short."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from veneer.errors import TrainingError
from veneer.kernels.arena import Arena, Block

Range = tuple[int, int]  # first byte and bytes, in the file
# Addresses for each byte that is free on the disk: blocks that have become too small leave theirs.
ADDRESSES_PER_BYTE, MOST_ADDRESSES = 8, 2**43
# Linux has both; without them a full disk would end the process, and old pages would be read.
IS_AVAILABLE = hasattr(os, "posix_fallocate") and hasattr(mmap, "MADV_REMOVE")
HALVES_AHEAD = 2  # whose tensors are read before their backward pass: one decoder layer's


class DiskArena(Arena):
    """An arena in one file of `directory`, which has no name there and is gone with the process.

    The file is as large as the blocks that have been handed out. Raises TrainingError where the
    disk has no room for one more.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = directory
        try:
            with tempfile.TemporaryFile(dir=directory) as file:
                free = shutil.disk_usage(directory).free
                length = min(ADDRESSES_PER_BYTE * free, MOST_ADDRESSES) + mmap.PAGESIZE
                os.truncate(file.fileno(), length)
                self._map = mmap.mmap(file.fileno(), length)
                self._file = os.dup(file.fileno())
        except OSError as error:
            raise TrainingError(f"No file can be mapped in {directory}: {error}.") from error
        self._base = _address(self._map)
        self._end = 0  # of the addresses in use
        self._halves: deque[list[Range]] = deque(maxlen=HALVES_AHEAD + 1)

    def __del__(self) -> None:
        with suppress(AttributeError, OSError):
            os.close(self._file)

    def empty(self, rows: int, columns: int, like: Tensor) -> Tensor:
        tensor = super().empty(rows, columns, like)
        if tensor.device.type == "cpu" and self._halves and tensor.numel():
            self._halves[-1].append((tensor.data_ptr() - self._base, tensor.nbytes))
        return tensor

    def next_half(self) -> Sequence[Range]:
        """Note that another half of a layer begins, and return what those before it were given."""
        before = [range_ for half in [*self._halves][-HALVES_AHEAD:] for range_ in half]
        self._halves.append([])
        return before

    def read_ahead(self, before: Sequence[Range]) -> None:
        for first, size in before:
            self._map.madvise(mmap.MADV_WILLNEED, first, size)

    def _new(self, size: int) -> Block:
        first = self._end
        self._end += -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self._reserve(first, size)
        return memoryview(self._map)[first : first + size]

    def _again(self, block: Block) -> None:
        # What it held would be read back from the disk, a page at a time, just to be written over.
        first = _address(block) - self._base
        self._free(block)
        self._reserve(first, len(block))

    def _free(self, block: Block) -> None:
        with suppress(OSError):  # a file system that makes no holes
            self._map.madvise(mmap.MADV_REMOVE, _address(block) - self._base, len(block))

    def _reserve(self, first: int, size: int) -> None:
        """Take the room on the disk now: a page without room would end the process later."""
        try:
            if first + size > len(self._map):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.posix_fallocate(self._file, first, size)
        except OSError as error:
            free = shutil.disk_usage(self.directory).free
            raise TrainingError(
                f"The disk of {self.directory} has no room for what a pass keeps: "
                f"{error.strerror}, with {free / 1e6:,.0f} MB free, at {size / 1e6:,.0f} MB more. "
                "Make room, or take --recompute selective or full, or fewer --tokens-per-batch."
            ) from error


def _address(block: Block) -> int:
    return torch.frombuffer(block, dtype=torch.uint8).data_ptr()
