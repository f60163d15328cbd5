"""Encoded rows on the disk as a sequence of examples, of which memory holds those in use."""

from __future__ import annotations

import hashlib
import os
import tempfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from veneer.data.chunk import Chunk
from veneer.data.columns import Column, Columnar
from veneer.data.encode import Example
from veneer.files import disk_errors

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Columns of a selection of up to this many rows are in memory, those of more on the disk.
IN_MEMORY = 2**20


class ChunkFiles:
    """The chunks of a table, opened when a row of theirs is read first.

    paths: their files; files: the names of the files of the data; sizes: rows of each chunk
    """

    def __init__(self, paths: Sequence[Path], files: Sequence[str], sizes: Sequence[int]) -> None:
        self.paths, self.files = paths, files
        self._starts = [0, *accumulate(sizes)]
        self._open: dict[int, Chunk] = {}

    def __len__(self) -> int:
        return self._starts[-1]

    def example(self, row: int) -> Example:
        """Return a row."""
        number = bisect_right(self._starts, row) - 1
        chunk = self._chunk(number)
        return chunk.example(row - self._starts[number], self.files[chunk.about.file])

    def where(self, row: int) -> str:
        """Return where a row is from."""
        number = bisect_right(self._starts, row) - 1
        chunk = self._chunk(number)
        return chunk.where(row - self._starts[number], self.files[chunk.about.file])

    def digests(self) -> Iterator[NDArray[np.uint64]]:
        """Yield the rows' hashes, chunk by chunk."""
        for number in range(len(self.paths)):
            yield self._chunk(number).column("digest")

    def _chunk(self, number: int) -> Chunk:
        if number not in self._open:
            self._open[number] = Chunk(self.paths[number])
        return self._open[number]


class ExampleTable(Columnar):
    """Rows of chunks, all or a selection of them, in any order.

    columns: those of all rows of the chunks; rows: which of them these are, None for all; digest:
    a hash of the content of the chunks
    """

    def __init__(
        self,
        chunks: ChunkFiles,
        columns: dict[Column, NDArray[np.int32]],
        digest: str,
        rows: NDArray[np.integer] | None = None,
    ) -> None:
        self.chunks, self._all, self._digest, self.rows = chunks, columns, digest, rows
        self._selected: dict[Column, NDArray[np.int32]] = {}

    def __len__(self) -> int:
        return len(self.chunks) if self.rows is None else len(self.rows)

    @overload
    def __getitem__(self, row: int) -> Example: ...

    @overload
    def __getitem__(self, row: slice) -> ExampleTable: ...

    def __getitem__(self, row: int | slice) -> Example | ExampleTable:
        if isinstance(row, slice):
            return self.select(np.arange(len(self))[row])
        place = row + len(self) if row < 0 else row
        if not 0 <= place < len(self):
            raise IndexError(f"The table has no row {row}.")
        return self.chunks.example(place if self.rows is None else int(self.rows[place]))

    def column(self, name: Column) -> NDArray[np.int32]:
        """Return a column, a number for each row."""
        if self.rows is None:
            return self._all[name]
        if name not in self._selected:
            gathered = new_column(len(self.rows), np.int32)
            for start in range(0, len(self.rows), IN_MEMORY):
                piece = slice(start, start + IN_MEMORY)
                gathered[piece] = self._all[name][self.rows[piece]]
            self._selected[name] = gathered
        return self._selected[name]

    def select(self, rows: NDArray[np.integer]) -> ExampleTable:
        """Return some of the rows, in this order; a row may come several times."""
        of_chunks = rows if self.rows is None else self.rows[rows]
        return ExampleTable(self.chunks, self._all, self._digest, of_chunks)

    @cached_property
    def digest(self) -> str:
        """A hash of what the rows are and of their order."""
        whole = hashlib.sha256(self._digest.encode())
        if self.rows is not None:
            for start in range(0, len(self.rows), IN_MEMORY):
                whole.update(self.rows[start : start + IN_MEMORY].astype(np.int64).tobytes())
        return whole.hexdigest()[:16]


def new_column(size: int, dtype: Any) -> NDArray[Any]:
    """Return an array for a number a row: in memory, or of many rows in a file without a name,
    whose pages the system may take back."""
    if size <= IN_MEMORY:
        return np.empty(size, dtype)
    # Not in /tmp, which may be memory.
    place = _large_files()
    with disk_errors(place), tempfile.TemporaryFile(dir=place) as file:
        if hasattr(os, "posix_fallocate"):  # a page without room would end the process
            os.posix_fallocate(file.fileno(), 0, size * np.dtype(dtype).itemsize)
        return np.memmap(file, dtype, "w+", shape=(size,))


def all_but(n: int, excluded: NDArray[np.integer]) -> NDArray[np.integer]:
    """Return the numbers below `n` without those in `excluded`, which ascend, as a column."""
    remaining = new_column(n - len(excluded), np.int64)
    filled = 0
    for start in range(0, n, IN_MEMORY):
        end = min(start + IN_MEMORY, n)
        first, behind = np.searchsorted(excluded, [start, end])
        piece = np.delete(np.arange(start, end), excluded[first:behind] - start)
        remaining[filled : filled + len(piece)] = piece
        filled += len(piece)
    return remaining


def _large_files() -> Path:
    place = Path("/var/tmp")  # noqa: S108, files there have no name
    return place if place.is_dir() else Path(tempfile.gettempdir())
