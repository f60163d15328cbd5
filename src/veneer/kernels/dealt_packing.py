"""A packed batch whose tokens are dealt over the processes of a group."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from veneer.kernels.packing import Packing
from veneer.kernels.transfer import sent
from veneer.processes.context import ContextGroup, deal

# Numbers of all tokens' keys and values that are gathered at a time, but at least one key head's:
# fewer need less memory, more are fewer exchanges.
NUMBERS_AT_ONCE = 2**23


class DealtPacking(Packing):
    """This process's tokens of a batch, as sequences of their own that see keys before their first.

    lengths: of the batch's rows, in their order; they sum to a multiple of the group's size. `own`
    (tokens,), on the host: which of the batch's tokens are this process's, in its order. Queries
    are its own, keys and values those of all processes, in the order in which they are gathered.
    highest: the highest position in the batch.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        group: ContextGroup,
        device: torch.device | None = None,
        *,
        highest: int,
    ) -> None:
        self.group, self.highest = group, highest
        starts = [0, *accumulate(lengths)]
        dealt = deal(lengths, group.size, long=2 * group.size * group.least)
        order = torch.cat(
            [
                torch.arange(starts[piece.row] + piece.start, starts[piece.row] + piece.stop)
                for pieces in dealt
                for piece in pieces
            ]
        )  # (all tokens,), as they are gathered
        pieces = dealt[group.rank]
        super().__init__(
            [len(piece) for piece in pieces], device, before=[piece.start for piece in pieces]
        )
        self.own = order.view(group.size, -1)[group.rank]
        self.all_tokens = len(order)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order))
        self._keys: list[Tensor] = []  # of each group of sequences: (sequences, keys)
        for members, (_, length) in zip(self.members, self.groups, strict=True):
            keys = torch.zeros(len(members), self.before[members[0]] + length, dtype=torch.long)
            for row, member in zip(keys, members, strict=True):
                piece = pieces[member]
                first = starts[piece.row]
                row[: piece.stop] = places[first : first + piece.stop]
            self._keys.append(sent(keys, device))

    def key_heads_at_once(self, k: Tensor, v: Tensor) -> int:
        of_one_head = self.all_tokens * (k.shape[2] + v.shape[2])
        return max(1, min(k.shape[1], NUMBERS_AT_ONCE // of_one_head))

    def key_groups(self, k: Tensor, v: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        every = self.group.gather(torch.cat([k.flatten(1), v.flatten(1)], 1))
        k, v = (
            x.view(-1, *own.shape[1:])
            for x, own in zip(every.split([k[0].numel(), v[0].numel()], 1), (k, v), strict=True)
        )
        k_groups, v_groups = ([x[keys] for keys in self._keys] for x in (k, v))
        return k_groups, v_groups

    def gradient_of_keys(
        self, dk: list[Tensor], dv: list[Tensor], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        sums = []
        for groups in (dk, dv):
            total = groups[0].new_zeros(self.all_tokens, *groups[0].shape[2:])
            for group, keys in zip(groups, self._keys, strict=True):
                total.index_add_(0, keys.flatten(), group.flatten(0, 1))
            sums.append(total.flatten(1).to(dtype))
        own = self.group.own_sum(torch.cat(sums, 1))  # (tokens, all numbers of k and v)
        d_keys, d_values = own.split([x.shape[1] for x in sums], 1)
        return d_keys.unflatten(1, dk[0].shape[2:]), d_values.unflatten(1, dv[0].shape[2:])
