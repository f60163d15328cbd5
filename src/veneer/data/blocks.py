"""Files of rows in blocks that other processes parse and encode, each of which can be found again.

Files of lines are cut by their bytes, all others by the number and the length of their values. The
blocks are a function of the files and of `size_of_blocks`, so that a run which goes on makes the
same ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from veneer.data.chunk import About
from veneer.data.hub import is_hub
from veneer.data.problems import Located
from veneer.data.readers import COMPRESSED, LINES, READERS, Entry, json_lines, kind_of, open_bytes
from veneer.data.rows import parse_row
from veneer.data.sources import entries_of, readable

_VALUES = 4096  # of a block at most, where a file is not cut by its bytes
_LEAST, _MOST, _BLOCKS = 2**20, 2**24, 1024  # bytes of a block; blocks that are enough


@dataclass(frozen=True)
class Block:
    """Neighbouring rows of one file, as lines or as values that are decoded.

    number, file  which block it is, and of which file
    first         the line or the row of the file with which it begins, from 1
    next, offset  the line or row, and the byte, with which the next block begins
    """

    number: int
    file: int
    first: int
    next: int
    offset: int
    lines: bytes | None = None
    values: list[Entry] = field(default_factory=list)

    def entries(self, name: str) -> Iterator[Entry]:
        """Yield the values, or what is wrong with them; `name` is the file's."""
        if self.lines is None:
            yield from self.values
        else:
            yield from json_lines(BytesIO(self.lines), name, self.first)

    @property
    def about(self) -> About:
        """The beginning of what is known of the chunk that is made of this block."""
        is_line = self.lines is not None or any(entry.place.is_line for entry in self.values)
        return About(self.number, self.file, self.first, is_line, self.next, self.offset)


def size_of_blocks(files: list[Path]) -> int:
    """Return the bytes of a block of lines, which are the characters of a block of values."""
    total = sum(file.stat().st_size for file in files if not is_hub(file))
    return max(_LEAST, min(_MOST, total // _BLOCKS), total // (8 * _BLOCKS))


def blocks_of(files: list[Path], size: int, done: Mapping[int, About]) -> Iterator[Block]:
    """Yield the blocks of the files that are not among those done.

    Raises DataError where a file cannot be read.
    """
    number = 0
    for index, file in enumerate(files):
        with readable(file):
            is_lines = not is_hub(file) and READERS[kind_of(file)] in LINES
            cut = _lines(file, index, number, size, done) if is_lines else None
            for block in cut or _values(file, index, number, size):
                number = block.number + 1
                if block.number not in done:
                    yield block


def _lines(
    path: Path, index: int, number: int, size: int, done: Mapping[int, About]
) -> Iterator[Block]:
    """Yield the blocks of a file of lines; those that are done are passed over without their lines,
    and without being read where they need not be decompressed."""
    first, offset = 1, 0
    with open_bytes(path) as file:
        while True:
            about = done.get(number)
            if about is not None and about.file == index:
                _pass_over(file, about.offset - offset, path)
                lines, first_of_next, offset = b"", about.next, about.offset
            else:
                lines = file.read(size)
                lines += b"" if lines.endswith(b"\n") else file.readline()
                if not lines:
                    return
                first_of_next = first + lines.count(b"\n")
                offset += len(lines)
            yield Block(number, index, first, first_of_next, offset, lines)
            first, number = first_of_next, number + 1


def _pass_over(file: BinaryIO, count: int, path: Path) -> None:
    if path.suffix.lower() not in COMPRESSED:
        file.seek(count, 1)
        return
    while count and (read := len(file.read(min(count, _MOST)))):
        count -= read


def _values(path: Path, index: int, number: int, size: int) -> Iterator[Block]:
    """Yield the blocks of a file that is not cut by its bytes. The last value of a block may make
    it longer than `size` characters."""
    entries = iter(entries_of(path))
    while values := list(_next_values(entries, size)):
        # Places of lines may be far apart; the next block's first is one of them too.
        first = values[0].place.number
        yield Block(number, index, first, first, 0, None, values)
        number += 1


def _next_values(entries: Iterator[Entry], size: int) -> Iterator[Entry]:
    length = 0
    for entry in islice(entries, _VALUES):
        yield entry
        length += _characters(entry.value) if isinstance(entry, Located) else 0
        if length >= size:
            return


def _characters(value: object) -> int:
    """Return how many characters the texts in a value have."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 0


def limited(blocks: Iterator[Block], limit: int, names: list[str]) -> Iterator[Block]:
    """Yield the blocks up to the row that is good and the last of `limit` such rows."""
    left = limit
    for block in blocks:
        kept: list[Entry] = []
        for entry in block.entries(names[block.file]):
            kept.append(entry)
            if isinstance(entry, Located) and _is_row(entry.value):
                left -= 1
                if not left:
                    yield Block(
                        block.number, block.file, block.first, block.next, block.offset, None, kept
                    )
                    return
        yield block


def _is_row(value: object) -> bool:
    try:
        parse_row(value)
    except ValueError:
        return False
    return True
