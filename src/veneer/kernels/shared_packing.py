"""Packed sequences of which some begin with the tokens of one that stands before them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.kernels.packing import Packing

# Numbers of keys and values that rows are given of others at a time, but at least one key head's:
# many answers to a long prompt have it as often as they are, and a pass need not be as large.
NUMBERS_AT_ONCE = 2**23


class SharedPacking(Packing):
    """A packed batch in which the keys that a sequence sees `before` its own are the first ones of
    the last sequence that sees none: of answers to one prompt, those of the prompt.
    """

    def __init__(
        self, lengths: list[int], device: torch.device | None, *, before: Sequence[int]
    ) -> None:
        super().__init__(lengths, device, before=before)
        self._whole: list[int] = []  # for each sequence the one with its beginning
        for sequence, count in enumerate(before):
            self._whole.append(self._whole[-1] if count else sequence)

    def key_heads_at_once(self, k: Tensor, v: Tensor) -> int:
        of_one_head = sum(self.before) * (k.shape[2] + v.shape[2])
        return max(1, min(k.shape[1], NUMBERS_AT_ONCE // of_one_head))

    def key_groups(self, k: Tensor, v: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        keys, values = super().key_groups(k, v)
        return self._behind_beginnings(keys, k), self._behind_beginnings(values, v)

    def gradient_of_keys(
        self, dk: list[Tensor], dv: list[Tensor], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        return self._of_tokens(dk).to(dtype), self._of_tokens(dv).to(dtype)

    def _behind_beginnings(self, groups: list[Tensor], x: Tensor) -> list[Tensor]:
        """Return each group's own rows (sequences, length, ...) behind the rows of x (tokens, ...)
        that come before them, (sequences, before + length, ...)."""
        behind = []
        for members, own in zip(self.members, groups, strict=True):
            if self.before[members[0]]:
                own = torch.cat([torch.stack([x[self._beginning(i)] for i in members]), own], 1)
            behind.append(own)
        return behind

    def _of_tokens(self, groups: list[Tensor]) -> Tensor:
        """Return the sums of rows over all that see a token, (tokens, ...)."""
        counts = [self.before[members[0]] for members in self.members]
        own = [group[:, count:] for group, count in zip(groups, counts, strict=True)]
        sums = self.from_groups(own)  # a copy: whoever sees others' keys is in a group of its own
        for members, group, count in zip(self.members, groups, counts, strict=True):
            for number, sequence in enumerate(members if count else ()):
                sums[self._beginning(sequence)] += group[number, :count]
        return sums

    def _beginning(self, sequence: int) -> slice:
        """Return where the tokens are that come before a sequence's own."""
        first = self.firsts[self._whole[sequence]]
        return slice(first, first + self.before[sequence])


def packing_of(
    lengths: list[int], before: list[int], device: torch.device | None = None
) -> Packing:
    """Return the packing of rows, of which each sees so many keys of the last one
    that sees none."""
    if any(before):
        return SharedPacking(lengths, device, before=before)
    return Packing(lengths, device)
