"""Where to cut a row that is too long, so that its pieces hold all of its tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from veneer.data.spans import Span

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PARAGRAPHS = re.compile(r"\n[^\S\n]*\n\s*")
_SENTENCES = re.compile(r"""(?<=[.!?…])["'”’)\]]*\s+|(?<=[。！？])|\n""")


def pieces_of(
    text: str, offsets: Sequence[Span], *, size: int, least: int, turn_ends: Iterable[int] = ()
) -> list[Span]:
    """Return the first token of each piece and the one behind its last.

    offsets    the tokens' spans of `text`, in order
    size       most tokens of a piece
    least      fewest tokens of every piece but the last
    turn_ends  the characters behind which an answer has ended
    A piece ends where a turn does, else at the end of a paragraph, a sentence, a character: at the
    last such place that is within its size.
    """
    borders = _borders(text, offsets, turn_ends)
    cuts = [0]
    while len(offsets) - cuts[-1] > size:
        low = cuts[-1] + min(least, size)
        ranks = borders[low : cuts[-1] + size + 1]
        cuts.append(low + len(ranks) - 1 - int(np.argmax(ranks[::-1])))
    return list(pairwise([*cuts, len(offsets)]))


def _borders(text: str, offsets: Sequence[Span], turn_ends: Iterable[int]) -> NDArray[np.int64]:
    """Return how good a place each token's beginning is for a cut: 0 is within a character."""
    start, end = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    before = np.concatenate([[0], np.maximum.accumulate(end)[:-1]])
    ranks = (start >= before).astype(np.int64)
    places = np.zeros(len(text) + 1, dtype=np.int64)
    for pattern, rank in ((_SENTENCES, 2), (_PARAGRAPHS, 3)):
        for match in pattern.finditer(text):
            places[match.start() : match.end() + 1] = rank
    places[list(turn_ends)] = 4
    # A tokenizer may leave white space out of its offsets, so a border may have two places.
    best = np.maximum(places[before], places[np.minimum(start, len(text))])
    return np.where(ranks > 0, np.maximum(ranks, best), 0)
