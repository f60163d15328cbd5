"""The prefix cache: keys and values of prompts' first tokens, computed once and shared.

A prompt is cut into blocks of a fixed number of tokens. A block is known by a hash of all tokens up
to its end and of what the adapter computes with, never by a name: equal hashes mean equal keys and
values.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol


class PrefixBlock(Protocol):
    """Keys and values of one block of tokens, in whatever layout the model's runner uses."""

    @property
    def nbytes(self) -> int: ...


def block_hashes(tokens: Sequence[int], content: str, size: int) -> tuple[bytes, ...]:
    """Return a hash for each whole block of `size` tokens; content: the adapter's, "" for none.

    The last token is in no block: its logits are needed, so it is computed in any case.
    """
    hashes, state = [], hashlib.sha256(content.encode()).digest()
    for first in range(0, len(tokens) - size, size):
        ids = ",".join(map(str, tokens[first : first + size]))
        state = hashlib.sha256(state + ids.encode()).digest()
        hashes.append(state)
    return tuple(hashes)


class PrefixCache:
    """Blocks in memory up to `limit` bytes; the least recently used are dropped first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0
        self._blocks: OrderedDict[bytes, PrefixBlock] = OrderedDict()

    def find(self, hashes: Sequence[bytes]) -> list[PrefixBlock]:
        """Return the blocks of a prompt from the first on, up to one that is not here."""
        blocks: list[PrefixBlock] = []
        for key in hashes:
            if (block := self._blocks.get(key)) is None:
                break
            blocks.append(block)
        self._touch(hashes[: len(blocks)])
        return blocks

    def wants(self, key: bytes) -> bool:
        """Say whether a block of this hash would be new here."""
        return self.limit > 0 and key not in self._blocks

    def add(self, hashes: Sequence[bytes], number: int, block: PrefixBlock) -> None:
        """Add block `number` of a prompt."""
        key = hashes[number]
        if block.nbytes > self.limit or key in self._blocks:
            return
        self._blocks[key] = block
        self.nbytes += block.nbytes
        self._touch(hashes[: number + 1])
        while self.nbytes > self.limit:
            _, dropped = self._blocks.popitem(last=False)
            self.nbytes -= dropped.nbytes

    def _touch(self, hashes: Sequence[bytes]) -> None:
        # Last block first, so that the first one is dropped last: without it no other is of use.
        for key in reversed(hashes):
            if key in self._blocks:
                self._blocks.move_to_end(key)
