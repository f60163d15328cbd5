"""Which rows make up which step, and several rows as one batch without padding."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import chain, pairwise
from typing import TYPE_CHECKING, overload

import numpy as np

from veneer.data.encode import UNLABELLED, Example
from veneer.data.shuffle import WHOLE, Shuffled
from veneer.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

SECTION = 2**18  # of many rows in shuffled order, those that are cut into steps at a time


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows laid end to end, T tokens in all, as int64 arrays.

    tokens     (T,)
    labels     (T,)    the token to predict at each place: the row's next one where that is
                       learnt, else -100; always -100 at the last token of a row
    positions  (T,)    from 0 in each row, or from where it goes on with another's beginning
    lengths    (rows,) tokens of each row
    rows       (rows,) which example each row is of; a pair is two rows, one behind the other
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    positions: NDArray[np.int64]
    lengths: NDArray[np.int64]
    rows: NDArray[np.int64]

    @property
    def before(self) -> list[int]:
        """How many tokens each row sees before its own: so many first ones of the last row that
        sees none."""
        firsts = np.cumsum(self.lengths) - self.lengths
        before: list[int] = self.positions[firsts].tolist()
        return before

    @property
    def has_pairs(self) -> bool:
        """Whether its examples are pairs, as all of a run are, or none."""
        return bool((self.rows[1:2] == self.rows[:1]).any())


def pack(examples: Sequence[Example], indices: Sequence[int]) -> Batch:
    """Return the batch of `examples[i]` for each i of `indices`, in this order."""
    of_indices = [(i, row) for i in indices for row in _rows_of(examples[i])]
    rows = [row for _, row in of_indices]
    shifted = [[*labels[1:], UNLABELLED] for _, labels in rows]
    return Batch(
        tokens=_joined(tokens for tokens, _ in rows),
        labels=_joined(shifted),
        positions=_joined(range(len(tokens)) for tokens, _ in rows),
        lengths=np.array([len(tokens) for tokens, _ in rows], dtype=np.int64),
        rows=np.array([i for i, _ in of_indices], dtype=np.int64),
    )


def _rows_of(example: Example) -> list[tuple[list[int], list[int]]]:
    """Return the tokens and labels of each row of an example."""
    tokens, labels, second = example.tokens, example.labels, example.second
    if not second:
        return [(tokens, labels)]
    return [(tokens[:second], labels[:second]), (tokens[second:], labels[second:])]


def joined(batches: Sequence[Batch]) -> Batch:
    """Return the rows of several batches, of any examples each, as one batch, in their order."""
    names = [field.name for field in fields(Batch)]
    return Batch(*(np.concatenate([getattr(each, name) for each in batches]) for name in names))


def sharing_prompts(batch: Batch) -> Batch:
    """Return the batch in which a prompt of rows that follow each other is in the first of them
    alone: of the rows of an example, what both begin with, and of others only a whole prompt. A
    later row goes on from the prompt's last token, which predicts another token there. Label tokens
    stay, in their order."""
    lengths, is_kept = batch.lengths.copy(), np.ones(len(batch.tokens), dtype=bool)
    starts = np.cumsum(lengths) - lengths
    labelled = np.append(np.flatnonzero(batch.labels != UNLABELLED), len(batch.labels))
    # Tokens of each row's beginning that predict nothing that is learnt.
    prompts = np.minimum(labelled[np.searchsorted(labelled, starts)] - starts, lengths - 1)
    whole = 0
    for row in range(1, len(batch.rows)):
        count = int(prompts[[whole, row]].min())
        one, other = (batch.tokens[starts[i] : starts[i] + count] for i in (whole, row))
        same = one == other
        shared = count if same.all() else int(same.argmin())
        if shared and (shared == prompts[row] or batch.rows[row] == batch.rows[whole]):
            is_kept[starts[row] : starts[row] + shared] = False
            lengths[row] -= shared
        else:
            whole = row
    return Batch(
        tokens=batch.tokens[is_kept],
        labels=batch.labels[is_kept],
        positions=batch.positions[is_kept],
        lengths=lengths,
        rows=batch.rows,
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
        positions=np.concatenate([batch.positions, np.arange(missing) % np.max(batch.lengths)]),
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

    lengths: Sequence[int] | NDArray[np.integer]
    tokens_per_step: int
    tokens_per_batch: int
    seed: int
    in_front: int = 0

    def epoch(self, epoch: int) -> Epoch:
        """Return steps, each of batches, each of row indices; every row is in one of them.

        Steps are filled in shuffled order. The rows of a step go into its batches by length, the
        longest first, so that rows of like length share one and memory peaks at once.
        """
        return Epoch(self, Shuffled(len(self.lengths), (self.seed, epoch)))

    def steps(self, epochs: float) -> int:
        """Return how many steps `epochs` are, at least one.

        Of more rows than are shuffled as a whole, the mean of their first section counts for all.
        """
        whole, rows = int(epochs), len(self.lengths)
        if rows > WHOLE:
            return max(1, math.ceil(epochs * rows / SECTION * len(self.epoch(0).section(0))))
        steps = sum(len(self.epoch(epoch)) for epoch in range(whole))
        if epochs > whole:
            steps += math.ceil((epochs - whole) * len(self.epoch(whole)))
        return max(1, steps)

    def batches(self, step: NDArray[np.int64]) -> list[list[int]]:
        """Return the batches of a step's rows."""
        lengths = _lengths_of(self.lengths, step)
        longest_first = np.argsort(-lengths, kind="stable")
        step, lengths = step[longest_first], lengths[longest_first]
        cuts = _cuts(lengths + self.in_front, self.tokens_per_batch)
        return [step[start:end].tolist() for start, end in pairwise(cuts)]

    def deal(self, step: Sequence[Sequence[int]], size: int) -> list[list[list[int]]]:
        """Return the batches of each of `size` processes, which share the rows of a step.

        All have about the same tokens: each row, the longest first, goes to whoever has fewest. All
        have equally many batches, so that all make the same passes; some are empty where there are
        not rows for all.
        """
        if size == 1:
            return [[list(batch) for batch in step]]
        rows = np.array(list(chain.from_iterable(step)), dtype=np.int64)
        lengths = _lengths_of(self.lengths, rows) + self.in_front
        shares: list[list[int]] = [[] for _ in range(size)]
        tokens = [0] * size
        for i in np.argsort(-lengths, kind="stable").tolist():
            fewest = tokens.index(min(tokens))
            shares[fewest].append(i)
            tokens[fewest] += int(lengths[i])
        dealt = [self.batches(rows[share]) for share in shares]
        most = max(map(len, dealt))
        return [batches + [[]] * (most - len(batches)) for batches in dealt]


class Epoch(Sequence[list[list[int]]]):
    """The steps of one epoch, each made when it is asked for.

    Many rows are cut into steps in sections of the shuffled order, one after another, so that the
    first steps do not wait for the last. `len` cuts all of them; `has` only those up to a step.
    """

    def __init__(self, order: StepOrder, shuffled: Shuffled) -> None:
        self._order, self._shuffled = order, shuffled
        size = shuffled.n if shuffled.n <= WHOLE else SECTION
        self._starts = range(0, shuffled.n, max(1, size))
        self._ends: list[int] = []  # the steps up to the end of each section that was cut
        self._recent: tuple[int, list[NDArray[np.int64]]] | None = None

    def section(self, number: int) -> list[NDArray[np.int64]]:
        """Return the rows of each step of a section."""
        if self._recent is None or self._recent[0] != number:
            start = self._starts[number]
            rows = self._shuffled.between(start, start + self._starts.step)
            lengths = _lengths_of(self._order.lengths, rows)
            cuts = _cuts(lengths, self._order.tokens_per_step)
            self._recent = number, [rows[start:end] for start, end in pairwise(cuts)]
        return self._recent[1]

    def _cut_until(self, step: float) -> None:
        """Cut as many sections as it takes to know in which a step is."""
        while len(self._ends) < len(self._starts) and (not self._ends or self._ends[-1] <= step):
            before = self._ends[-1] if self._ends else 0
            self._ends.append(before + len(self.section(len(self._ends))))

    def has(self, step: int) -> bool:
        """Return whether the epoch has a step of this number, from 0."""
        self._cut_until(step)
        return bool(self._ends) and step < self._ends[-1]

    def __len__(self) -> int:
        self._cut_until(math.inf)
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, step: int) -> list[list[int]]: ...

    @overload
    def __getitem__(self, step: slice) -> list[list[list[int]]]: ...

    def __getitem__(self, step: int | slice) -> list[list[int]] | list[list[list[int]]]:
        if isinstance(step, slice):
            return [self[i] for i in range(*step.indices(len(self)))]
        step = step + len(self) if step < 0 else step
        if step < 0 or not self.has(step):
            raise IndexError(f"The epoch has no step {step}.")
        number = bisect_right(self._ends, step)
        before = self._ends[number - 1] if number else 0
        return self._order.batches(self.section(number)[step - before])

    def __eq__(self, other: object) -> bool:
        """Two epochs are equal where their steps are."""
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


def held_out_rows(n: int, *, eval_rows: int, seed: int) -> NDArray[np.int64]:
    """Return which `eval_rows` of `n` rows are held out, ascending.

    Raises DataError where no row would be left to train on.
    """
    if eval_rows >= n:
        raise DataError(f"{eval_rows} of {n} rows held out leave none to train on; hold out fewer")
    return np.sort(Shuffled(n, (seed,)).between(0, eval_rows))


def idle_rows(step: Sequence[Sequence[int]]) -> list[int]:
    """Return the row of a step that a process without rows takes through the model where others
    have a batch: what it computes does not count, but a base that is sharded needs all at work."""
    return [step[-1][-1]]


def split_held_out(n: int, *, eval_rows: int, seed: int) -> tuple[list[int], list[int]]:
    """Return which of `n` rows train and which `eval_rows` of them are held out, each ascending.

    Raises DataError where no row would be left to train on.
    """
    evaluation = held_out_rows(n, eval_rows=eval_rows, seed=seed)
    return np.delete(np.arange(n), evaluation).tolist(), evaluation.tolist()


def _lengths_of(
    lengths: Sequence[int] | NDArray[np.integer], rows: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the tokens of some rows."""
    return np.asarray(lengths)[rows].astype(np.int64)


def _cuts(lengths: NDArray[np.int64], limit: int) -> list[int]:
    """Return where to cut rows of these lengths, in their order, into the fewest runs of at most
    `limit` tokens, each near an even share: each run's first row, and the number of rows.

    A row longer than `limit` makes a run of its own.
    """
    before = np.concatenate([[0], np.cumsum(lengths)])  # tokens before each possible cut
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
    return cuts


def _earliest_cuts(before: NDArray[np.int64], limit: int) -> list[int]:
    """Return where each run may start at the earliest if no more runs are to follow than must."""
    cuts = [len(before) - 1]
    while cuts[-1] > 0:
        first = int(np.searchsorted(before, before[cuts[-1]] - limit))
        cuts.append(min(first, cuts[-1] - 1))
    return cuts[::-1]


def _joined(rows: Iterable[Sequence[int]]) -> NDArray[np.int64]:
    return np.fromiter(chain.from_iterable(rows), dtype=np.int64)
