"""An adapter's tensors over one layer, and the route that says which adapters act."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import AdapterError, nearest
from veneer.lowrank.acting import Rows

Factors = tuple[Tensor, Tensor]  # A (rank, in) and B (out, rank)
Saved = dict[str, nn.Parameter]  # by path, what stands in the place of weights of the base


class Adapter(nn.Module):
    """A (rank, in) and B (out, rank) over one layer, float32 masters, with their scaling.

    Over a stack of experts, A (experts, rank, in) and B (experts, out, rank).
    magnitude (out,): DoRA's, the length of each row of the adapted weight; None for plain LoRA.
    bias (out,): what is added to B (A x), and scaled with it, as PEFT's lora_bias; None for zero.
    start: A₀ and B₀ for an adapter whose factors are not zero at the start (PiSSA and its like): it
    then adds B A − B₀ A₀, so that the base need not be changed.
    """

    def __init__(
        self,
        A: Tensor,
        B: Tensor,
        *,
        scaling: float,
        dropout: float = 0.0,
        magnitude: Tensor | None = None,
        bias: Tensor | None = None,
        start: Factors | None = None,
    ) -> None:
        super().__init__()
        assert A.shape[-2] == B.shape[-1], (A.shape, B.shape)
        self.lora_A = nn.Parameter(A)  # (rank, in)
        self.lora_B = nn.Parameter(B)  # (out, rank)
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude)  # (out,)
        self.lora_bias = None if bias is None else nn.Parameter(bias)  # (out,)
        self.start_A: Tensor | None
        self.start_B: Tensor | None
        self.register_buffer("start_A", None if start is None else start[0])
        self.register_buffer("start_B", None if start is None else start[1])
        self.scaling = scaling
        self.dropout = dropout
        self.kept_norms: tuple[object, Tensor] | None = None  # while nothing can change them

    @property
    def rank(self) -> int:
        return self.lora_A.shape[-2]

    @property
    def start(self) -> Factors | None:
        """A₀ and B₀, or None where they are no more than zero."""
        if self.start_A is None or self.start_B is None:
            return None
        return self.start_A, self.start_B

    @torch.no_grad()
    def begin_at(self, A: Tensor, B: Tensor) -> None:
        """Let A and B start at these values, in place; nothing is added yet."""
        self.start_A, self.start_B = A.to(self.lora_A), B.to(self.lora_B)
        self.lora_A.copy_(A)
        self.lora_B.copy_(B)

    def factors(self) -> Factors:
        """Return A and B as they act, differentiably: twice the rank where there is a start.

        B A − B₀ A₀ = (B − B₀) A + B₀ (A − A₀), which is zero to the bit at the start.
        """
        A, B = self.lora_A, self.lora_B
        if self.start is None:
            return A, B
        A0, B0 = self.start
        return torch.cat([A, A - A0]), torch.cat([B - B0, B0], dim=1)

    def extra_repr(self) -> str:
        kind = "" if self.magnitude is None else ", DoRA"
        return f"rank={self.rank}, scaling={self.scaling:g}, dropout={self.dropout:g}{kind}"


class Route:
    """Which adapters act, and how strongly: one, a weighted mix, or none; or some on each row.

    All adapted layers of a model share one Route, so that switching costs one assignment however
    many layers there are.
    """

    def __init__(self) -> None:
        self.configs: dict[str, Any] = {}  # by name, what each adapter is
        self.weights: dict[str, float] = {}
        # What adapters have in the place of the base's own weights (methods/saved.py), and the
        # base's own, where something else stands in their place now.
        self.saved: dict[str, Saved] = {}
        self.base: Saved = {}
        self.notes: dict[str, Mapping[str, Any]] = {}  # by name, how an adapter was trained
        self.rows: Rows | None = None  # while each row of a batch has its own, which then act alone

    @property
    def idle(self) -> bool:
        """Whether there are adapters, none of which acts."""
        return bool(self.configs) and not self.weights

    def use(self, which: str | Mapping[str, float] | None) -> None:
        """Let `which` act: a name, a mapping of names to weights, or None for the base alone.

        Raises AdapterError for a name that is not attached.
        """
        self.weights = self.checked(which)
        self.rows = None

    def checked(self, which: str | Mapping[str, float] | None) -> dict[str, float]:
        """Return names and weights. Raises AdapterError for a name that is not attached."""
        if which is None:
            weights: dict[str, float] = {}
        elif isinstance(which, str):
            weights = {which: 1.0}
        else:
            weights = {name: float(weight) for name, weight in which.items()}
        unknown = [name for name in weights if name not in self.configs]
        if unknown:
            attached = ", ".join(sorted(self.configs)) or "none"
            raise AdapterError(
                f"No adapter is called {', '.join(map(repr, unknown))} "
                f"(attached: {attached}){nearest(unknown[0], self.configs)}."
            )
        return weights
