"""Which adapters of a model act, and how strongly: one value that all its adapted layers share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import AdapterError, nearest, wrong_argument
from veneer.lowrank.update import RowUpdates

Weights = dict[str, nn.Parameter]  # by the path of a weight in the base


@dataclass(frozen=True, eq=False)
class Segments:
    """Which adapter acts on which tokens of a packed batch, in training.

    tokens: how many tokens the batch has. of_adapters: each adapter's name, its own tokens, one
    behind the other, and what the masks of its dropout are drawn from, None for torch's own
    generator on the CPU. The base alone acts on all other tokens.
    """

    tokens: int
    of_adapters: tuple[tuple[str, slice, torch.Generator | None], ...]

    def check(self, x: Tensor, name: str) -> None:
        """Raise AdapterError where a layer reads other rows than the batch's tokens."""
        if len(x) != self.tokens:
            raise AdapterError(
                f"{name} reads {len(x)} rows of a batch of {self.tokens} tokens, so adapters "
                "cannot learn together there; train them one after another."
            )


class ActiveAdapters:
    """Which adapters act, and how strongly: one, a weighted mix, or none; or some on each row, or
    on each segment of a batch.

    All adapted layers of a model share one of these, so that switching costs one assignment however
    many layers there are.
    """

    def __init__(self) -> None:
        self.configs: dict[str, Any] = {}  # by name, what each adapter is
        self.weights: dict[str, float] = {}
        # Modules to save (modules_to_save.py): by adapter, the weights that replace the base's own
        # while it acts; and the base's own that are replaced now.
        self.modules_to_save: dict[str, Weights] = {}
        self.replaced: Weights = {}
        self.notes: dict[str, Mapping[str, Any]] = {}  # by name, how an adapter was trained
        # Of adapters that act from an invocation on: what finds it (invocation.Invocations), and on
        # which tokens of the newest pass each acts, (tokens, 1) of bool, None before the first.
        self.invocations: Any = None
        self.acts_on: dict[str, Tensor | None] = {}
        # While each row of a batch has adapters of its own; `weights` then has no effect.
        self.row_updates: RowUpdates | None = None
        # While adapters learn together from a packed batch; `weights` is then empty.
        self.segments: Segments | None = None

    @property
    def idle(self) -> bool:
        """Whether there are adapters, none of which acts."""
        return bool(self.configs) and not self.weights

    def use(self, which: str | Mapping[str, float] | None) -> None:
        """Let `which` act: a name, a mapping of names to weights, or None for the base alone.

        Raises AdapterError for a name that is not attached.
        """
        self.weights = self.checked(which)
        self.row_updates = None

    @contextmanager
    def by_segments(self, segments: Segments) -> Iterator[None]:
        """Let adapters act on segments of a batch while the context lasts, as nothing else does."""
        assert not self.weights
        self.segments = segments
        try:
            yield
        finally:
            self.segments = None

    @contextmanager
    def on_all(self, name: str | None) -> Iterator[None]:
        """Let one adapter of the segments, or none, act on all that is computed while the context
        lasts."""
        segments, self.segments = self.segments, None
        self.weights = {} if name is None else {name: 1.0}
        try:
            yield
        finally:
            self.segments, self.weights = segments, {}

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


def active_adapters_of(model: nn.Module) -> ActiveAdapters:
    """Return the model's active adapters; the first call makes them.

    Raises TypeError for what is no model, such as a Base.
    """
    if not isinstance(model, nn.Module):
        raise wrong_argument(model, "A model")
    active_adapters = getattr(model, "veneer_active_adapters", None)
    if active_adapters is None:
        active_adapters = ActiveAdapters()
        model.veneer_active_adapters = active_adapters  # type: ignore[assignment]
    return active_adapters
