"""Low-rank products of segments: rows of one matrix, each run of which has factors of its own.

The formulas are those of `lowrank/projection.py`, which computes them by torch, segment after
segment, where there is no table. One call does all segments and projections of a group.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.kernels.native import adjacent, kernel

_FUNCTIONS = ("segments_down", "segments_up", "segments_gradient")


@dataclass(frozen=True, eq=False)
class SegmentUpdate:
    """What one adapter adds to one projection on its rows.

    first, rows: of the batch. projection: its number in the group. A (rank, in), B (out, rank), in
    the dtype of computing. h, h_stride: where its columns of A x begin in the buffer of all, and
    how far its rows are apart there. factor: what B is of the weight that trains, multiplied.
    """

    first: int
    rows: int
    projection: int
    A: Tensor
    B: Tensor
    h: int
    h_stride: int
    factor: float = 1.0
    trains: tuple[bool, bool] = (True, True)  # A and B


class SegmentTable:
    """The updates of a group's segments, those of a segment one behind the other, as the compiled
    functions read them."""

    def __init__(self, updates: Sequence[SegmentUpdate], dtype: torch.dtype) -> None:
        self.updates, self._dtype = updates, dtype
        entries, size = array("q"), 0
        self._shapes: list[tuple[torch.Size, ...]] = []
        for own in updates:
            places = []
            for weight, trains in zip((own.A, own.B), own.trains, strict=True):
                places.append(size if trains else -1)
                size += weight.numel() if trains else 0
            (rank, in_), out = own.A.shape, len(own.B)
            entries.extend((own.first, own.rows, rank, in_, out, own.projection))
            entries.extend((own.h, own.h_stride, *places, own.A.data_ptr(), own.B.data_ptr()))
        self._entries, self._numbers = entries, size
        self._wide = torch.promote_types(dtype, torch.float32)
        self._factors = torch.tensor([own.factor for own in updates], dtype=self._wide)

    @classmethod
    def of(cls, updates: Sequence[SegmentUpdate]) -> SegmentTable | None:
        """Return the table, or None where torch has to make the products, or there are none."""
        factors = [factor for own in updates for factor in (own.A, own.B)]
        if not factors or not are_compiled(*factors):
            return None
        contiguous = all(factor.is_contiguous() for factor in factors)
        return cls(updates, factors[0].dtype) if contiguous else None

    def project(self, sources: Sequence[Tensor], h: Tensor, *, by_A: bool) -> None:
        """Write x Aᵀ, or dz B, of each update to `h`. sources: what each projection reads."""
        rows = [adjacent(source) for source in sources]
        self._call("segments_down", int(by_A), self._places(rows), h)

    def add(self, h: Tensor, targets: Sequence[Tensor], *, by_A: bool) -> None:
        """Add h Bᵀ, or the sum of dh A over all projections of a segment, to the segment's rows of
        what each projection has in `targets`, whose rows' numbers lie side by side."""
        self._call("segments_up", int(by_A), h, self._places(targets))

    def gradients(
        self, dh: Tensor, x: Tensor, h: Tensor, dz: Sequence[Tensor]
    ) -> list[tuple[Tensor | None, Tensor | None]]:
        """Return dA = dhᵀ x and dB = factor · dzᵀ h of each update, in float32 or wider; None where
        one does not train."""
        flat = torch.empty(self._numbers, dtype=self._wide)
        for of_A, down, sources in ((1, dh, [adjacent(x)] * len(dz)), (0, h, map(adjacent, dz))):
            rows = [*sources]
            places = self._places(rows)
            self._call("segments_gradient", of_A, down, places, self._factors, flat)
        sizes = [
            weight.numel()
            for own in self.updates
            for weight, trains in zip((own.A, own.B), own.trains, strict=True)
            if trains
        ]
        pieces = iter(flat.split_with_sizes(sizes))

        def of(weight: Tensor, trains: bool) -> Tensor | None:
            return next(pieces).view(weight.shape) if trains else None

        return [(of(own.A, own.trains[0]), of(own.B, own.trains[1])) for own in self.updates]

    def _places(self, matrices: Sequence[Tensor]) -> array[int]:
        """Return the address and the stride of each matrix's rows, which have to be in the table's
        dtype, their numbers side by side."""
        numbers = array("q")
        for matrix in matrices:
            if matrix.stride(-1) != 1 and matrix.shape[-1] > 1:
                raise ValueError(f"a table takes no rows of stride {matrix.stride(-1)}")
            if matrix.dtype != self._dtype:
                raise ValueError(f"a table of {self._dtype} takes no matrix of {matrix.dtype}")
            numbers.extend((matrix.data_ptr(), matrix.stride(0)))
        return numbers

    def _call(self, name: str, *arguments: int | Tensor | array[int]) -> None:
        function: Callable[..., None] | None = kernel(name, self.updates[0].A)
        assert function is not None
        pointers = (_pointer(each) if isinstance(each, array) else each for each in arguments)
        function(_pointer(self._entries), len(self.updates), *pointers)


def are_compiled(like: Tensor, *others: Tensor) -> bool:
    """Return whether tables take tensors such as these, where torch would be slower."""
    if any(kernel(name, like, *others) is None for name in _FUNCTIONS):
        return False
    return like.dtype == torch.bfloat16 or _is_wide()


@functools.cache
def _is_wide() -> bool:
    """Return whether vectors have 512 bits. With fewer, products in float32 are slower here than
    torch's, by two and more; those in bfloat16 are faster by any."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def _pointer(numbers: array[int]) -> ctypes.c_void_p:
    return ctypes.c_void_p(numbers.buffer_info()[0])
