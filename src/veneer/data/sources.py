"""Training data from files: every good row with its place, and every fault with its place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from veneer.data.problems import data_error
from veneer.data.readers import READERS, Fault
from veneer.data.rows import Sourced, parse_row
from veneer.errors import DataError, nearest

Row = TypeVar("Row")


def read_rows(path: Path, *, limit: int | None = None) -> tuple[list[Sourced], list[str]]:
    """Return the rows of a file, or of all such files in a directory, and their problems.

    Each problem reads "file:line: what" ("file:row n: what" where a file has no lines). `limit`
    stops after so many good rows. Raises DataError where `path` is missing, cannot be read, is
    of an unknown kind, or holds nothing.
    """
    rows: list[Sourced] = []
    problems: list[str] = []
    for file in files_of(path):
        empty = True
        for where, value in values_of(file):
            if len(rows) == limit:
                return rows, problems
            empty = False
            try:
                if isinstance(value, Fault):
                    raise ValueError(value.what)
                rows.append(Sourced(parse_row(value), where))
            except ValueError as error:
                problems.append(f"{where}: {error}")
        if empty:
            raise DataError(f"{file} holds no rows; give one row a line, or leave the file out")
    return rows, problems


def check(rows: list[Row], problems: Sequence[str], *, skip_bad_rows: bool) -> list[Row]:
    """Return the good rows, in whatever form, if there are no bad ones or these are to be skipped.

    Raises DataError with every problem, or where no good row remains.
    """
    total = len(rows) + len(problems)
    if problems and not skip_bad_rows:
        heading = (
            f"{len(problems)} of {total} rows cannot be used; "
            "mend them, or leave them out with --skip-bad-rows:"
        )
        raise data_error(heading, problems)
    if not rows:
        raise data_error(f"none of {total} rows can be used:", problems)
    return rows


def values_of(file: Path) -> Iterator[tuple[str, object]]:
    """Yield what stands in a file, each with the file's name before its place."""
    try:
        for place, value in READERS[file.suffix.lower()](file):
            yield f"{file}:{place}", value
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error


def files_of(path: Path) -> list[Path]:
    """Return the file of rows that `path` is, or all of them in a directory.

    Raises DataError where it is missing, or of an unknown kind.
    """
    known = ", ".join(READERS)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in READERS)
        if not files:
            raise DataError(f"{path} holds no file of a known kind ({known})")
        return files
    if not path.exists():
        siblings = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{path} does not exist{nearest(path.name, siblings)}")
    if path.suffix.lower() not in READERS:
        raise DataError(f"{path} is of an unknown kind; give it one of the endings {known}")
    return [path]
