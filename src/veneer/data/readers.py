"""Readers of files of rows, by suffix: each yields the values of a file with their places.

Instead of a value that cannot be read, it yields the problem.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, TextIO, cast

from veneer.data.problems import Located, Place, Problem
from veneer.errors import DataError

Entry = Located[object] | Problem

_BOM = b"\xef\xbb\xbf"
COMPRESSED = (".gz", ".zst")
# What reading a file may raise beside OSError where its compression is damaged.
DAMAGED = (EOFError, zlib.error)
_BETWEEN_ITEMS = re.compile(r"[ \t\r\n]*[\[,\]]?[ \t\r\n]*")
# Python's own limit of 131,072 characters a cell is less than one long document.
_CELL_LIMIT = 2**31 - 1


def read_json_lines(path: Path) -> Iterator[Entry]:
    """Yield one value for each line that is not blank."""
    with open_bytes(path) as lines:
        yield from json_lines(lines, str(path))


def json_lines(lines: Iterable[bytes], file: str, first: int = 1) -> Iterator[Entry]:
    """Yield one value for each line that is not blank; `first` is the number of the first line."""
    for number, line in enumerate(lines, start=first):
        line = line.removeprefix(_BOM) if number == 1 else line
        if line.strip():
            yield _json_line(line, Place(file, number))


def _json_line(line: bytes, place: Place) -> Entry:
    try:
        # Without its end: where a row is cut off, that is the column behind its last character.
        return Located(json.loads(line.decode().rstrip()), place)
    except UnicodeDecodeError as error:
        return _not_utf8(place, line[error.start], error.start + 1)
    except (ValueError, RecursionError) as error:
        return _not_json(place, error)


def read_json(path: Path) -> Iterator[Entry]:
    """Yield the items of a list, or of the list that an object holds under `data`.

    A file with an error in its syntax yields that problem alone: no telling what else it breaks.
    """
    file = str(path)
    with open_bytes(path) as whole:
        raw = whole.read().removeprefix(_BOM)
    try:
        text = raw.decode()
        value = json.loads(text) if text.strip() else []
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - raw.rfind(b"\n", 0, error.start)
        yield _not_utf8(Place(file, line), raw[error.start], column)
    except (ValueError, RecursionError) as error:
        yield _not_json(Place(file, getattr(error, "lineno", 1)), error)
    else:
        if isinstance(value, list):
            yield from _with_lines(text, file)
        elif isinstance(value, dict) and isinstance(value.get("data"), list):
            for number, item in enumerate(value["data"], start=1):
                yield Located(item, Place(file, number, is_line=False))
        else:
            yield Problem(Place(file, 1), 'the file must hold a list of rows, or {"data": [rows]}')


def _with_lines(text: str, file: str) -> Iterator[Entry]:
    """Yield each item of the list that `text` is, with the line where the item begins."""
    decoder = json.JSONDecoder()
    line, counted = 1, 0
    position = _item_start(text, 0)
    while position < len(text):
        line, counted = line + text.count("\n", counted, position), position
        value, end = decoder.raw_decode(text, position)
        yield Located(value, Place(file, line))
        position = _item_start(text, end)


def _item_start(text: str, position: int) -> int:
    """Return where the next item starts: behind space, a bracket or a comma, and space."""
    between = _BETWEEN_ITEMS.match(text, position)
    assert between is not None  # the pattern matches the empty string
    return between.end()


def read_table(path: Path, *, delimiter: str) -> Iterator[Entry]:
    """Yield a dictionary for each line under the header that is not blank.

    Where the header has no `delimiter`, but semicolons, as spreadsheets write them in countries
    with decimal commas, these separate the cells.
    """
    limit = csv.field_size_limit(_CELL_LIMIT)
    try:
        with _text_file(path) as lines:
            header = next(filter(str.strip, lines), "")
            lines.seek(0)
            delimiter = ";" if ";" in header and delimiter not in header else delimiter
            yield from _table_rows(lines, delimiter, str(path))
    finally:
        csv.field_size_limit(limit)


def _table_rows(lines: TextIO, delimiter: str, file: str) -> Iterator[Entry]:
    table = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        place = Place(file, table.line_num + 1)
        try:
            cells = next(table)
        except StopIteration:
            return
        except csv.Error as error:
            kind = "TSV" if delimiter == "\t" else "CSV"
            yield Problem(place, f"not {kind}: {error}")
            continue
        if not cells:
            continue
        if not header:
            header = cells
        elif problem := next(filter(None, (_undecoded(cell, place) for cell in cells)), None):
            yield problem
        elif len(cells) != len(header):
            yield Problem(place, f"{len(cells)} cells, but the header has {len(header)}")
        else:
            yield Located(dict(zip(header, cells, strict=True)), place)


def read_parquet(path: Path) -> Iterator[Entry]:
    """Yield a dictionary for each row."""
    import pyarrow  # here, because it takes longer to load than most data sets do
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_struct_array():
                number += 1
                place = Place(str(path), number, is_line=False)
                try:
                    yield Located(row.as_py(), place)
                except UnicodeDecodeError:
                    yield Problem(place, "not UTF-8")
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a parquet file that can be read: {error}") from error


def read_text(path: Path) -> Iterator[Entry]:
    """Yield {"text": paragraph} for each run of lines that are not blank."""
    with _text_file(path) as lines:
        numbered = ((n, line.rstrip("\r\n")) for n, line in enumerate(lines, start=1))
        for blank, group in groupby(numbered, key=lambda item: not item[1].strip()):
            if blank:
                continue
            paragraph = [(Place(str(path), n), line) for n, line in group]
            problems = [problem for at, line in paragraph if (problem := _undecoded(line, at))]
            if problems:
                yield from problems
            else:
                text = "\n".join(line for _, line in paragraph)
                yield Located({"text": text}, paragraph[0][0])


READERS: dict[str, Callable[[Path], Iterator[Entry]]] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".csv": partial(read_table, delimiter=","),
    ".tsv": partial(read_table, delimiter="\t"),
    ".parquet": read_parquet,
    ".txt": read_text,
    ".md": read_text,
}


LINES = (read_json_lines,)  # readers of which each line is a value by itself


def kind_of(path: Path) -> str:
    """Return the ending that says what a file holds, whatever it is compressed with."""
    ending = path.suffix.lower()
    inner = Path(path.stem).suffix.lower()
    return inner if ending in COMPRESSED and inner != ".parquet" else ending


def is_readable(path: Path) -> bool:
    """Return whether a file's name has the ending of a known kind."""
    return kind_of(path) in READERS


def open_bytes(path: Path) -> BinaryIO:
    """Open a file as what it holds, decompressed where its name ends in .gz or .zst."""
    ending = path.suffix.lower()
    if ending == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if ending == ".zst":
        import pyarrow

        compressed = pyarrow.input_stream(str(path), compression="zstd")
        return cast(BinaryIO, io.BufferedReader(compressed, 2**20))
    return path.open("rb")


def _text_file(path: Path) -> TextIO:
    """Open a text file; bytes that are not UTF-8 arrive as surrogates, each in its place."""
    return io.TextIOWrapper(
        open_bytes(path), encoding="utf-8-sig", errors="surrogateescape", newline=""
    )


def _undecoded(text: str, place: Place) -> Problem | None:
    """Return the problem of the first byte that `_text_file` could not decode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        column = len(text[: error.start].encode()) + 1
        return _not_utf8(place, ord(text[error.start]) & 0xFF, column)
    return None


def _not_utf8(place: Place, byte: int, column: int) -> Problem:
    return Problem(place, f"not UTF-8: byte 0x{byte:02x} at byte column {column}")


def _not_json(place: Place, error: ValueError | RecursionError) -> Problem:
    if isinstance(error, RecursionError):
        return Problem(place, "not JSON that can be read: brackets nested too deeply")
    if not isinstance(error, json.JSONDecodeError):
        return Problem(place, f"not JSON that can be read: {error}")
    if error.msg.startswith("Unterminated string"):  # json names where the string begins
        end = len(error.doc) - error.doc.rfind("\n")
        string = f"in a string that begins at column {error.colno}"
        return Problem(place, f"not JSON: it ends at column {end}, {string}")
    hint = "; if each line is a row, name the file .jsonl" if error.msg == "Extra data" else ""
    return Problem(place, f"not JSON: {error.msg} at column {error.colno}{hint}")
