"""Spans of a text, and the tokens that hold their characters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Span = tuple[int, int]  # the first character and the one behind the last


def tokens_in_spans(offsets: Sequence[Span], spans: Sequence[Span]) -> NDArray[np.bool_]:
    """Return, for each token, whether it holds a character of any span.

    `offsets` are the tokenizer's spans of the tokens. Several tokens that share a character (the
    bytes of an emoji) all hold it. White space that a tokenizer leaves out of its offsets belongs
    to the token behind it, so a token reaches back to where those before it ended.
    """
    start, end = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    reached = np.maximum.accumulate(np.concatenate([[0], end]))[:-1]
    low = np.minimum(start, reached)
    high = np.maximum(end, low + 1)
    held = np.zeros(len(low), dtype=np.bool_)
    for first, behind in spans:
        held |= (low < behind) & (first < high)
    return held
