"""What the engine needs of a model: one step for all rows, and a KV cache for each slot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from veneer.generate.runners.loaded import LoadedAdapter


class PrefixBlock(Protocol):
    """Keys and values of one block of tokens, in whatever layout the model's runner uses."""

    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True)
class Chunk:
    """Tokens of one row that a step computes, after the `start` tokens that its slot holds.

    adapter: what acts on the row, None for the base. logits: for how many of the last tokens the
    step returns logits. decoding: whether the row's prompt is done, and this is its newest token;
    where the engine does not wait for tokens (`SlotRunner.take`), that is on the device alone.
    hidden: whether `Runner.hidden` is to have what the decoder gives for the tokens.
    """

    slot: int
    tokens: Sequence[int]
    start: int
    adapter: LoadedAdapter | None
    logits: int
    decoding: bool = False
    hidden: bool = False


class Runner(Protocol):
    """A model with a KV cache, which holds the keys and values of each slot.

    Only one thread ever touches the KV cache and the prefix cache: the engine's, `Engine._work`.
    Threads that serve HTTP hand requests over in a queue; the thread that loads adapters changes
    only the adapter cache. So neither a runner nor a prefix cache needs a lock.
    """

    @property
    def is_exact(self) -> bool:
        """Whether a token has the same numbers to the bit whatever is computed in its step, other
        tokens of its own row too."""
        ...

    @property
    def cut(self) -> int | None:
        """The tokens by which a prompt is computed beside rows that decode, or a multiple of them;
        None where a step is not waited for, and a prompt has always its whole chunk."""
        ...

    @property
    def hidden(self) -> Mapping[int, Tensor] | None:
        """What the decoder gave in the last step, by slot: (tokens, dim), float32, behind its last
        norm. None where a runner does not say it."""
        ...

    def step(self, chunks: Sequence[Chunk]) -> Tensor:
        """Compute the chunks, each of another slot, and return the logits that they ask for, in
        order: (Σ logits, vocab), float32; -∞ for tokens that a row's adapter has not."""
        ...

    def block(self, slot: int, first: int, last: int) -> PrefixBlock:
        """Return a copy of a slot's keys and values of tokens `first` to `last`."""
        ...

    def fill(self, slot: int, blocks: Sequence[Any]) -> None:
        """Write blocks into an empty slot, end to end."""
        ...

    def begin(self, slot: int, prefix: Tensor) -> None:
        """Write the keys and values of a prefix (layers, 2, kv_heads, virtual, head_dim) into an
        empty slot."""
        ...

    def copy(self, slot: int, other: int, length: int) -> None:
        """Write the keys and values of a slot that holds a prompt of `length` tokens, and nothing
        else yet, into another that is empty."""
        ...

    def free(self, slot: int) -> None:
        """Empty a slot."""
        ...
