"""Rows of several sources: as many of each as its weight says, and none twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from veneer.data.chunk import digest_of, runs_of
from veneer.data.encode import Example
from veneer.data.shuffle import Shuffled
from veneer.data.table import IN_MEMORY, ExampleTable

if TYPE_CHECKING:
    from numpy.typing import NDArray


def weighted_rows(
    counts: Sequence[int], weights: Sequence[float], *, seed: int
) -> NDArray[np.int64]:
    """Return the rows of an epoch, ascending, where those of the sources follow each other.

    counts: rows of each source. An epoch has as many rows as all sources together, of each source
    its weight's share. A source of fewer rows is repeated, each row as often as any other or once
    more; of one with more, some are drawn. The seed decides which; they are the same in each epoch.
    """
    total, whole = sum(counts), sum(weights)
    borders = np.round(np.cumsum(weights) / whole * total).astype(np.int64)
    rows = []
    first = 0
    for number, (count, share) in enumerate(
        zip(counts, np.diff(borders, prepend=0).tolist(), strict=True)
    ):
        times = np.full(count, share // count if count else 0)
        times[Shuffled(count, (seed, number)).between(0, share % count if count else 0)] += 1
        rows.append(first + np.repeat(np.arange(count), times))
        first += count
    return np.concatenate(rows)


def duplicates(examples: Sequence[Example]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows whose tokens and labels an earlier row has too, ascending, and for each that
    earlier row, the first of its kind."""
    repeated: list[NDArray[np.int64]] = []
    firsts: list[NDArray[np.int64]] = []
    chunks = -(-len(examples) // IN_MEMORY)
    for chunk in range(chunks):
        rows, digests = _of_part(examples, chunk, chunks)
        order = np.argsort(digests, kind="stable")
        ordered = digests[order]
        begins = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
        first = np.repeat(order[begins], np.diff(np.append(begins, len(order))))
        again = order != first
        repeated.append(rows[order[again]])
        firsts.append(rows[first[again]])
    if not chunks:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    rows, originals = np.concatenate(repeated), np.concatenate(firsts)
    # Eight bytes may be the same of two rows that are not.
    same = np.fromiter(
        (_alike(examples[a], examples[b]) for a, b in zip(rows, originals, strict=True)),
        np.bool_,
        len(rows),
    )
    rows, originals = rows[same], originals[same]
    order = np.argsort(rows)
    return rows[order], originals[order]


def _of_part(
    examples: Sequence[Example], chunk: int, chunks: int
) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Return the rows whose hash belongs to a part, and their hashes. Equal rows are in one."""
    rows, hashes = [], []
    first = 0
    for digests in _digests(examples):
        chosen = np.flatnonzero(digests % np.uint64(chunks) == chunk)
        rows.append(first + chosen)
        hashes.append(digests[chosen])
        first += len(digests)
    return np.concatenate(rows), np.concatenate(hashes)


def _digests(examples: Sequence[Example]) -> Iterator[NDArray[np.uint64]]:
    if isinstance(examples, ExampleTable) and examples.rows is None:
        yield from examples.chunks.digests()
        return
    hashes = (digest_of(example.tokens, runs_of(example.labels)) for example in examples)
    yield np.frombuffer(b"".join(hashes), np.uint64)


def _alike(one: Example, other: Example) -> bool:
    return one.tokens == other.tokens and one.labels == other.labels
