"""What the engine needs of a model: rows that are read and continued, a step for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from veneer.serve.engine.adapter_cache import Loaded
from veneer.serve.engine.prefix import Kept


@dataclass(frozen=True)
class Chunk:
    """Tokens of one row that a step computes, behind the `start` tokens that the slot holds.

    loaded: what acts on the row, None for the base. wanted: which tokens' logits the step returns.
    answering: whether this continues an answer, one token at a time.
    """

    slot: int
    tokens: Sequence[int]
    start: int
    loaded: Loaded | None
    wanted: Literal["none", "last", "all"]
    answering: bool


class Runner(Protocol):
    """A model with a memory for each slot. Not for several threads."""

    def step(self, chunks: Sequence[Chunk]) -> Tensor:
        """Compute the chunks, each of another slot, and return the logits that they want, in order:
        (wanted, words), float32."""
        ...

    def prepare(self, loaded: Loaded) -> None:
        """Make ready what an adapter needs for its first step, if anything."""
        ...

    def keep(self, slot: int, first: int, last: int) -> Kept:
        """Return a copy of what a slot holds of tokens `first` to `last`."""
        ...

    def put(self, slot: int, pieces: Sequence[Any]) -> None:
        """Fill an empty slot with pieces, end to end."""
        ...

    def free(self, slot: int) -> None:
        """Empty a slot."""
        ...
