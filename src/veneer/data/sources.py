"""Training data from files: every good row with its place, and every problem with its place."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from veneer.data.hub import has_no_configuration, is_hub, read_hub, splits_of_hub
from veneer.data.problems import Located, Place, Problem, data_error
from veneer.data.readers import DAMAGED, READERS, Entry, is_readable, kind_of
from veneer.data.rows import Row, parse_row
from veneer.errors import ConfigError, DataError, nearest

T = TypeVar("T")
Split = Literal["train", "valid", "test"]

# What a person names as data: a file, a directory, a pattern or a data set of the hub; or several.
Data = str | Path | Sequence[str | Path]

_NUMBER = re.compile(r"-?\d+(\.\d*)?|\.\d+")
_SPLIT = re.compile(r"(train|valid|test)(?:(?<=valid)ation)?(?![a-z])", re.IGNORECASE)


def read_rows(
    data: Data, *, split: Split = "train", limit: int | None = None
) -> tuple[list[Located[Row]], list[Problem]]:
    """Return the rows of a file, or of a directory's files for `split`, and their problems.

    `limit`: the good rows after which to stop. Raises DataError where `data` is missing, cannot be
    read, is of an unknown kind, or holds nothing.
    """
    return read_values(data, parse_row, split=split, limit=limit)


def read_values(
    data: Data, parse: Callable[[object], T], *, split: Split = "train", limit: int | None = None
) -> tuple[list[Located[T]], list[Problem]]:
    """Return what `read_rows` does, of values that `parse` makes of those in the files."""
    rows: list[Located[T]] = []
    problems: list[Problem] = []
    for file in files_of(data, split):
        empty = True
        for row in parsed_values(file, parse):
            if len(rows) == limit:
                return rows, problems
            empty = False
            if isinstance(row, Problem):
                problems.append(row)
            else:
                rows.append(row)
        if empty:
            raise no_rows_in(file)
    return rows, problems


def parsed_values(file: Path, parse: Callable[[object], T]) -> Iterator[Located[T] | Problem]:
    """Yield what `parse` makes of each value in a file, or what is wrong with it.

    `parse` raises ValueError, with the reason, for a value that it cannot take. Raises DataError
    where the file cannot be read.
    """
    with readable(file):
        yield from _parsed(entries_of(file), parse)


def entries_of(file: Path) -> Iterator[Entry]:
    """Yield the values of a file, or of a split of a data set of the hub, with their places."""
    return read_hub(file) if is_hub(file) else READERS[kind_of(file)](file)


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """In this context, raise DataError where the file cannot be read."""
    try:
        yield
    except (OSError, *DAMAGED) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"{file} cannot be read: {why}") from error


def no_rows_in(file: Path | str) -> DataError:
    """Return the error for a file that holds nothing."""
    return DataError(f"{file} holds no rows; give one row a line, or leave the file out")


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


def parse_values(
    values: Iterable[object], parse: Callable[[object], T], *, limit: int | None = None
) -> tuple[list[Located[T]], list[Problem]]:
    """Return what `read_values` does, from values that are decoded already."""
    rows: list[Located[T]] = []
    problems: list[Problem] = []
    entries = (Located(value, Place("", n, is_line=False)) for n, value in enumerate(values, 1))
    for row in _parsed(entries, parse):
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
class Source:
    """A path that a person names as data, and its share of an epoch's rows where it has one."""

    path: Path
    weight: float | None = None


def sources_of(data: Data) -> list[Source]:
    """Return the sources of data as a person spells it: a path, or several, each perhaps with its
    weight behind a colon. Raises ConfigError for weights that cannot be."""
    sources = [_source(text) for text in spelt(data)]
    if not sources:
        raise ConfigError("There is no data; name a file, a directory or a pattern.")
    weighted = [source for source in sources if source.weight is not None]
    if len(sources) == len(weighted) == 1 and has_no_configuration(path := sources[0].path):
        number = spelt(data)[0].rpartition(":")[2]
        raise ConfigError(
            f"{path}:{number}: a number behind a name is a weight, and one data set alone needs "
            f"none. Leave it out, or write {path}:{number}:1 for the configuration {number!r}."
        )
    if weighted and len(weighted) < len(sources):
        without = ", ".join(str(source.path) for source in sources if source.weight is None)
        raise ConfigError(f"Give a weight to all data or to none; {without} has none.")
    return sources


def spelt(data: Data) -> list[str]:
    """Return the paths of data, with their weights, as texts."""
    return [str(data)] if isinstance(data, str | Path) else [str(path) for path in data]


def _source(text: str) -> Source:
    path, colon, number = text.rpartition(":")
    if not colon or Path(text).exists():
        return Source(Path(text))
    is_number = _NUMBER.fullmatch(number)
    if not is_number and not Path(path).is_file():
        return Source(Path(text))
    if not is_number or not 0 < float(number) < math.inf:
        raise ConfigError(
            f"{text}: a weight of data must be a number above 0, as in rows.jsonl:0.7, not "
            f"{number!r}."
        )
    return Source(Path(path), float(number))


@dataclass(frozen=True, slots=True)
class Splits:
    """The files of rows in a directory, by what they are for; `others` are for nothing."""

    train: list[Path]
    valid: list[Path] = field(default_factory=list)
    test: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)


def splits_of(data: Data) -> Splits:
    """Return the files of rows that a person names as data, by the split that they are for.

    Of a directory, a file's name says its split where it begins with train, valid, validation or
    test. Where no file is named so for training, all that name no split are for training. Of a
    pattern (`*`, `?`, `[`), all files that match are for training; of a data set of the hub, its
    splits are as they are called there.
    Raises DataError where a path is missing, or of an unknown kind.
    """
    of_each = [_splits_of(source.path) for source in sources_of(data)]
    train, valid, test, others = (
        [file for splits in of_each for file in getattr(splits, name)]
        for name in ("train", "valid", "test", "others")
    )
    return Splits(train, valid, test, others)


def _splits_of(path: Path) -> Splits:
    endings = ", ".join(READERS)
    if is_hub(path):
        return Splits(**splits_of_hub(path))
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if is_readable(file))
        if not files:
            raise DataError(f"{path} holds no file of a known kind ({endings})")
        named: dict[str, list[Path]] = {"train": [], "valid": [], "test": [], "": []}
        for file in files:
            split = _SPLIT.match(file.stem)
            named[split[1].lower() if split else ""].append(file)
        train, others = (named["train"], named[""]) if named["train"] else (named[""], [])
        return Splits(train, named["valid"], named["test"], others)
    if not path.exists():
        if any(sign in str(path) for sign in "*?["):
            return Splits(_matching(path))
        siblings = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{path} does not exist{nearest(path.name, siblings)}")
    if not is_readable(path):
        raise DataError(
            f"{path} is of an unknown kind; give it one of the endings {endings} (text also .gz "
            "or .zst behind it)"
        )
    return Splits([path])


def _matching(pattern: Path) -> list[Path]:
    """Return the files of known kinds that a pattern matches."""
    top = Path(pattern.anchor)
    matches = sorted(top.glob(str(pattern.relative_to(top))))
    if files := [file for file in matches if file.is_file() and is_readable(file)]:
        return files
    what = "no file of a known kind" if matches else "nothing"
    raise DataError(f"{pattern} matches {what}; a pattern may have *, ?, [...] and **")


def has_valid_files(data: Data) -> bool:
    """Return whether there are rows to evaluate on where the data is."""
    try:
        return bool(splits_of(data).valid)
    except (DataError, OSError):
        return False  # reading it will say why


def files_of(data: Data, split: Split = "train") -> list[Path]:
    """Return the files of rows that are for `split`.

    Where none are, those for training are. Raises DataError where there are none either, or where
    a path is missing or of an unknown kind.
    """
    return [file for source in sources_of(data) for file in files_of_source(source.path, split)]


def files_of_source(path: Path, split: Split = "train") -> list[Path]:
    """Return what `files_of` does, of one path."""
    splits = _splits_of(path)
    files = {"train": splits.train, "valid": splits.valid, "test": splits.test}[split]
    if not (files or splits.train):
        names = ", ".join(file.name for file in [*splits.valid, *splits.test])
        raise DataError(f"{path} holds no file to train on, only {names}; name one train.*")
    return files or splits.train
