"""Training data from files: every good row with its place, and every problem with its place."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from veneer.data.problems import Located, Place, Problem, data_error
from veneer.data.readers import READERS, Entry
from veneer.data.rows import Row, parse_row
from veneer.errors import DataError, nearest

T = TypeVar("T")
Split = Literal["train", "valid", "test"]

_SPLIT = re.compile(r"(train|valid|test)(?:(?<=valid)ation)?(?![a-z])", re.IGNORECASE)


def read_rows(
    path: Path, *, split: Split = "train", limit: int | None = None
) -> tuple[list[Located[Row]], list[Problem]]:
    """Return the rows of a file, or of a directory's files for `split`, and their problems.

    `limit`: the good rows after which to stop. Raises DataError where `path` is missing, cannot be
    read, is of an unknown kind, or holds nothing.
    """
    rows: list[Located[Row]] = []
    problems: list[Problem] = []
    for file in files_of(path, split):
        empty = True
        for row in parsed_values(file, parse_row):
            if len(rows) == limit:
                return rows, problems
            empty = False
            if isinstance(row, Problem):
                problems.append(row)
            else:
                rows.append(row)
        if empty:
            raise DataError(f"{file} holds no rows; give one row a line, or leave the file out")
    return rows, problems


def parsed_values(file: Path, parse: Callable[[object], T]) -> Iterator[Located[T] | Problem]:
    """Yield what `parse` makes of each value in a file, or what is wrong with it.

    `parse` raises ValueError, with the reason, for a value that it cannot take. Raises DataError
    where the file cannot be read.
    """
    try:
        yield from _parsed(READERS[file.suffix.lower()](file), parse)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error


def _parsed(
    entries: Iterable[Entry], parse: Callable[[object], T]
) -> Iterator[Located[T] | Problem]:
    for entry in entries:
        if isinstance(entry, Problem):
            yield entry
            continue
        try:
            value = parse(entry.value)
        except ValueError as error:
            yield Problem(entry.place, str(error))
        else:
            yield Located(value, entry.place)


def parse_rows(
    values: Iterable[object], *, limit: int | None = None
) -> tuple[list[Located[Row]], list[Problem]]:
    """Return what `read_rows` does, from rows that are decoded already."""
    rows: list[Located[Row]] = []
    problems: list[Problem] = []
    entries = (Located(value, Place("", n, is_line=False)) for n, value in enumerate(values, 1))
    for row in _parsed(entries, parse_row):
        if len(rows) == limit:
            break
        if isinstance(row, Problem):
            problems.append(row)
        else:
            rows.append(row)
    return rows, problems


def check(rows: list[T], problems: Sequence[Problem], *, skip_bad_rows: bool) -> list[T]:
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


@dataclass(frozen=True, slots=True)
class Splits:
    """The files of rows in a directory, by what they are for; `others` are for nothing."""

    train: list[Path]
    valid: list[Path] = field(default_factory=list)
    test: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)


def splits_of(path: Path) -> Splits:
    """Return the file of rows that `path` is, or those of a directory, by the split they name.

    A file's name says its split where it begins with train, valid, validation or test. Where no
    file is named so for training, all that name no split are for training.
    Raises DataError where `path` is missing, or of an unknown kind.
    """
    endings = ", ".join(READERS)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in READERS)
        if not files:
            raise DataError(f"{path} holds no file of a known kind ({endings})")
        named: dict[str, list[Path]] = {"train": [], "valid": [], "test": [], "": []}
        for file in files:
            split = _SPLIT.match(file.stem)
            named[split[1].lower() if split else ""].append(file)
        train, others = (named["train"], named[""]) if named["train"] else (named[""], [])
        return Splits(train, named["valid"], named["test"], others)
    if not path.exists():
        siblings = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{path} does not exist{nearest(path.name, siblings)}")
    if path.suffix.lower() not in READERS:
        raise DataError(f"{path} is of an unknown kind; give it one of the endings {endings}")
    return Splits([path])


def has_valid_files(path: Path) -> bool:
    """Return whether `path` is a directory with rows to evaluate on."""
    try:
        return bool(splits_of(path).valid)
    except (DataError, OSError):
        return False  # reading it will say why


def files_of(path: Path, split: Split = "train") -> list[Path]:
    """Return the file of rows that `path` is, or those of a directory that are for `split`.

    Where none are, those for training are. Raises DataError where there are none either, or where
    `path` is missing or of an unknown kind.
    """
    splits = splits_of(path)
    files = {"train": splits.train, "valid": splits.valid, "test": splits.test}[split]
    if not (files or splits.train):
        names = ", ".join(file.name for file in [*splits.valid, *splits.test])
        raise DataError(f"{path} holds no file to train on, only {names}; name one train.*")
    return files or splits.train
