"""The experts of a layer: the weights of all, and the low-rank updates over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.lowrank.expert_gates import Gate
from veneer.lowrank.routing import Routing
from veneer.quant.stack import QuantizedStack, expert_weight
from veneer.quant.weight import QuantizedWeight


@dataclass(frozen=True)
class StackUpdate:
    """What adapters add to each expert of a stack: B (A x), scaled, in the dtype of computing.

    A (experts, rank, in), or (rank, in) where the experts share it; Bt (experts, rank, out): Bᵀ of
    each, contiguous, since products with it are faster so.
    """

    A: Tensor
    Bt: Tensor

    @property
    def rank(self) -> int:
        return self.A.shape[-2]

    @property
    def shares_A(self) -> bool:
        return self.A.ndim == 2

    def A_of(self, expert: int) -> Tensor:
        """Return an expert's A (rank, in)."""
        return self.A if self.shares_A else self.A[expert]


@dataclass(frozen=True)
class TokenUpdates:
    """Updates of which each token has one of its own; without gradients.

    which (tokens,) of int64: the number of each token's update, or -1 for none.
    """

    updates: Sequence[StackUpdate]
    which: Tensor


@dataclass(frozen=True)
class SegmentUpdates:
    """Updates that act on tokens of their own each, one token behind the other."""

    of_tokens: Sequence[tuple[slice, StackUpdate]]


@dataclass(frozen=True)
class Stack:
    """One linear layer of every expert: W_e x + B_e A_e x + b_e.

    weight (experts, out, in), or (experts, in, out) if `transposed`; frozen. bias (experts, out).
    """

    weight: Tensor | QuantizedStack
    transposed: bool = False
    bias: Tensor | None = None
    update: StackUpdate | SegmentUpdates | TokenUpdates | None = None

    @property
    def out_features(self) -> int:
        return self.weight.shape[-1 if self.transposed else -2]

    @property
    def in_features(self) -> int:
        return self.weight.shape[-2 if self.transposed else -1]

    @property
    def rank(self) -> int:
        """The largest rank of what has a gradient."""
        return max((update.rank for _, update in self.segments), default=0)

    @property
    def segments(self) -> Sequence[tuple[slice, StackUpdate]]:
        """The updates that have gradients, and the tokens on which they act."""
        if isinstance(self.update, SegmentUpdates):
            return self.update.of_tokens
        return [] if self.of_all is None else [(slice(None), self.of_all)]

    def rows_of_segments(self, routing: Routing) -> list[list[slice]]:
        """Return which rows of each of `routing.segments` are of each segment's tokens."""
        if not isinstance(self.update, SegmentUpdates):
            return [[tokens for tokens, _ in self.segments]] * len(routing.segments)
        return routing.rows_of([tokens for tokens, _ in self.segments])

    @property
    def of_all(self) -> StackUpdate | None:
        """The update that all tokens share, or None."""
        return self.update if isinstance(self.update, StackUpdate) else None

    def weight_of(self, expert: int, dtype: torch.dtype) -> Tensor | QuantizedWeight:
        """Return an expert's weight (out, in), a dense one in `dtype`."""
        weight = expert_weight(self.weight, expert, transposed=self.transposed)
        return weight.to(dtype) if isinstance(weight, Tensor) else weight

    def trained(self) -> list[Tensor]:
        """Return A and Bᵀ of each segment; nothing where no adapter acts."""
        return [factor for _, update in self.segments for factor in (update.A, update.Bt)]


@dataclass(frozen=True)
class Experts:
    """The experts of a mixture.

    post_norm: what each expert's output goes through, row by row. exact: whether the output without
    updates is to be that of transformers' own operations to the bit; for this every number of `up`
    is kept.
    """

    up: Stack
    down: Stack
    gate: Gate
    post_norm: Callable[[Tensor], Tensor] | None = None
    exact: bool = False

    @property
    def count(self) -> int:
        return self.up.weight.shape[0]

    def trained(self) -> list[Tensor]:
        return [*self.up.trained(), *self.down.trained()]

    def note_routed(self, routing: Routing) -> None:
        """Let whatever reads ahead know which experts are used next, in this order."""
        stacks = [s.weight for s in (self.up, self.down) if isinstance(s.weight, QuantizedStack)]
        if not stacks:
            return  # the segments might have to be asked for
        for expert, _ in routing.segments:
            for stack in stacks:
                stack.note_routed([expert])
