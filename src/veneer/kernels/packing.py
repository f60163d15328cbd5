"""Where the sequences of a packed batch lie: end to end, without padding between them."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

# Sequences share a product when the shortest has at least this share of the longest's length, both
# rounded up to a multiple of LENGTH_STEP, so that products of the same shapes come again.
LIKE_LENGTH = 0.75
LENGTH_STEP = 16


class Packing:
    """Where the sequences of a packed batch lie, grouped by like length for attention.

    lengths: of the sequences, in their order; they sum to the batch's tokens. Computed once a
    batch and used by every layer. prefix: for each layer, keys and values that all sequences see
    before their own, or None.
    """

    prefix: Sequence[Tensor] | None = None  # keys and values, (2, kv_heads, virtual, head_dim)

    def __init__(self, lengths: list[int], device: torch.device | None = None) -> None:
        self.lengths = lengths
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        self.tokens = starts[-1]
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        self.groups: list[tuple[int, int]] = []  # (sequences, padded length)
        gather: list[Tensor] = []
        for i in order:
            length = -(-lengths[i] // LENGTH_STEP) * LENGTH_STEP
            if not self.groups or length < LIKE_LENGTH * self.groups[-1][1]:
                self.groups.append((0, length))
            count, longest = self.groups[-1]
            self.groups[-1] = (count + 1, longest)
            rows = torch.full((longest,), -1)
            rows[: lengths[i]] = torch.arange(starts[i], starts[i + 1])
            gather.append(rows)
        padded = torch.cat(gather)
        self._padding = (padded < 0).nonzero().squeeze(1).to(device)
        self._to_groups = padded.clamp(min=0).to(device)  # (padded tokens,)
        from_groups = torch.empty(self.tokens, dtype=torch.long)
        from_groups[padded[padded >= 0]] = (padded >= 0).nonzero().squeeze(1)
        self._from_groups = from_groups.to(device)  # (tokens,)
        self.is_identity = torch.equal(padded, torch.arange(self.tokens))

    def behind(self, prefix: Sequence[Tensor]) -> Packing:
        """Return the same packing, whose sequences see a prefix before their own."""
        packing = copy.copy(self)
        packing.prefix = prefix
        return packing

    def to_groups(self, x: Tensor) -> Tensor:
        """Return packed rows (tokens, ...) as padded groups; padding repeats the first row."""
        return x if self.is_identity else x.index_select(0, self._to_groups)

    def gradient_to_groups(self, dy: Tensor) -> Tensor:
        """Return the rows of a gradient as padded groups, with 0 for padding."""
        if self.is_identity:
            return dy
        return dy.index_select(0, self._to_groups).index_fill_(0, self._padding, 0)

    def from_groups(self, groups: list[Tensor]) -> Tensor:
        """Return the packed rows (tokens, ...) of groups (sequences, padded length, ...)."""
        rows = [group.flatten(0, 1) for group in groups]
        padded = rows[0] if len(rows) == 1 else torch.cat(rows)
        return padded if self.is_identity else padded.index_select(0, self._from_groups)

    def split(self, padded: Tensor) -> list[Tensor]:
        """Return padded rows as one (sequences, padded length, ...) for each group."""
        if len(self.groups) == 1:
            return [padded.view(*self.groups[0], *padded.shape[1:])]
        flat = padded.split([count * length for count, length in self.groups])
        return [rows.unflatten(0, group) for rows, group in zip(flat, self.groups, strict=True)]
