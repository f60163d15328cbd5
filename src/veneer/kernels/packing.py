"""Where the sequences of a packed batch lie: end to end, without padding between them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from veneer.kernels.flex import BlockMask, block_mask
from veneer.kernels.transfer import sent, sent_together

# Sequences share a product when the shortest has at least this share of the longest's length, both
# rounded up to a multiple of LENGTH_STEP, so that products of the same shapes come again.
LIKE_LENGTH = 0.75
LENGTH_STEP = 16


class Packing:
    """Where the sequences of a packed batch lie, grouped by like length for attention.

    lengths: of the sequences, in their order; they sum to the batch's tokens. Computed once a
    batch and used by every layer. before: how many keys each sequence sees before its own, none
    unless given; those of a group see equally many. prefix: for each layer, keys and values that
    all sequences see before their own, or None.
    """

    prefix: Sequence[Tensor] | None = None  # keys and values, (2, kv_heads, virtual, head_dim)

    def __init__(
        self,
        lengths: list[int],
        device: torch.device | None = None,
        *,
        before: Sequence[int] | None = None,
    ) -> None:
        self.lengths, self.before = lengths, before or [0] * len(lengths)
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        self.tokens, self.firsts = starts[-1], starts[:-1]
        self.longest = max(lengths)
        # Where sequences begin, and where the last one ends, as kernels for rows of any lengths
        # take it: (sequences + 1,).
        self.starts = sent(torch.tensor(starts, dtype=torch.int32), device)
        self.sees_own_keys = before is None  # and no others
        self._block_masks: dict[int | None, BlockMask] = {}  # by window
        order = sorted(range(len(lengths)), key=lambda i: (self.before[i], -lengths[i]))
        self.groups: list[tuple[int, int]] = []  # (sequences, padded length)
        self.members: list[list[int]] = []  # which sequences these are
        gather: list[Tensor] = []
        pads: list[Tensor] = []
        for i in order:
            length = -(-lengths[i] // LENGTH_STEP) * LENGTH_STEP
            if not self._joins_last_group(i, length):
                self.groups.append((0, length))
                self.members.append([])
            count, longest = self.groups[-1]
            self.groups[-1] = (count + 1, longest)
            self.members[-1].append(i)
            rows = torch.full((longest,), starts[i])
            rows[: lengths[i]] = torch.arange(starts[i], starts[i + 1])
            gather.append(rows)
            pads.append(torch.arange(longest) >= lengths[i])
        to_groups, is_padding = torch.cat(gather), torch.cat(pads)
        self.is_identity = torch.equal(to_groups, torch.arange(self.tokens))
        from_groups = torch.empty(self.tokens, dtype=torch.long)
        from_groups[to_groups[~is_padding]] = (~is_padding).nonzero().squeeze(1)
        padding = is_padding.nonzero().squeeze(1)
        self._device, self._places = device, (to_groups, from_groups, padding)

    def _joins_last_group(self, sequence: int, length: int) -> bool:
        if not self.groups or length < LIKE_LENGTH * self.groups[-1][1]:
            return False
        return self.before[sequence] == self.before[self.members[-1][0]]

    def behind(self, prefix: Sequence[Tensor]) -> Packing:
        """Return the same packing, whose sequences see a prefix before their own."""
        packing = copy.copy(self)
        packing.prefix = prefix
        return packing

    def block_mask(self, window: int | None) -> BlockMask:
        """Return FlexAttention's mask of the packed rows, made once for all layers."""
        if window not in self._block_masks:
            self._block_masks[window] = block_mask(self.starts, self.tokens, window)
        return self._block_masks[window]

    @cached_property
    def _grouping(self) -> list[Tensor]:
        """For each token of the padded groups the packed one, (padded tokens,); for each packed one
        its place in the groups, (tokens,); and which of the padded ones are padding."""
        return sent_together(self._places, self._device)

    def to_groups(self, x: Tensor) -> Tensor:
        """Return packed rows (tokens, ...) as padded groups. Padding repeats a row of its own
        sequence: 0 · ∞ of another's would reach it."""
        return x if self.is_identity else x.index_select(0, self._grouping[0])

    def gradient_to_groups(self, dy: Tensor) -> Tensor:
        """Return the rows of a gradient as padded groups, with 0 for padding."""
        if self.is_identity:
            return dy
        to_groups, _, padding = self._grouping
        return dy.index_select(0, to_groups).index_fill_(0, padding, 0)

    def from_groups(self, groups: list[Tensor]) -> Tensor:
        """Return the packed rows (tokens, ...) of groups (sequences, padded length, ...)."""
        rows = [group.flatten(0, 1) for group in groups]
        padded = rows[0] if len(rows) == 1 else torch.cat(rows)
        return padded if self.is_identity else padded.index_select(0, self._grouping[1])

    def key_heads_at_once(self, k: Tensor, v: Tensor) -> int:
        """Return of how many key heads attention takes keys and values at a time: of all."""
        return k.shape[1]

    def key_groups(self, k: Tensor, v: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return the keys (tokens, kv_heads, dim) that the sequences of each group see, (sequences,
        keys, kv_heads, dim), and their values: `before` each, then as many as there are queries."""
        return self.split(self.to_groups(k)), self.split(self.to_groups(v))

    def gradient_of_keys(
        self, dk: list[Tensor], dv: list[Tensor], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of what `key_groups` was given, in `dtype`, from those of what it
        returned."""
        d_keys, d_values = (self.from_groups([x.to(dtype) for x in groups]) for groups in (dk, dv))
        return d_keys, d_values

    def split(self, padded: Tensor) -> list[Tensor]:
        """Return padded rows as one (sequences, padded length, ...) for each group."""
        if len(self.groups) == 1:
            return [padded.view(*self.groups[0], *padded.shape[1:])]
        flat = padded.split([count * length for count, length in self.groups])
        return [rows.unflatten(0, group) for rows, group in zip(flat, self.groups, strict=True)]
