"""Files of rows to a table of examples on the disk: encoded once, on all cores, and kept."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from veneer.data import cache
from veneer.data.blocks import Block, blocks_of, limited, size_of_blocks
from veneer.data.chunk import About, Chunk
from veneer.data.columns import COLUMNS, Column
from veneer.data.hub import is_hub
from veneer.data.problems import Place, Problem
from veneer.data.readers import COMPRESSED, LINES, READERS, kind_of
from veneer.data.rows import LongRows
from veneer.data.sources import no_rows_in
from veneer.data.table import ChunkFiles, ExampleTable
from veneer.data.words import add_up
from veneer.data.worker import Task, chunk_path
from veneer.data.workers import done_by_all_cores
from veneer.errors import MOST_PROBLEMS, AdapterError
from veneer.files import new_file, read_json, write_json

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

INDEX, WORDS = "table.json", "words.json"
_INT32 = np.lib.format.dtype_to_descr(np.dtype(np.int32))
_SECONDS_BETWEEN_LOOKS = 0.5  # at what another process encodes


@dataclass(frozen=True)
class Progress:
    """How far rows are encoded. `total` is in bytes, None where it is not known; `waiting`: it is
    another process that encodes them."""

    rows: int
    bytes: int
    total: int | None
    waiting: bool = False


@dataclass(frozen=True)
class Encoded:
    """The rows of files as a table, and what was met in making it.

    table         every example, in the order of the files
    examples_of_files  how many of them are of each file
    files_read    how many files were begun before a limit ended the reading
    dropped       rows left out as too long, and their tokens
    split         rows that became several examples
    unused        keys that nothing reads, each with the number of rows
    systems       what conversations begin with: a system prompt, or None; the first two
    problem_count problems in all; `problems` has the first of them
    """

    table: ExampleTable
    examples_of_files: list[int]
    files_read: int
    dropped: tuple[int, int]
    split: int
    unused: dict[str, int]
    systems: list[str | None]
    problem_count: int
    problems: list[Problem]

    def all_problems(self) -> Iterator[Problem]:
        """Yield every problem, in the order of the files, from the disk."""
        chunks = self.table.chunks
        for path in chunks.paths:
            yield from _problems_of(Chunk(path).about, chunks.files)


def encode(
    files: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    long_rows: LongRows | None = None,
    limit: int | None = None,
) -> Generator[Progress, None, Encoded]:
    """Return the rows of the files as examples, from the cache as far as they are there.

    limit: the good rows after which to stop. Raises DataError where a file cannot be read or holds
    nothing; rows with faults are in what is returned.
    """
    names = [str(file) for file in files]
    settings = {"max_length": max_length, "long_rows": long_rows, "limit": limit}
    directory = cache.home() / cache.key_of(files, tokenizer, settings)
    task = Task(names, tokenizer, max_length, long_rows, directory)
    work = partial(_encode, task, list(files), limit)
    yield from _wait_or(directory, partial(_is_whole, directory), work)
    cache.note_use(directory)
    return _opened(directory, names)


def count_all_words(
    files: Sequence[Path], *, limit: int | None = None
) -> Generator[Progress, None, Counter[str]]:
    """Return how often each word occurs in the rows of the files, in their order."""
    directory = cache.home() / cache.key_of(files, None, {"words": True, "limit": limit})
    task = Task([str(file) for file in files])
    work = partial(_count, task, list(files), limit, directory)
    yield from _wait_or(directory, lambda: _json_of(directory / WORDS) is not None, work)
    cache.note_use(directory)
    return Counter(read_json(directory / WORDS))


def _wait_or(
    directory: Path, is_done: Callable[[], bool], work: Callable[[], Iterator[Progress]]
) -> Iterator[Progress]:
    """Do the work that makes a directory's result, or wait until another process has done it.

    Raises DataError where nothing can be written there.
    """
    while not is_done():
        with cache.writing_to(directory), cache.locked(directory) as alone:
            if is_done():
                return
            if alone:
                cache.note_use(directory)
                cache.prune(directory.parent)
                yield from work()
                return
        done = sum(1 for _ in directory.glob("chunk-*.arrow"))
        yield Progress(0, done, None, waiting=True)
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _encode(task: Task, files: list[Path], limit: int | None) -> Iterator[Progress]:
    """Encode what is not encoded yet, and write the index behind the last chunk."""
    assert task.directory is not None
    done = {about.number: about for about in _finished(task.directory)}
    rows = sum(about.examples for about in done.values())
    size = size_of_blocks(files)
    total = _bytes_of(files)
    encoded = sum(_bytes_done(about, done) for about in done.values())
    yield Progress(rows, encoded, total)
    blocks: Iterator[Block] = blocks_of(files, size, {} if limit else done)
    if limit:  # rows before those that are encoded already count too
        blocks = limited(blocks, limit, task.names)
        blocks = (block for block in blocks if block.number not in done)
    for number, count, about in done_by_all_cores(task, blocks):
        assert isinstance(about, About)
        done[number] = about
        rows, encoded = rows + about.examples, encoded + count
        yield Progress(rows, encoded, total)
    _write_index(task, [done[number] for number in sorted(done)])


def _count(task: Task, files: list[Path], limit: int | None, directory: Path) -> Iterator[Progress]:
    """Count the words of all blocks, and write them down."""
    counts: Counter[str] = Counter()
    waiting: dict[int, Counter[str]] = {}  # of blocks before which others are not done
    blocks = blocks_of(files, size_of_blocks(files), {})
    blocks = limited(blocks, limit, task.names) if limit else blocks
    total, counted, expected = _bytes_of(files), 0, 0
    for number, count, words in done_by_all_cores(task, blocks):
        assert isinstance(words, Counter)
        waiting[number] = words
        while expected in waiting:
            add_up(counts, waiting.pop(expected))
            expected += 1
        counted += count
        yield Progress(0, counted, total)
    write_json(directory / WORDS, {word: count for word, count in counts.items() if count > 1})


def _finished(directory: Path) -> Iterator[About]:
    """Yield what is known of each chunk of a directory that can be read."""
    for path in sorted(directory.glob("chunk-*.arrow")):
        # A machine that lost its power may have half of a file: it is encoded again.
        with suppress(OSError, ValueError, KeyError):
            yield Chunk(path).about


def _json_of(path: Path) -> dict[str, Any] | None:
    """Return what a file of the cache holds, None where it is missing or damaged."""
    with suppress(AdapterError):
        return read_json(path)
    return None


def _is_whole(directory: Path) -> bool:
    """Return whether a directory has its index, and the files of the sizes that the index says."""
    index = _json_of(directory / INDEX) or {}
    try:
        return bool(index) and index["bytes"] == _sizes_in(directory)
    except (OSError, KeyError):
        return False


def _sizes_in(directory: Path) -> dict[str, int]:
    """Return the bytes of each file that holds rows or a column of them."""
    files = chain(directory.glob("chunk-*.arrow"), directory.glob("*.npy"))
    return {file.name: file.stat().st_size for file in files}


def _bytes_of(files: list[Path]) -> int | None:
    """Return the bytes of the files, None where their blocks are not cut by them."""
    if any(
        is_hub(file) or file.suffix.lower() in COMPRESSED or READERS[kind_of(file)] not in LINES
        for file in files
    ):
        return None
    return sum(file.stat().st_size for file in files)


def _bytes_done(about: About, done: Mapping[int, About]) -> int:
    """Return the bytes of a block that was done earlier, about."""
    before = done.get(about.number - 1)
    return about.offset - (before.offset if before and before.file == about.file else 0)


def _write_index(task: Task, chunks: list[About]) -> None:
    """Write the columns of all rows and, last, what is known of all chunks.

    Raises DataError for a file that holds nothing.
    """
    directory = task.directory
    assert directory is not None
    files = range(len(task.names))
    entries = Counter({about.file: 0 for about in chunks})
    for about in chunks:
        entries[about.file] += about.entries
    last = chunks[-1].file if chunks else len(task.names)  # a limit ends before later files
    for file in files:
        if not entries[file] and file <= last:
            raise no_rows_in(task.names[file])
    rows = sum(about.examples for about in chunks)
    for column in COLUMNS:
        # Written, not mapped: a full disk is an error then, and no signal that ends the process.
        with (
            new_file(directory / f"{column}.npy") as temporary,
            temporary.open("wb") as column_file,
        ):
            shape = (max(1, rows),)  # a file of no bytes could not be mapped
            header = {"descr": _INT32, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(column_file, header)
            for about in chunks:
                values = Chunk(chunk_path(directory, about.number)).column(column)
                column_file.write(values.astype(np.int32).tobytes())
            if not rows:
                column_file.write(np.zeros(1, np.int32).tobytes())
    examples, unused = [0] * len(task.names), Counter[str]()
    systems: list[str | None] = []
    problems: list[Problem] = []
    digest = hashlib.sha256()
    for about in chunks:
        examples[about.file] += about.examples
        unused.update(about.unused)
        systems += [system for system in about.systems if system not in systems]
        digest.update(about.digest.encode())
        if len(problems) < MOST_PROBLEMS:
            problems += _problems_of(about, task.names)
    write_json(
        directory / INDEX,
        {
            "chunks": [[about.number, about.examples] for about in chunks],
            "examples_of_files": examples,
            "files_read": min(last + 1, len(task.names)),
            "dropped": [sum(about.dropped[i] for about in chunks) for i in (0, 1)],
            "split": sum(about.split for about in chunks),
            "unused": dict(unused.most_common()),
            "systems": systems[:2],
            "problem_count": sum(len(about.problems) for about in chunks),
            "problems": [
                [task.names.index(p.place.file), p.place.number, p.place.is_line, p.what]
                for p in problems[:MOST_PROBLEMS]
            ],
            "digest": digest.hexdigest(),
            "bytes": _sizes_in(directory),
        },
    )


def _problems_of(about: About, names: Sequence[str]) -> list[Problem]:
    return [
        Problem(Place(names[about.file], number, about.is_line), what)
        for number, what in sorted(about.problems)
    ]


def _opened(directory: Path, names: list[str]) -> Encoded:
    """Return the table of a directory whose index is written, with the names of these files."""
    index = read_json(directory / INDEX)
    numbers, sizes = zip(*index["chunks"], strict=True) if index["chunks"] else ((), ())
    paths = [chunk_path(directory, number) for number in numbers]
    rows = sum(sizes)
    columns: dict[Column, NDArray[np.int32]] = {
        name: np.load(directory / f"{name}.npy", mmap_mode="r")[:rows] for name in COLUMNS
    }
    return Encoded(
        ExampleTable(ChunkFiles(paths, names, sizes), columns, index["digest"]),
        index["examples_of_files"],
        index["files_read"],
        tuple(index["dropped"]),
        index["split"],
        index["unused"],
        index["systems"],
        index["problem_count"],
        [
            Problem(Place(names[file], number, is_line), what)
            for file, number, is_line, what in index["problems"]
        ],
    )
