"""The adapted layers: one class for each kind of base layer."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.frozen.packed import FrozenLinear, Packed, dense
from veneer.lowrank.adapter import Adapter, Route
from veneer.lowrank.autograd import LowRankLinear
from veneer.lowrank.config import LoRA
from veneer.lowrank.formula import delta_weight, merged_weight, new_A
from veneer.lowrank.projection import Projection


class Wrapper(nn.Module):
    """A frozen `original` with something laid over it."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original.requires_grad_(False)
        self.training = original.training

    def __getattr__(self, name: str) -> Any:
        # Model code reads attributes of the layer that it knows (weight, in_features, nf).
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("original"), name)


class AdaptedLayer(Wrapper):
    """A frozen `original` with named adapters over it; `route` says which of them act."""

    def __init__(self, original: nn.Module, route: Route) -> None:
        super().__init__(original)
        self.adapters = nn.ModuleDict()
        self.route = route

    @property
    def frozen(self) -> Tensor | Packed:
        """The frozen W, as (out, in) for a linear layer and (words, dim) for an embedding."""
        if isinstance(self.original, FrozenLinear):
            return self.original.packed
        weight: Tensor = self.original.weight  # type: ignore[assignment]
        return self.oriented(weight)

    @property
    def frozen_weight(self) -> Tensor:
        """`frozen` as a tensor, unpacked anew at each look where it is packed."""
        return dense(self.frozen)

    def oriented(self, weight: Tensor) -> Tensor:
        """Return a weight in the orientation of `frozen_weight` from the one that is stored."""
        return weight

    def add(self, name: str, config: LoRA, path: str, generator: torch.Generator | None) -> None:
        """Add a fresh adapter, which leaves the layer's output as it is."""
        raise NotImplementedError

    def put(self, name: str, adapter: Adapter) -> None:
        """Lay an adapter with given tensors over the layer, on the layer's device."""
        self.adapters[name] = adapter.to(self.frozen.device)

    def active(self) -> list[tuple[Adapter, float]]:
        """Return the adapters that act here with weight · scaling."""
        pairs = []
        for name, weight in self.route.weights.items():
            if name in self.adapters:
                adapter = self.adapters[name]
                assert isinstance(adapter, Adapter)
                pairs.append((adapter, weight * adapter.scaling))
        return pairs

    def delta(self) -> Tensor:
        """Return Σ scaling · B A of the acting adapters, shaped as `frozen_weight`, in float32."""
        total = torch.zeros(self.frozen.shape, dtype=torch.float32, device=self.frozen.device)
        for adapter, scaling in self.active():
            total += self._delta_of(adapter, scaling)
        return total

    def fuse(self) -> nn.Module:
        """Return a new plain layer with the acting adapters merged in; this one is untouched."""
        merged = merged_weight(self.frozen_weight, self.delta())
        if isinstance(self.original, FrozenLinear):
            return self.original.plain(merged)
        merged = self.oriented(merged)
        fused = copy.copy(self.original)
        fused._parameters = dict(self.original._parameters)
        fused.weight = nn.Parameter(merged.contiguous(), requires_grad=False)
        return fused

    def _delta_of(self, adapter: Adapter, scaling: float) -> Tensor:
        return delta_weight(adapter.lora_A.detach(), adapter.lora_B.detach(), scaling)


class LoRALinear(AdaptedLayer):
    """Return W x + b + Σ scaling · B (A x).

    `transposed` says that the original keeps its weight as (in, out), as transformers' Conv1D does.
    """

    def __init__(self, original: nn.Module, route: Route, *, transposed: bool = False) -> None:
        super().__init__(original, route)
        self.transposed = transposed

    def oriented(self, weight: Tensor) -> Tensor:
        return weight.T if self.transposed else weight

    def add(self, name: str, config: LoRA, path: str, generator: torch.Generator | None) -> None:
        out_features, in_features = self.frozen.shape
        rank = config.rank_of(path)
        A = new_A(rank, in_features, config.init, generator)
        B = torch.zeros(out_features, rank)
        scaling = config.scaling_of(path)
        self.put(name, Adapter(A, B, scaling=scaling, dropout=config.dropout))

    def projection(self) -> Projection | None:
        """Return the layer as it acts now, or None where it cannot be had as one product."""
        active = self.active()
        if self.training and any(adapter.dropout for adapter, _ in active):
            return None
        masters = [(adapter.lora_A, adapter.lora_B, scaling) for adapter, scaling in active]
        bias: Tensor | None = self.original.bias  # type: ignore[assignment]
        return Projection.of(self.frozen, bias, masters)

    def forward(self, x: Tensor) -> Tensor:
        active = self.active()
        if not active:
            return self.original(x)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        # Adapters whose inputs are dropped out need a mask each; all others act as one,
        # their A stacked and their B side by side.
        dropped = [pair for pair in active if self.training and pair[0].dropout]
        together = [pair for pair in active if pair not in dropped]
        first = together or [dropped.pop(0)]
        p = first[0][0].dropout if self.training else 0.0
        flat = x.reshape(-1, x.shape[-1])  # (tokens, in)
        keep = F.dropout(torch.ones_like(flat), p) if p else None
        A, B = _stack(first, x.dtype)
        bias: Tensor | None = self.original.bias  # type: ignore[assignment]
        y = LowRankLinear.apply(flat, self.frozen, bias, A, B, keep)  # (tokens, out)
        y = y.view(*x.shape[:-1], y.shape[-1])
        for pair in dropped:
            A, B = _stack([pair], x.dtype)
            y = y + F.linear(F.linear(F.dropout(x, pair[0].dropout), A), B)
        return y


class LoRAEmbedding(AdaptedLayer):
    """Return E[ids] + Σ scaling · B A[:, ids], over nn.Embedding.

    Here A (rank, words) starts at zero and B (dim, rank) is random, as in loralib: the rows of
    words that the data never shows then stay exactly where they were.
    """

    def add(self, name: str, config: LoRA, path: str, generator: torch.Generator | None) -> None:
        words, dim = self.frozen.shape
        rank = config.rank_of(path)
        A = torch.zeros(rank, words)
        B = torch.randn(dim, rank, generator=generator)
        self.put(name, Adapter(A, B, scaling=config.scaling_of(path)))

    def forward(self, ids: Tensor) -> Tensor:
        y = self.original(ids)
        for adapter, scaling in self.active():
            rows = F.embedding(ids, adapter.lora_A.T)  # (..., rank)
            delta = F.linear(rows, scaling * adapter.lora_B)  # (..., dim)
            y = y + delta.to(y.dtype) * getattr(self.original, "embed_scale", 1.0)
        return y

    def _delta_of(self, adapter: Adapter, scaling: float) -> Tensor:
        return super()._delta_of(adapter, scaling).T  # (words, dim)


def _stack(pairs: list[tuple[Adapter, float]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return A (Σ rank, in) and scaled B (out, Σ rank) in the computing dtype, differentiably."""
    A = torch.cat([adapter.lora_A for adapter, _ in pairs])
    B = torch.cat([adapter.lora_B * scaling for adapter, scaling in pairs], dim=1)
    return A.to(dtype), B.to(dtype)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """Yield (path in the base, layer) of every adapted layer."""
    for path, module in model.named_modules():
        if isinstance(module, AdaptedLayer):
            yield path, module


def idle_adapters(model: nn.Module) -> Iterator[Adapter]:
    """Yield the adapters that are attached but do not act."""
    for _, layer in lora_layers(model):
        for name, adapter in layer.adapters.items():
            if name not in layer.route.weights:
                assert isinstance(adapter, Adapter)
                yield adapter
