"""Which cases of a table every run of the tests takes."""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from support.thinned import _taken

TABLE = {"architecture": ("llama", "gpt2", "phi", "qwen3"), "dtype": (16, 32), "bits": (None, 4, 8)}


def cases(table: Mapping[str, Iterable[Any]]) -> list[Any]:
    """Return what pytest makes of a table: a case for each combination of its values."""
    each = itertools.product(*table.values())
    params = [dict(zip(table, values, strict=True)) for values in each]
    return [SimpleNamespace(callspec=SimpleNamespace(params=own)) for own in params]


@pytest.mark.parametrize("pairs", [False, True])
def test_every_value_or_every_pair_of_two_is_taken(pairs):
    every = cases(TABLE)
    taken = [every[i].callspec.params for i in _taken(every, pairs=pairs)]
    for names in itertools.combinations(TABLE, 1 + pairs):
        seen = {tuple(case[name] for name in names) for case in taken}
        assert seen == {*itertools.product(*(TABLE[name] for name in names))}
    assert len(taken) < len(every) * 2 // 3 if pairs else len(taken) == len(TABLE["architecture"])


def test_values_are_taken_equally_often():
    every = cases(TABLE)
    taken = Counter(every[i].callspec.params["dtype"] for i in _taken(every))
    assert taken == {16: 2, 32: 2}


def test_shares_have_all_cases_between_them_and_a_case_that_is_asked_for_by_its_name():
    every = cases({"name": range(7)})
    shares = [_taken(every, one_in=3, first=first) for first in range(3)]
    assert sorted(i for share in shares for i in share) == list(range(7))
    assert _taken(every[:1], one_in=3, first=2) == {0}
