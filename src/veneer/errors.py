"""Every error that Veneer raises on purpose: one tree, each with a message for a person.

An error says what is wrong, where, and what to do. The command line prints it without a traceback
and exits with 2; a program catches `VeneerError`, or `ValueError` where the input was at fault.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any


class VeneerError(Exception):
    """Anything that Veneer refuses or cannot do."""


class ConfigError(VeneerError, ValueError):
    """A setting is out of its range, or two settings contradict each other."""


class TargetError(VeneerError, ValueError):
    """A target, layer range or pattern matches nothing in the model."""


class ModelError(VeneerError, ValueError):
    """A base model cannot be found, read or used."""


class AdapterError(VeneerError, ValueError):
    """An adapter is damaged, of an unknown format, or belongs to another base."""


class MergeError(VeneerError, ValueError):
    """A merged model would lose more of what was learnt than is tolerated."""


class DataError(VeneerError, ValueError):
    """Training data has faults; `problems` holds one line for each."""

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


class VeneerWarning(UserWarning):
    """Something that was done, but perhaps not as a person thinks; a run's Notice says the same."""


class TrainingError(VeneerError, RuntimeError):
    """Training cannot go on; what was saved is kept."""


class RequestError(VeneerError, ValueError):
    """A request names an adapter that is not there, or is too long, or contradicts itself."""


class QueueFull(VeneerError, RuntimeError):
    """As many requests wait as may; come again later."""


# Problems that one message names; a file made to annoy can have a million.
MOST_PROBLEMS = 50


def listed(problems: Sequence[str]) -> str:
    """Return problems in a row: all of them, or the first and how many more there are."""
    more = f"; and {len(problems) - MOST_PROBLEMS:,} more" if len(problems) > MOST_PROBLEMS else ""
    return "; ".join(shortened(problem, 400) for problem in problems[:MOST_PROBLEMS]) + more


def shortened(text: str, most: int = 200) -> str:
    """Return a text, or its beginning where it is too long for a message."""
    return text if len(text) <= most else f"{text[:most]}..."


def nearest(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the known name nearest to `word`, or nothing."""
    # Likeness takes the square of the length, and nobody mistypes so long a name.
    close = get_close_matches(word, list(known), n=1, cutoff=0.5) if len(word) <= 200 else []
    return f"; did you mean {close[0]!r}?" if close else ""


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Return "key (a there, b here)" for each setting in which two runs differ."""
    return [
        f"{key} ({theirs.get(key)!r} there, {ours.get(key)!r} here)"
        for key in sorted({*theirs, *ours})
        if theirs.get(key) != ours.get(key)
    ]
