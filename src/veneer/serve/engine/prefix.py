"""Keys and values of prompts' beginnings, so that what many share is computed once.

A beginning is known by what it says and by the content of what acts on it, never by a name. It is
kept in pieces of `chunk` tokens, each known by all that comes before it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Kept(Protocol):
    """The keys and values of a piece, however the model's runner has them."""

    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True)
class Beginning:
    """The whole pieces of a prompt: a mark for each, which stands for all up to there."""

    marks: tuple[bytes, ...]

    @classmethod
    def of(cls, tokens: Sequence[int], content: str, chunk: int) -> Beginning:
        # Of the last token the logits are needed, so that it is computed in any case.
        marks, mark = [], hashlib.sha256(content.encode()).digest()
        for first in range(0, len(tokens) - chunk, chunk):
            words = ",".join(map(str, tokens[first : first + chunk]))
            mark = hashlib.sha256(mark + words.encode()).digest()
            marks.append(mark)
        return cls(tuple(marks))


class PrefixCache:
    """Pieces in memory up to `limit` bytes, the least recently used let go first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0
        self._pieces: OrderedDict[bytes, Kept] = OrderedDict()

    def find(self, beginning: Beginning) -> list[Kept]:
        """Return the pieces that are known from the first on."""
        found = []
        for mark in beginning.marks:
            if (piece := self._pieces.get(mark)) is None:
                break
            found.append(piece)
        self._touch(beginning.marks[: len(found)])
        return found

    def wants(self, mark: bytes) -> bool:
        return self.limit > 0 and mark not in self._pieces

    def add(self, beginning: Beginning, number: int, piece: Kept) -> None:
        """Keep piece `number` of a beginning."""
        mark = beginning.marks[number]
        if piece.nbytes > self.limit or mark in self._pieces:
            return
        self._pieces[mark] = piece
        self.nbytes += piece.nbytes
        self._touch(beginning.marks[: number + 1])
        while self.nbytes > self.limit:
            _, gone = self._pieces.popitem(last=False)
            self.nbytes -= gone.nbytes

    def _touch(self, marks: Sequence[bytes]) -> None:
        # Backwards, so that the first is let go last: without it the others cannot be found.
        for mark in reversed(marks):
            if mark in self._pieces:
                self._pieces.move_to_end(mark)
