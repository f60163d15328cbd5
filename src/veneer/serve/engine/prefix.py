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

from veneer.generate.runners.runner import PrefixBlock

# What a block takes beside its numbers: two tensors and their storages, its hash, its place among
# the others. 1,247 bytes were measured; of a small base that is a seventh of a block.
OBJECTS = 1247


def block_hashes(
    tokens: Sequence[int], content: str, size: int, start: float = 0
) -> tuple[bytes, ...]:
    """Return a hash for each whole block of `size` tokens; content: the adapter's, "" for none.

    start: the token from which on the adapter acts. Whole blocks before it are the base's own. The
    last token is in no block: its logits are needed, so it is computed in any case.
    """
    hashes, state = [], hashlib.sha256((content if start == 0 else "").encode()).digest()
    for first in range(0, len(tokens) - size, size):
        ids = ",".join(map(str, tokens[first : first + size]))
        if start > 0 and first <= start < first + size:
            ids += f";{content} from {start - first}"
        state = hashlib.sha256(state + ids.encode()).digest()
        hashes.append(state)
    return tuple(hashes)


def _held(block: PrefixBlock) -> int:
    """Return the bytes of memory that a block takes."""
    return block.nbytes + OBJECTS


class BlockFiles(Protocol):
    """Blocks on a disk, which nobody waits for (`prefix_files.py`)."""

    @property
    def nbytes(self) -> int: ...

    def fetch(self, hashes: Sequence[bytes], most: int) -> None: ...

    def take(self) -> list[tuple[bytes, PrefixBlock]]: ...

    def is_reading(self, hashes: Sequence[bytes]) -> bool: ...

    def wait(self, seconds: float) -> None: ...

    def use(self, hashes: Sequence[bytes]) -> None: ...

    def keep(self, key: bytes, block: PrefixBlock) -> None: ...

    def close(self) -> None: ...


class PrefixCache:
    """Blocks in memory up to `limit` bytes; the least recently used are dropped first.

    files: where blocks are kept as well, also when memory drops them and the server ends.
    """

    def __init__(self, limit: int, files: BlockFiles | None = None) -> None:
        self.limit, self.files = limit, files
        self.nbytes = 0
        self._blocks: OrderedDict[bytes, PrefixBlock] = OrderedDict()

    @property
    def stored_bytes(self) -> int:
        """Bytes of blocks in files, those of other bases among them."""
        return 0 if self.files is None else self.files.nbytes

    def fetch(self, hashes: Sequence[bytes]) -> None:
        """Begin to read what files have of a prompt and memory has not."""
        if self.files is not None:
            here = next((n for n, key in enumerate(hashes) if key not in self._blocks), len(hashes))
            self.files.fetch(hashes[here:], self.limit)

    def is_fetching(self, hashes: Sequence[bytes]) -> bool:
        """Say whether blocks of a prompt are still being read; what has been read is here."""
        if self.files is None:
            return False
        for key, block in self.files.take():
            self._insert(key, block)
        return self.files.is_reading(hashes)

    def wait(self, seconds: float) -> None:
        """Wait for a block that is being read, for at most so long."""
        if self.files is not None:
            self.files.wait(seconds)

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
        if _held(block) > self.limit or key in self._blocks:
            return
        self._blocks[key] = block
        self.nbytes += _held(block)
        if self.files is not None:
            self.files.keep(key, block)
        self._touch(hashes[: number + 1])
        self._drop_oldest()

    def close(self) -> None:
        """Let files be whole."""
        if self.files is not None:
            self.files.close()

    def _insert(self, key: bytes, block: PrefixBlock) -> None:
        if key not in self._blocks:
            self._blocks[key] = block
            self.nbytes += _held(block)
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        while self.nbytes > self.limit:
            _, dropped = self._blocks.popitem(last=False)
            self.nbytes -= _held(dropped)

    def _touch(self, hashes: Sequence[bytes]) -> None:
        if self.files is not None:
            self.files.use(hashes)
        # Last block first, so that the first one is dropped last: without it no other is of use.
        for key in reversed(hashes):
            if key in self._blocks:
                self._blocks.move_to_end(key)
