"""Which rows make up which step, and several rows as one batch without padding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING

import numpy as np

from veneer.data.encode import UNLABELLED, Example
from veneer.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows laid end to end, T tokens in all, as int64 arrays.

    tokens     (T,)
    labels     (T,)    the token to predict at each place: the row's next one where that is
                       learnt, else -100; always -100 at the last token of a row
    positions  (T,)    from 0 in each row
    lengths    (rows,) tokens of each row
    rows       (rows,) which example each row is
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    positions: NDArray[np.int64]
    lengths: NDArray[np.int64]
    rows: NDArray[np.int64]


def pack(examples: Sequence[Example], indices: Sequence[int]) -> Batch:
    """Return the batch of `examples[i]` for each i of `indices`, in this order."""
    rows = [examples[i] for i in indices]
    shifted = [[*row.labels[1:], UNLABELLED] for row in rows]
    return Batch(
        tokens=_joined(row.tokens for row in rows),
        labels=_joined(shifted),
        positions=_joined(range(len(row.tokens)) for row in rows),
        lengths=np.array([len(row.tokens) for row in rows], dtype=np.int64),
        rows=np.array(indices, dtype=np.int64),
    )


def filled_up(batch: Batch, multiple: int, in_front: int = 0) -> Batch:
    """Return the batch with one row more, without labels, so that the number of all tokens is a
    multiple of `multiple`; each row counts with `in_front` tokens more. The row is no example:
    `rows` stays as it is. It has tokens of the batch: the embedding of a padding token is 0, and a
    row of nothing else would have gradients of 0 · ∞ in a model that divides by its length."""
    tokens = len(batch.tokens) + in_front * len(batch.lengths)
    if tokens % multiple == 0:
        return batch
    missing = -(tokens + in_front) % multiple or multiple
    return Batch(
        tokens=np.concatenate([batch.tokens, np.resize(batch.tokens, missing)]),
        labels=np.concatenate([batch.labels, np.full(missing, UNLABELLED)]),
        # No position beyond those of the rows, as the model may not have it.
        positions=np.concatenate([batch.positions, np.arange(missing) % batch.lengths.max()]),
        lengths=np.concatenate([batch.lengths, [missing]]),
        rows=batch.rows,
    )


@dataclass(frozen=True, slots=True)
class StepOrder:
    """The order in which an epoch goes through the rows, a function of `seed` and epoch alone.

    lengths          tokens of each row
    tokens_per_step  most tokens of one optimizer step (there is no padding)
    tokens_per_batch most tokens of one forward and backward pass
    in_front         virtual tokens that a pass takes before each row, beside those of the data
    A row longer than a limit has a step or a batch of its own.
    """

    lengths: Sequence[int]
    tokens_per_step: int
    tokens_per_batch: int
    seed: int
    in_front: int = 0

    def epoch(self, epoch: int) -> list[list[list[int]]]:
        """Return steps, each of batches, each of row indices; every row is in one of them.

        Steps are filled in shuffled order. The rows of a step go into its batches by length, the
        longest first, so that rows of like length share one and memory peaks at once.
        """
        seeds = np.random.SeedSequence([self.seed, epoch])
        order = np.random.default_rng(seeds).permutation(len(self.lengths))
        lengths = np.array(self.lengths, dtype=np.int64)
        return [
            [batch.tolist() for batch in self._batches(step, lengths)]
            for step in _groups(order, lengths, self.tokens_per_step)
        ]

    def _batches(
        self, step: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> list[NDArray[np.int64]]:
        longest_first = step[np.argsort(-lengths[step], kind="stable")]
        return _groups(longest_first, lengths + self.in_front, self.tokens_per_batch)


def split_held_out(n: int, *, eval_rows: int, seed: int) -> tuple[list[int], list[int]]:
    """Return which of `n` rows train and which `eval_rows` of them are held out, each ascending.

    Raises DataError where no row would be left to train on.
    """
    if eval_rows >= n:
        raise DataError(f"{eval_rows} of {n} rows held out leave none to train on; hold out fewer")
    order = np.random.default_rng(seed).permutation(n)
    return np.sort(order[eval_rows:]).tolist(), np.sort(order[:eval_rows]).tolist()


def _groups(
    order: NDArray[np.int64], lengths: NDArray[np.int64], limit: int
) -> list[NDArray[np.int64]]:
    """Cut `order` into the fewest runs of at most `limit` tokens, each near an even share.

    A row longer than `limit` makes a run of its own.
    """
    before = np.concatenate([[0], np.cumsum(lengths[order])])  # tokens before each possible cut
    middles = (before[1:] + before[:-1]) / 2
    earliest = _earliest_cuts(before, limit)
    runs = len(earliest) - 1
    cuts = [0]
    for k in range(1, runs + 1):
        last = cuts[-1]
        share = before[last] + (before[-1] - before[last]) / (runs - k + 1)
        even = int(np.searchsorted(middles, share))
        latest = int(np.searchsorted(before, before[last] + limit, side="right")) - 1
        cuts.append(min(max(even, earliest[k]), max(latest, last + 1)))
    return [order[start:end] for start, end in pairwise(cuts)]


def _earliest_cuts(before: NDArray[np.int64], limit: int) -> list[int]:
    """Return where each run may start at the earliest if no more runs are to follow than must."""
    cuts = [len(before) - 1]
    while cuts[-1] > 0:
        first = int(np.searchsorted(before, before[cuts[-1]] - limit))
        cuts.append(min(first, cuts[-1] - 1))
    return cuts[::-1]


def _joined(rows: Iterable[Sequence[int]]) -> NDArray[np.int64]:
    return np.fromiter(chain.from_iterable(rows), dtype=np.int64)
