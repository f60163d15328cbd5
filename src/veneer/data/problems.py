"""Places in files, and what is wrong there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from veneer.errors import MOST_PROBLEMS, DataError, listed

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


def data_error(heading: str, problems: Iterable[Problem]) -> DataError:
    """Return the error with all problems by their place, of which the message has the first 50."""
    lines = [str(problem) for problem in sorted(problems, key=lambda problem: problem.place)]
    return DataError(listed([heading, *lines], most=1 + MOST_PROBLEMS, between="\n  "), lines)
