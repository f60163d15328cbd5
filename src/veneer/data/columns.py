"""Examples by their columns: what is known of each row without reading it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from veneer.data.encode import Example

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Tokens of each row, those that are learnt, and those lost at its end and behind its last answer.
Column = Literal["lengths", "label_counts", "truncated", "unread"]

_OF_AN_EXAMPLE: Mapping[Column, Callable[[Example], int]] = {
    "lengths": lambda example: len(example.tokens),
    "label_counts": lambda example: example.label_tokens,
    "truncated": lambda example: example.truncated,
    "unread": lambda example: example.unread,
}
COLUMNS: tuple[Column, ...] = tuple(_OF_AN_EXAMPLE)


class Columnar(Sequence[Example]):
    """Examples that are read when they are indexed, and whose columns are there before."""

    @abstractmethod
    def column(self, name: Column) -> NDArray[np.int32]:
        """Return a column, a number for each row."""

    @abstractmethod
    def select(self, rows: NDArray[np.integer]) -> Columnar:
        """Return some of the rows, in this order; a row may come several times."""

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each row."""
        return self.column("lengths")

    @property
    def label_counts(self) -> NDArray[np.int32]:
        """Tokens of each row that are learnt."""
        return self.column("label_counts")


def column_of(examples: Sequence[Example], name: Column) -> NDArray[np.int32]:
    """Return a column of any examples; those of a list are walked for it."""
    if isinstance(examples, Columnar):
        return examples.column(name)
    return np.fromiter(map(_OF_AN_EXAMPLE[name], examples), np.int32, len(examples))


def lengths_of(examples: Sequence[Example]) -> NDArray[np.int32]:
    """Return the tokens of each row."""
    return column_of(examples, "lengths")


def select(examples: Sequence[Example], rows: NDArray[np.integer]) -> Sequence[Example]:
    """Return some of the examples, in the order of `rows`."""
    if isinstance(examples, Columnar):
        return examples.select(rows)
    return [examples[i] for i in rows.tolist()]


@dataclass(frozen=True, slots=True)
class Summary:
    """What a data set amounts to, in rows and tokens."""

    rows: int
    tokens: int
    label_tokens: int
    truncated: int
    longest: int
    lost: int = 0
    dropped: int = 0
    unread: int = 0

    @property
    def lost_share(self) -> float:
        """The share of all tokens that no example holds."""
        return self.lost / max(1, self.tokens + self.lost)


def summarize(examples: Sequence[Example], dropped: Sequence[int] = ()) -> Summary:
    """Count rows and tokens; `dropped` are the tokens of each row that was left out as too long.

    `truncated`, `dropped` and `unread` (with turns behind the last answer) are in rows, `longest`
    and `lost` in tokens.
    """
    lengths, labels, truncated, unread = (column_of(examples, name) for name in COLUMNS)
    lost = truncated.sum(dtype=np.int64) + unread.sum(dtype=np.int64)
    return Summary(
        rows=len(examples),
        tokens=int(lengths.sum(dtype=np.int64)),
        label_tokens=int(labels.sum(dtype=np.int64)),
        truncated=int(np.count_nonzero(truncated)),
        longest=int(np.max(lengths, initial=0)),
        lost=int(lost) + sum(dropped),
        dropped=len(dropped),
        unread=int(np.count_nonzero(unread)),
    )
