"""Regular expressions that name layers, matched within a limit of time.

They come from files of strangers, and some, such as (a|aa)+b, keep Python's `re` busy for years.
The package `regex` reads the same language and has a timeout.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Generic, TypeVar

import regex

from veneer.errors import ConfigError, shortened

Value = TypeVar("Value")
# Processor time for all matches of one Matcher. The first 5 µs of each match do not count: an
# ordinary one takes 1 or 2.
MATCHING_SECONDS, ORDINARY_SECONDS = 0.25, 5e-6
MOST_PATTERNS, LONGEST_PATTERN = 1000, 20_000  # of one adapter, and characters of each
NAMES = re.compile(r"[\w.]+")  # paths, which are compared without a regular expression
ANY_ERROR = (re.error, regex.error, RecursionError, OverflowError, MemoryError)


class Matcher:
    """Matches patterns to paths until its time is up.

    Raises ConfigError for what is no pattern, and for every match after the time is up.
    """

    def __init__(self) -> None:
        self._left = MATCHING_SECONDS

    def at_end(self, pattern: str, path: str) -> bool:
        """Return whether a pattern matches the end of a path, from one of its names on."""
        if NAMES.fullmatch(pattern):
            return _is_end(pattern, path)
        return self._match(_at_end(pattern).match, path, f"the pattern {shortened(pattern)!r}")

    def within(self, target: str, path: str) -> bool:
        """Return whether the pattern of a target, re:pattern, matches any part of a path."""
        pattern, called = target.removeprefix("re:"), repr(shortened(target))
        return self._match(_compiled(pattern, pattern, called).search, path, called)

    def _match(self, match: Callable[..., object], path: str, called: str) -> bool:
        matches, begin = False, time.thread_time()
        try:
            matches = self._left > 0 and match(path, timeout=self._left) is not None
        except (TimeoutError, MemoryError):
            self._left = 0.0
        self._left -= max(0.0, time.thread_time() - begin - ORDINARY_SECONDS)
        if self._left <= 0:
            raise ConfigError(
                f"{called} takes too long to match; write it without repeats inside of repeats"
            )
        return matches


class ByPath(Generic[Value]):
    """For each path the value of the first pattern that matches its end, or the default.

    `of` raises ConfigError for patterns that take too long.
    """

    def __init__(self, patterns: Mapping[str, Value], default: Value) -> None:
        self._patterns, self._default = patterns, default
        self._matcher = Matcher()
        self._values: dict[str, Value] = {}

    def of(self, path: str) -> Value:
        """Return the value for the layer at `path`."""
        if path not in self._values:
            matching = (p for p in self._patterns if self._matcher.at_end(p, path))
            first = next(matching, None)
            self._values[path] = self._default if first is None else self._patterns[first]
        return self._values[path]


def pattern_problems(patterns: Sequence[str]) -> list[str]:
    """Return a problem for each pattern that is no regular expression for the end of a path."""
    expressions = [pattern for pattern in patterns if not NAMES.fullmatch(pattern)]
    if len(expressions) > MOST_PATTERNS:
        return [f"{len(expressions):,} patterns are more than the {MOST_PATTERNS:,} of an adapter"]
    problems = []
    for pattern in expressions:
        try:
            _at_end(pattern)
        except ConfigError as error:
            problems.append(str(error))
    return problems


def _is_end(names: str, path: str) -> bool:
    """Return whether (.*\\.)?(names)$ matches a path; in an expression, a dot is any character."""
    before = len(path) - len(names) - 1
    if before < -1 or (before >= 0 and path[before] != "."):
        return False
    end = path[before + 1 :]
    return end == names or all(a in (b, ".") for a, b in zip(names, end, strict=True))


def _at_end(pattern: str) -> Any:
    # Exactly PEFT's rule (get_pattern_key in peft/utils/other.py): a pattern may number its groups.
    return _compiled(pattern, rf"(.*\.)?({pattern})$", f"the pattern {shortened(pattern)!r}")


@lru_cache(maxsize=4 * MOST_PATTERNS)
def _compiled(pattern: str, whole: str, called: str) -> Any:
    if len(pattern) > LONGEST_PATTERN:
        raise ConfigError(f"{called} has more than {LONGEST_PATTERN:,} characters")
    try:
        re.compile(pattern)
        re.compile(whole)  # what only `regex` reads would have another meaning in PEFT
        return regex.compile(whole)
    except ANY_ERROR as error:
        raise ConfigError(f"{called} is no regular expression ({error})") from error
