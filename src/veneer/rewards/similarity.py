"""How alike two texts are, between 0 and 1, by characters or by words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial

import regex

_WORD = regex.compile(r"\w+")
MOST_CHARACTERS = 32_768  # of each text: the time grows with the product of both lengths


def common_length(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Return the length of the longest common subsequence.

    A column of the table is the bits of one number (Hyyrö 2004, "Bit-parallel LCS-length
    computation revisited"): a bit is 0 where the length grows.
    """
    positions: dict[Hashable, int] = {}
    for i, item in enumerate(a):
        positions[item] = positions.get(item, 0) | 1 << i
    every = (1 << len(a)) - 1
    column = every
    for item in b:
        matches = column & positions.get(item, 0)
        column = ((column + matches) | (column - matches)) & every
    return len(a) - column.bit_count()


def fuzzy_match(a: str, b: str) -> float:
    """Return 2 · common / (len(a) + len(b)): 1 less the share of characters to add or remove."""
    return _mean_share(common_length(a, b), len(a), len(b))


def rouge_n(a: str, b: str, *, n: int) -> float:
    """Return F1 of the n words in a row that both have (Lin 2004, section 2)."""
    ours, theirs = (
        Counter(zip(*(words[i:] for i in range(n)), strict=False)) for words in map(_words, (a, b))
    )
    return _mean_share((ours & theirs).total(), ours.total(), theirs.total())


def rouge_l(a: str, b: str) -> float:
    """Return F1 of the longest common subsequence of words (Lin 2004, section 3)."""
    ours, theirs = _words(a), _words(b)
    return _mean_share(common_length(ours, theirs), len(ours), len(theirs))


METRICS: Mapping[str, Callable[[str, str], float]] = {
    "fuzzy_match": fuzzy_match,
    **{f"rouge_{n}": partial(rouge_n, n=n) for n in range(1, 6)},
    "rouge_l": rouge_l,
}


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _mean_share(common: int, a: int, b: int) -> float:
    """Return the harmonic mean of common / a and common / b; two empty texts are alike."""
    return 2 * common / (a + b) if a + b else 1.0
