"""An adapter's tensors over one layer, and the route that says which adapters act."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from veneer.errors import AdapterError, nearest


class Adapter(nn.Module):
    """A (rank, in) and B (out, rank) over one layer, float32 masters, with their scaling."""

    def __init__(self, A: Tensor, B: Tensor, *, scaling: float, dropout: float = 0.0) -> None:
        super().__init__()
        assert A.shape[0] == B.shape[1], (A.shape, B.shape)
        self.lora_A = nn.Parameter(A)  # (rank, in)
        self.lora_B = nn.Parameter(B)  # (out, rank)
        self.scaling = scaling
        self.dropout = dropout

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scaling={self.scaling:g}, dropout={self.dropout:g}"


class Route:
    """Which adapters act, and how strongly: one, a weighted mix, or none.

    All adapted layers of a model share one Route, so that switching costs one assignment however
    many layers there are.
    """

    def __init__(self) -> None:
        self.configs: dict[str, Any] = {}  # by name, what each adapter is
        self.weights: dict[str, float] = {}

    @property
    def idle(self) -> bool:
        """Whether there are adapters, none of which acts."""
        return bool(self.configs) and not self.weights

    def use(self, which: str | Mapping[str, float] | None) -> None:
        """Let `which` act: a name, a mapping of names to weights, or None for the base alone.

        Raises AdapterError for a name that is not attached.
        """
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
        self.weights = weights
