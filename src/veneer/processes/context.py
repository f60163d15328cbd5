"""The processes that compute one batch together, each its own tokens: context parallelism.

Attention alone mixes tokens, and needs the keys and values of those before. They are gathered from
all processes, one layer at a time, as Llama 3 was trained (Grattafiori et al. 2024, section 3.3.2):
any mask works, each softmax is whole, and no more is sent than around a ring.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from veneer.errors import ConfigError
from veneer.processes.world import Sent, World, exchange


@dataclass(frozen=True)
class Piece:
    """The tokens from `start` to `stop` of a row."""

    row: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class ContextGroup:
    """The processes that share each batch's tokens: this is `rank` of `size`.

    Every exchange must be made by all of them, in the same order. least: tokens of a piece, at
    least, where a row is cut into two for each process.
    """

    rank: int
    size: int
    least: int = 256  # a block of queries in attention's products
    group: Any = field(default=None, repr=False, compare=False)
    sent: Sent = field(default_factory=Sent, repr=False, compare=False)

    @classmethod
    def of(cls, world: World, size: int) -> ContextGroup | None:
        """Return this process's group, where each `size` processes in order are one; None where
        each process is alone. All processes of the world must ask.

        Raises ConfigError where the world cannot be divided so.
        """
        check_divides(world.size, size)
        if size == 1:
            return None
        # A group of its own, even of all processes: its exchanges meet no others.
        group, _ = dist.new_subgroups(group_size=size)
        return cls(world.rank % size, size, group=group, sent=world.sent)

    def gather(self, x: Tensor) -> Tensor:
        """Return the x (tokens, ...) of all processes one after another, with a gradient."""
        return _Gathered.apply(x, self)

    def gathered(self, x: Tensor) -> Tensor:
        """Return what `gather` does, without a gradient."""
        self.sent.count("keys and values", x)
        every = x.new_empty(self.size * len(x), *x.shape[1:])
        with exchange():
            dist.all_gather(list(every.chunk(self.size)), x.contiguous(), group=self.group)
        return every

    def own_sum(self, x: Tensor) -> Tensor:
        """Return the sum over the processes of the rows of x (size · tokens, ...) that `gather` had
        from this one, (tokens, ...).

        Each process rounds what it sends to x's dtype; the sum is made in float32 or wider, in the
        order of the processes.
        """
        self.sent.count("gradients of keys and values", x)
        every = torch.empty_like(x, memory_format=torch.contiguous_format)
        with exchange():
            dist.all_to_all_single(every, x.contiguous(), group=self.group)
        wide = torch.promote_types(x.dtype, torch.float32)
        return every.unflatten(0, (self.size, -1)).sum(0, dtype=wide).to(x.dtype)

    def add_up(self, x: Tensor) -> None:
        """Replace a tensor by its sum over the processes."""
        self.sent.count("sum", x)
        with exchange():
            dist.all_reduce(x, group=self.group)

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process of the group."""
        return self.sum(float(flag)) > 0

    def sum(self, number: float) -> float:
        """Return the sum of the processes' numbers."""
        total = torch.tensor(number, dtype=torch.float64)
        self.add_up(total)
        return float(total)


def check_divides(processes: int, size: int) -> None:
    """Raise ConfigError where groups of `size` cannot be made of that many processes."""
    if processes % size:
        raise ConfigError(
            f"--context-parallel {size}: rows cannot be shared by {size} processes each, since "
            f"this run has {processes}. Start a multiple of {size} processes, by --processes or "
            "by torchrun."
        )


def deal(lengths: Sequence[int], size: int, *, long: int) -> list[list[Piece]]:
    """Return which tokens of rows of these lengths each of `size` processes computes.

    The rows' tokens are a multiple of `size`, and each process has as many of them. A row of at
    least `long` tokens is cut into two pieces for each process, the first from one end and the
    second from the other, so that the processes see equally many keys. The other rows are dealt one
    after another, whole but where a process has its share.
    """
    dealt: list[list[Piece]] = [[] for _ in range(size)]
    counts = [0] * size
    tokens = 0
    for row, length in enumerate(lengths):
        if length < long:
            continue
        # Σ (n + i) // size over all i is n: rows of any length make even shares together.
        shares = [(tokens + length + i) // size - (tokens + i) // size for i in range(size)]
        tokens += length
        heads = [(i, share // 2) for i, share in enumerate(shares)]
        tails = [(i, share - share // 2) for i, share in reversed([*enumerate(shares)])]
        start = 0
        for i, count in (*heads, *tails):
            _add(dealt[i], Piece(row, start, start + count))
            counts[i] += count
            start += count
    share, rest = divmod(sum(lengths), size)
    assert not rest
    i = 0
    for row, length in enumerate(lengths):
        start = length if length >= long else 0
        while start < length:
            count = min(length - start, share - counts[i])
            _add(dealt[i], Piece(row, start, start + count))
            counts[i] += count
            start += count
            i += counts[i] == share
    return dealt


def _add(pieces: list[Piece], piece: Piece) -> None:
    """Add a piece, as one with the last where it follows on it."""
    if not len(piece):
        return
    if pieces and (pieces[-1].row, pieces[-1].stop) == (piece.row, piece.start):
        piece = Piece(piece.row, pieces.pop().start, piece.stop)
    pieces.append(piece)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ContextGroup) -> Tensor:
        ctx.group = group
        return group.gathered(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.group.own_sum(grads[0]), None
