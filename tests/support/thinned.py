"""Which cases of a table every run of the tests takes; the whole of it is a slow proof.

@pytest.mark.thinned                      each value of each parameter, at least once
@pytest.mark.thinned(pairs=True)          each pair of values of two parameters, at least once
@pytest.mark.thinned(one_in=3, first=1)   one case in so many, from the first one on; of a table of
                                          one parameter, whose cases are alike
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest


def thinned(cases: Sequence[Any], is_fast: Callable[[Any], bool]) -> list[Any]:
    """Return the cases as parameters, slow where they are not fast."""
    slow = pytest.mark.slow
    return [pytest.param(case, marks=() if is_fast(case) else slow) for case in cases]


def thin(items: Sequence[pytest.Item]) -> None:
    """Mark the cases of tests that are `thinned` as slow, but for those that every run takes."""
    tables: dict[str, list[Any]] = {}
    for item in items:
        if item.get_closest_marker("thinned") and not item.get_closest_marker("slow"):
            tables.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in tables.values():
        taken = _taken(cases, **cases[0].get_closest_marker("thinned").kwargs)
        for i, item in enumerate(cases):
            if i not in taken:
                item.add_marker(pytest.mark.slow)


def _taken(
    cases: Sequence[Any], *, pairs: bool = False, one_in: int = 0, first: int = 0
) -> set[int]:
    """Return the places of the cases that every run takes: of those that must cover something, each
    time the one that has most that is new, and of several the one whose values were taken least,
    so that each value is tried beside many others."""
    if one_in:
        # A case that is asked for by its name is the only one here.
        return set(range(first % len(cases), len(cases), one_in))
    # A value is the same object in each case of a table.
    values = [
        sorted((name, id(value)) for name, value in case.callspec.params.items()) for case in cases
    ]
    have = [set(itertools.combinations(each, 1 + pairs)) for each in values]
    left, taken = set().union(*have), set()
    times: Counter[tuple[str, int]] = Counter()

    def gain(i: int) -> tuple[int, int]:
        return len(have[i] & left), -sum(times[value] for value in values[i])

    while left:
        best = max(range(len(cases)), key=gain)
        taken.add(best)
        times.update(values[best])
        left -= have[best]
    return taken
