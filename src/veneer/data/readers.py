"""Files of rows, by suffix: each reader yields (line or row, decoded value)."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TextIO

from veneer.errors import DataError


@dataclass(frozen=True, slots=True)
class Fault:
    """What stands where a value should, and why it could not be read."""

    what: str


# Where in the file ("12" for a line, "row 3" where a file has no lines), and what stands there.
Value = tuple[str, object]

_BOM = b"\xef\xbb\xbf"
_BETWEEN_ITEMS = re.compile(r"[ \t\r\n]*[\[,\]]?[ \t\r\n]*")
# Python's own limit of 131,072 characters a cell is less than one long document.
_CELL_LIMIT = 2**31 - 1


def read_json_lines(path: Path) -> Iterator[Value]:
    """Yield one value for each line that is not blank."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            line = line.removeprefix(_BOM) if number == 1 else line
            if line.strip():
                yield str(number), _json_line(line)


def _json_line(line: bytes) -> object:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        return _not_utf8(line[error.start], error.start + 1)
    except (ValueError, RecursionError) as error:
        return _not_json(error)


def read_json(path: Path) -> Iterator[Value]:
    """Yield the items of a list, or of the list that an object holds under `data`.

    A file with a fault in its syntax yields that fault alone: no telling what else it breaks.
    """
    raw = path.read_bytes().removeprefix(_BOM)
    try:
        text = raw.decode()
        value = json.loads(text) if text.strip() else []
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - raw.rfind(b"\n", 0, error.start)
        yield str(line), _not_utf8(raw[error.start], column)
    except (ValueError, RecursionError) as error:
        yield str(getattr(error, "lineno", 1)), _not_json(error)
    else:
        if isinstance(value, list):
            yield from _with_lines(text)
        elif isinstance(value, dict) and isinstance(value.get("data"), list):
            yield from ((f"row {n}", item) for n, item in enumerate(value["data"], start=1))
        else:
            yield "1", Fault('the file must hold a list of rows, or {"data": [rows]}')


def _with_lines(text: str) -> Iterator[Value]:
    """Yield each item of the list that `text` is, with the line where the item begins."""
    decoder = json.JSONDecoder()
    line, counted = 1, 0
    position = _item_start(text, 0)
    while position < len(text):
        line, counted = line + text.count("\n", counted, position), position
        value, end = decoder.raw_decode(text, position)
        yield str(line), value
        position = _item_start(text, end)


def _item_start(text: str, position: int) -> int:
    """Return where the next item starts: behind space, a bracket or a comma, and space."""
    found = _BETWEEN_ITEMS.match(text, position)
    assert found is not None  # the pattern matches the empty string
    return found.end()


def read_table(path: Path, *, delimiter: str) -> Iterator[Value]:
    """Yield a dictionary for each line under the header that is not blank."""
    limit = csv.field_size_limit(_CELL_LIMIT)
    try:
        with _text_file(path) as lines:
            yield from _table_rows(lines, delimiter)
    finally:
        csv.field_size_limit(limit)


def _table_rows(lines: TextIO, delimiter: str) -> Iterator[Value]:
    table = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        line = str(table.line_num + 1)
        try:
            cells = next(table)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, Fault(f"not {'CSV' if delimiter == ',' else 'TSV'}: {error}")
            continue
        if not cells:
            continue
        if not header:
            header = cells
        elif fault := next(filter(None, map(_undecoded, cells)), None):
            yield line, fault
        elif len(cells) != len(header):
            yield line, Fault(f"{len(cells)} cells, but the header has {len(header)}")
        else:
            yield line, dict(zip(header, cells, strict=True))


def read_parquet(path: Path) -> Iterator[Value]:
    """Yield a dictionary for each row."""
    import pyarrow  # here, because it takes longer to load than most data sets do
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_struct_array():
                number += 1
                try:
                    yield f"row {number}", row.as_py()
                except UnicodeDecodeError:
                    yield f"row {number}", Fault("not UTF-8")
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a parquet file that can be read: {error}") from error


def read_text(path: Path) -> Iterator[Value]:
    """Yield {"text": paragraph} for each run of lines that are not blank."""
    with _text_file(path) as lines:
        numbered = ((n, line.rstrip("\r\n")) for n, line in enumerate(lines, start=1))
        for blank, group in groupby(numbered, key=lambda item: not item[1].strip()):
            if blank:
                continue
            block = list(group)
            faults = [(str(n), fault) for n, line in block if (fault := _undecoded(line))]
            if faults:
                yield from faults
            else:
                yield str(block[0][0]), {"text": "\n".join(line for _, line in block)}


READERS: dict[str, Callable[[Path], Iterator[Value]]] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".csv": partial(read_table, delimiter=","),
    ".tsv": partial(read_table, delimiter="\t"),
    ".parquet": read_parquet,
    ".txt": read_text,
    ".md": read_text,
}


def _text_file(path: Path) -> TextIO:
    """Open a text file; bytes that are not UTF-8 arrive as surrogates, each in its place."""
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def _undecoded(text: str) -> Fault | None:
    """Return the fault of the first byte that `_text_file` could not decode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        column = len(text[: error.start].encode()) + 1
        return _not_utf8(ord(text[error.start]) & 0xFF, column)
    return None


def _not_utf8(byte: int, column: int) -> Fault:
    return Fault(f"not UTF-8: byte 0x{byte:02x} at byte column {column}")


def _not_json(error: ValueError | RecursionError) -> Fault:
    if isinstance(error, RecursionError):
        return Fault("not JSON that can be read: brackets nested too deeply")
    if not isinstance(error, json.JSONDecodeError):
        return Fault(f"not JSON that can be read: {error}")
    hint = "; if each line is a row, name the file .jsonl" if error.msg == "Extra data" else ""
    return Fault(f"not JSON: {error.msg} at column {error.colno}{hint}")
