"""Rows in a random order that seeds decide, of which any part can be made without the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Of up to this many rows the order is numpy's own permutation, as one array. Of more it is made
# piece by piece, so that memory does not grow with them.
WHOLE = 2**20
_ROUNDS = 4  # of a Feistel network; Luby and Rackoff 1988 prove that four suffice


@dataclass(frozen=True)
class Shuffled:
    """The numbers below `n` in a random order, a function of the seeds alone."""

    n: int
    seeds: tuple[int, ...]

    def between(self, start: int, end: int) -> NDArray[np.int64]:
        """Return what is at the places from `start` to before `end`."""
        end = min(end, self.n)
        if self.n <= WHOLE:
            return self._generator().permutation(self.n)[start:end]
        places = np.arange(start, end, dtype=np.uint64)
        # A permutation of 0 ... 2^bits - 1; whatever falls beyond n is sent through it again.
        numbers = self._mixed(places)
        while (beyond := numbers >= self.n).any():
            numbers[beyond] = self._mixed(numbers[beyond])
        return numbers.astype(np.int64)

    def _generator(self) -> np.random.Generator:
        entropy = self.seeds[0] if len(self.seeds) == 1 else np.random.SeedSequence(self.seeds)
        return np.random.default_rng(entropy)

    def _mixed(self, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Return each number's image under a Feistel network over all numbers of `bits` bits."""
        bits = (self.n - 1).bit_length()
        low = bits // 2
        widths = (bits - low, low)  # of the left half and the right one; they change places
        left, right = numbers >> np.uint64(low), numbers & np.uint64(2**low - 1)
        for round_, key in enumerate(self._keys()):
            mask = np.uint64(2 ** widths[round_ % 2] - 1)
            left, right = right, left ^ (_scattered(right ^ key) & mask)
        # After an even number of rounds the halves have their own widths again.
        return (left << np.uint64(low)) | right

    def _keys(self) -> NDArray[np.uint64]:
        return self._generator().integers(0, 2**64, _ROUNDS, dtype=np.uint64)


def _scattered(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return a hash of each number: the finalizer of SplitMix64 (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
