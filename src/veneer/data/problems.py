"""Places in files, and what is wrong there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from veneer.errors import MOST_PROBLEMS, DataError, shortened
from veneer.files import new_file

T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """A line of a file, or a row of a file that has no lines; both count from 1. Rows that a
    program hands over have no file."""

    file: str
    number: int
    is_line: bool = True

    def __str__(self) -> str:
        file = f"{self.file}:" if self.file else ""
        return f"{file}{'' if self.is_line else 'row '}{self.number}"


@dataclass(frozen=True, slots=True)
class Located(Generic[T_co]):
    """A value and its place."""

    value: T_co
    place: Place


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong at a place."""

    place: Place
    what: str

    def __str__(self) -> str:
        return f"{self.place}: {self.what}"


def data_error(
    heading: str,
    problems: Iterable[Problem],
    total: int | None = None,
    all_problems: Callable[[], Iterable[Problem]] = tuple,
    report: Path | None = None,
) -> DataError:
    """Return the error with all problems by their place, of which the message has the first 50.

    total: how many there are, where `problems` are only those to show. Where there are more than 50
    and a `report` is named, `all_problems` are written there, a line each.
    """
    lines = [str(problem) for problem in sorted(problems, key=lambda problem: problem.place)]
    total = len(lines) if total is None else total
    shown = [heading, *(shortened(line, 400) for line in lines[:MOST_PROBLEMS])]
    if total > MOST_PROBLEMS:
        where = ""
        if report is not None:
            with new_file(report) as temporary, temporary.open("w", encoding="utf-8") as file:
                file.writelines(f"{problem}\n" for problem in all_problems())
            where = f"; all of them are in {report}"
        shown.append(f"and {total - MOST_PROBLEMS:,} more{where}")
    return DataError("\n  ".join(shown), lines)
