"""The passes in which the samples of a step are computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np

from veneer.data.encode import UNLABELLED, Example
from veneer.data.packing import StepOrder


def passes_of(
    examples: Sequence[Example], *, group: int, tokens_per_batch: int, seed: int
) -> tuple[StepOrder, list[list[int]]]:
    """Return the samples of each pass, of at most so many tokens, and their order.

    group: how many samples that follow each other have one prompt, which they compute once in a
    pass; 1 where each computes its own.
    """
    pieces = list(_pieces(examples, group, tokens_per_batch))
    lengths = [tokens for _, tokens in pieces]
    order = StepOrder(lengths, sum(lengths), tokens_per_batch, seed)
    batches = order.batches(np.arange(len(pieces)))
    return order, [[*chain.from_iterable(pieces[i][0] for i in batch)] for batch in batches]


def _pieces(examples: Sequence[Example], group: int, limit: int) -> Iterator[tuple[list[int], int]]:
    """Yield samples of one prompt, as many as a pass can have, and what of them is computed."""
    for first in range(0, len(examples), group):
        labels = examples[first].labels
        # All but the prompt's last token, at which each answer has a label of its own.
        shared = next(i for i, label in enumerate(labels) if label != UNLABELLED) - 1
        piece: list[int] = []
        tokens = 0
        for row in range(first, first + group):
            length = len(examples[row].tokens)
            if piece and tokens + length - shared > limit:
                yield piece, tokens
                piece, tokens = [], 0
            tokens += length - shared if piece else length
            piece.append(row)
        yield piece, tokens
