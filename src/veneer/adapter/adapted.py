"""What adapted layers and adapted parameters share: a frozen weight with named adapters over it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter.active import ActiveAdapters
from veneer.adapter.adapter import Adapter
from veneer.adapter.config import LoRA
from veneer.adapter.tokens import TrainedTokens
from veneer.errors import AdapterError
from veneer.lowrank.formula import delta_weight, rescaled
from veneer.quant.weight import QuantizedWeight, dense


class Adapted(nn.Module):
    """A frozen weight W with named adapters over it; `active_adapters` says which of them act.

    tokens: by adapter, rows of single tokens, where W is that of an embedding or a head.

    Active adapters of weights w are summed: W + Σ w ΔW with ΔW = s B A, or for DoRA (Liu et al.
    2024, section 4) ΔW = g ∘ (W + s B A) − W, where g = m / ‖W + s B A‖ for each row. The norm
    counts as a constant on the way back (section 4.3).
    """

    def __init__(self, active_adapters: ActiveAdapters, **wrapped: Any) -> None:
        super().__init__(**wrapped)
        self.adapters = nn.ModuleDict()
        self.tokens = nn.ModuleDict()
        self.active_adapters = active_adapters

    @property
    def base_weight(self) -> Tensor | QuantizedWeight:
        """The frozen W: (out, in) for a linear layer, (vocab, dim) for an embedding."""
        raise NotImplementedError

    @property
    def shape(self) -> torch.Size:
        """The shape of `base_weight`."""
        return self.base_weight.shape

    @property
    def device(self) -> torch.device:
        """The device of `base_weight`."""
        return self.base_weight.device

    @property
    def dense_base_weight(self) -> Tensor:
        """`base_weight` as a tensor; a quantized one is dequantized at each access."""
        return dense(self.base_weight)

    def oriented(self, weight: Tensor) -> Tensor:
        """Return a stored weight in the orientation of `base_weight`."""
        return weight

    def stored(self, weight: Tensor) -> Tensor:
        """Return a weight, oriented as `base_weight`, as it is stored."""
        return self.oriented(weight)

    def by_outputs(self, weight: Tensor) -> Tensor:
        """Return a weight, oriented as `base_weight`, as (out, in), or the other way round."""
        return weight

    def add(self, name: str, config: LoRA, path: str, generator: torch.Generator | None) -> None:
        """Add a fresh adapter, which changes no output."""
        raise NotImplementedError

    def attach(self, name: str, adapter: Adapter) -> None:
        """Attach an adapter with given tensors, on the weight's device."""
        device = self.device
        # Comparing devices is a hundred times cheaper than moving.
        self.adapters[name] = adapter if adapter.lora_A.device == device else adapter.to(device)

    @property
    def bare(self) -> bool:
        """Whether no adapter is attached here any more."""
        return not self.adapters and not self.tokens

    @property
    def acts(self) -> bool:
        """Whether an adapter that is active is attached here."""
        return bool(self.active() or self.active_tokens())

    def active(self) -> list[tuple[Adapter, float]]:
        """Return the active adapters that are attached here, with their weights."""
        return self.named(self.active_adapters.weights.items())

    def named(self, weights: Iterable[tuple[str, float]]) -> list[tuple[Adapter, float]]:
        """Return the adapters of these names that are attached here, with their weights."""
        adapters: Mapping[str, Any] = self.adapters._modules
        return [(adapters[name], weight) for name, weight in weights if name in adapters]

    def acts_on(self, dtype: torch.dtype, names: Iterable[str] | None = None) -> Tensor | None:
        """Return on which tokens of the pass adapters act, the active ones unless named, as a
        `Projection` takes it; None for all tokens, as without an invocation."""
        names = self.active_adapters.weights if names is None else names
        own = [name for name in names if name in self.adapters]
        by_position = {n: x for n, x in self.active_adapters.acts_on.items() if n in own}
        if not by_position:
            return None
        columns = {name: column for name, column in by_position.items() if column is not None}
        if len(columns) < len(by_position):
            raise AdapterError(
                "An adapter acts from an invocation on, which is found when the model is called; "
                "this layer was called alone."
            )
        first = next(iter(columns.values()))
        if len(own) == 1:
            return first.to(dtype)
        everywhere = torch.ones_like(first)
        adapters: Mapping[str, Any] = self.adapters._modules
        wide = [columns.get(n, everywhere).expand(-1, adapters[n].total_rank) for n in own]
        return torch.cat(wide, 1).to(dtype)

    def active_tokens(self) -> list[tuple[TrainedTokens, float]]:
        """Return the active adapters' rows of single tokens, with their weights."""
        tokens: Mapping[str, Any] = self.tokens._modules
        weights = self.active_adapters.weights.items()
        return [(tokens[name], weight) for name, weight in weights if name in tokens]

    def delta(self) -> Tensor:
        """Return Σ w ΔW of the active adapters, shaped as `base_weight`, in float32."""
        total = torch.zeros(self.shape, dtype=torch.float32, device=self.device)
        total = self.by_outputs(total)
        for adapter, weight in self.active():
            A, B = (factor.detach() for factor in adapter.factors())
            change = delta_weight(A, B, adapter.scaling)
            if adapter.magnitude is not None:
                W = self.by_outputs(self.dense_base_weight).to(change.dtype)
                change = rescaled(W + change, adapter.magnitude.detach()) - W
            total += weight * change
        total = self.by_outputs(total)
        for tokens, weight in self.active_tokens():
            total[tokens.ids] += weight * tokens.change().detach()
        return total

    def changes(self) -> Iterator[tuple[Tensor | QuantizedWeight, Tensor]]:
        """Yield each matrix W and what the active adapters add to it, in float32.

        There is one, or one for each expert of a stack.
        """
        yield self.base_weight, self.delta()

    def matrices_in(self, plain: nn.Module, path: str) -> Iterator[Tensor]:
        """Yield the matrices that `plain` has at `path`, in the order of `changes`."""
        yield self.weight_in(plain, path)

    def path_in_base(self, path: str) -> str:
        """Return the base's path of what is adapted here, from the path of this module."""
        return path

    def unwrap(self, model: nn.Module, path: str, *, merged: bool = False) -> None:
        """Replace this module, at `path` of `model`, by what it adapts, or by one with the active
        adapters merged in."""
        raise NotImplementedError

    def weight_in(self, plain: nn.Module, path: str) -> Tensor:
        """Return the weight that `plain` has at `path`, in the orientation of `base_weight`."""
        raise NotImplementedError
