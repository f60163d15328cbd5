"""How often each word occurs in texts, in bounded memory."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

MOST = 2_000_000  # different words that are counted; of more, the rarest are forgotten

_WORD = re.compile(r"[^\W\d_]{4,}")


def count_words(texts: Iterable[str]) -> Counter[str]:
    """Return how often each word of four letters or more occurs."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(_WORD.findall(text))
    return counts


def add_up(counts: Counter[str], more: Counter[str]) -> None:
    """Add counts to others, in place. Beyond `MOST` words only the more frequent half stays: a word
    that was rare so far begins anew."""
    for word, count in more.items():
        counts[word] += count
    if len(counts) > MOST:
        most_common = counts.most_common(MOST // 2)
        counts.clear()
        counts.update(dict(most_common))
