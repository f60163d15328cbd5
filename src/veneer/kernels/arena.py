"""Memory for the tensors that a forward pass keeps, reused once nothing refers to it any more."""

from __future__ import annotations

import mmap
import sys
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

Block = mmap.mmap | memoryview


class Arena:
    """Hands out tensors of shape (rows, columns) on the CPU.

    What one step keeps for its backward pass has the shapes of what the next one keeps. In the
    common heap it would lie between short-lived tensors and leave holes that nothing fits into. A
    block is free again when the last tensor over it is gone, whatever the reason.
    """

    def __init__(self) -> None:
        self._blocks: dict[int, deque[Block]] = {}  # by bytes of a row
        self._idle = _references(deque([_block(1)]))

    def empty(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """Return an uninitialised tensor in the dtype of `like`, on its device."""
        row_bytes = columns * like.element_size()
        if like.device.type != "cpu" or not rows * row_bytes:
            return like.new_empty(rows, columns)
        block = self._take(row_bytes, rows * row_bytes)
        return torch.frombuffer(block, dtype=like.dtype, count=rows * columns).view(rows, columns)

    def next_half(self) -> Sequence[tuple[int, int]]:
        """Note that another half of a layer begins; return what `read_ahead` takes later."""
        return ()

    def read_ahead(self, before: Sequence[tuple[int, int]]) -> None:
        """Begin to read what the halves before this one keep, where it is not in memory."""

    def _take(self, row_bytes: int, size: int) -> Block:
        ring = self._blocks.setdefault(row_bytes, deque())
        for _ in range(len(ring)):
            ring.rotate(-1)  # the block taken longest ago is the likeliest to be free
            if _references(ring) == self._idle:
                if len(ring[-1]) >= size:
                    self._again(ring[-1])
                    return ring[-1]
                self._free(ring.pop())  # too small now that steps have become longer
                break
        ring.append(self._new(size))
        return ring[-1]

    def _new(self, size: int) -> Block:
        return _block(size)

    def _again(self, block: Block) -> None:
        """Make a block ready that has been used before."""

    def _free(self, block: Block) -> None:
        """Let go of a block for good."""


def _block(size: int) -> mmap.mmap:
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size)
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # fewer and larger pages to map, where the system has them
        with suppress(OSError):
            block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _references(ring: deque[Block]) -> int:
    return sys.getrefcount(ring[-1])
