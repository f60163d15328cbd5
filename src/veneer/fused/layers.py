"""A decoder layer as the two functions of `fused/block.py`, over its submodules as they are now."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from veneer.adapter.linear import LoRALinear
from veneer.adapter.wrapper import Wrapper, is_intercepted
from veneer.fused.analyse import is_linear
from veneer.fused.block import FeedForward, Mixture, SelfAttention
from veneer.fused.heads import Heads, LatentHeads
from veneer.fused.latent import Expansion, LatentAttention
from veneer.fused.norms import with_weights
from veneer.fused.rotaries import Angles, Rotaries
from veneer.fused.structure import (
    ExpansionStructure,
    LayerStructure,
    MixtureStructure,
    Variant,
)
from veneer.kernels.arena import Arena
from veneer.kernels.attention import Attention, Packing
from veneer.kernels.dropout import Mask
from veneer.kernels.norm import Norm
from veneer.lowrank.group import Group, Projection
from veneer.models.block_buffers import whole
from veneer.models.description import multiplies
from veneer.quant.weight import QuantizedLinear

# What is known of layers whose class has a forward of its own.
_MULTIPLIES: WeakKeyDictionary[nn.Linear, bool] = WeakKeyDictionary()


@dataclass(frozen=True)
class FusedLayer:
    """A decoder layer of this model that may be computed as two functions.

    norms: by path, without their weights. query_scaling: beta and the original context, by which
    Ministral scales queries.
    """

    layer: nn.Module
    structure: LayerStructure
    variant: Variant
    norms: Mapping[str, Norm]
    query_scaling: tuple[float, int] | None = None

    def forward(self, hidden_states: Tensor, **options: Any) -> Tensor | None:
        """Return the layer's output, (1, tokens, dim), or None where its own forward is needed;
        options: as `halves` takes them."""
        halves = self.halves(hidden_states, **options)
        if halves is None:
            return None
        first, second = halves
        x = hidden_states[0]
        y, made_of = first(x)
        if isinstance(second, Mixture):
            y = second(y)
        elif self.structure.parallel:
            y, _ = second(x, y)
        else:
            y, _ = (second if made_of is None else replace(second, made_of=made_of))(y)
        return y.unsqueeze(0)

    def halves(
        self,
        hidden_states: Tensor,  # (1, tokens, dim)
        *,
        position_embeddings: Angles | None,
        position_ids: Tensor | None,  # (1, tokens)
        packing: Packing,
        rotaries: Rotaries,
        arena: Arena,
        recompute_projections: bool = False,
        mask_of: Callable[[float], Mask] = Mask.drawn,
    ) -> tuple[SelfAttention, FeedForward | Mixture] | None:
        """Return the two functions, or None where the layer's own forward is needed: for trained
        norms or biases, a prefix, or mixed dtypes. mask_of: what makes the masks of the base's
        dropout."""
        device, dtype = hidden_states.device, hidden_states.dtype
        linears, norms = self._linears(), self._norms()
        autocast = torch.is_autocast_enabled(device.type)
        if linears is None or norms is None or packing.prefix is not None or autocast:
            return None
        weights = [*(p.weight for p in linears.values()), *(norm.weight for norm in norms.values())]
        if {weight.dtype for weight in weights if weight is not None} != {dtype}:
            return None
        attention, feed_forward = self.structure.attention, self.structure.feed_forward

        def mask(p: float) -> Mask | None:
            return mask_of(p) if p and self.layer.training else None

        shared: dict[str, Any] = {
            "arena": arena,
            "multiplier": self.variant.multiplier,
            "recompute_projections": recompute_projections,
        }
        of_attention: dict[str, Any] = {
            "norm": norms.get(attention.norm),
            "inputs": Group(linears[path] for path in attention.inputs),
            "output": Group([linears[attention.output]]),
            "post_norm": norms.get(attention.post_norm),
            "dropout": mask(attention.dropout),
            "attention": Attention(
                packing,
                self.scale,
                attention.window,
                attention.softcap,
                None if attention.sinks is None else self.layer.get_parameter(attention.sinks),
                mask(attention.score_dropout),
            ),
            **shared,
        }
        of_heads: dict[str, Any] = {
            "heads": attention.heads,
            "head_dim": attention.head_dim,
            "value_dim": attention.value_dim,
            "rotary": rotaries.rotary(self.variant.turn, position_embeddings, dtype),
            "q_factor": self.query_factor(position_ids, dtype),
        }
        if (latent := attention.latent) is None:
            heads = Heads(
                key_heads=attention.key_heads,
                order=self.variant.order,
                q_norm=norms.get(attention.q_norm),
                k_norm=norms.get(attention.k_norm),
                **of_heads,
            )
            first = SelfAttention(heads=heads, **of_attention)
        else:

            def expansion(structure: ExpansionStructure) -> Expansion:
                return Expansion(norms.get(structure.norm), Group([linears[structure.linear]]))

            first = LatentAttention(
                heads=LatentHeads(turning=latent.turning, **of_heads),
                q=None if latent.q is None else expansion(latent.q),
                kv=expansion(latent.kv),
                **of_attention,
            )
        if isinstance(feed_forward, MixtureStructure):
            return first, Mixture(
                norms.get(feed_forward.norm),
                self.module(feed_forward.module),
                norms.get(feed_forward.post_norm),
                self.variant.multiplier,
            )
        second = FeedForward(
            norm=norms.get(feed_forward.norm),
            inputs=Group(linears[path] for path in feed_forward.inputs),
            output=Group([linears[feed_forward.output]]),
            post_norm=norms.get(feed_forward.post_norm),
            dropout=mask(feed_forward.dropout),
            activation=self.variant.activation,
            is_gated=feed_forward.is_gated,
            gate_first=self.variant.gate_first,
            **shared,
        )
        return first, second

    @property
    def scale(self) -> float:
        """What attention's scores are multiplied with."""
        attention = self.structure.attention
        return attention.head_dim**-0.5 if self.variant.prescaled else attention.scale

    def applies(self) -> bool:
        """Return whether the layer, with its adapters as they act now, can be computed so."""
        with whole(self.layer):
            return self._linears() is not None and self._norms() is not None

    def linears(self) -> list[nn.Module]:
        """Return the fused halves' linear layers as they are now, in the order of their use."""
        return [self.module(path) for path in self.structure.linears]

    def module(self, path: str) -> Any:
        """Return a submodule of the layer as it is now."""
        parent, name = self._places[path]
        return parent[name]

    def is_as_proven(self) -> bool:
        """Return whether only linear layers have been replaced, and nobody waits for a call of a
        submodule that the two functions never make."""
        for siblings, name, module in self._others:
            if siblings.get(name) is not module or is_intercepted(module):
                return False
        for linear in self.linears():
            original = linear._modules.get("original")  # of one with adapters
            if is_intercepted(linear) or (original is not None and is_intercepted(original)):
                return False
        return True

    @cached_property
    def _others(self) -> list[tuple[Mapping[str, Any], str, nn.Module]]:
        """All submodules but the linear layers and a mixture, and where each is."""
        path = self.structure.mixture
        mixture = set() if path is None else set(self.layer.get_submodule(path).modules())
        return [
            (parent._modules, name, module)
            for parent in (self.layer, *submodules(self.layer))
            if not is_linear(parent) and parent not in mixture
            for name, module in parent._modules.items()
            if module is not None and not is_linear(module) and module not in mixture
        ]

    @cached_property
    def _places(self) -> dict[str, tuple[Mapping[str, Any], str]]:
        """Where each submodule is: looking a path up takes ten times as long."""
        places: dict[str, tuple[Mapping[str, Any], str]] = {}
        structure = self.structure
        mixture = () if structure.mixture is None else (structure.mixture,)
        for path in (*structure.linears, *structure.norms, *mixture):
            parent, _, name = path.rpartition(".")
            places[path] = self.layer.get_submodule(parent)._modules, name
        return places

    def _linears(self) -> dict[str, Projection] | None:
        linears = {path: _projection(self.module(path)) for path in self.structure.linears}
        return linears if None not in linears.values() else None  # type: ignore[return-value]

    def _norms(self) -> dict[str | None, Norm] | None:
        """Return the layer's norms, and None where one of them trains."""
        norms: dict[str | None, Norm] = {
            path: with_weights(norm, self.module(path)) for path, norm in self.norms.items()
        }
        return None if any(norm.trains for norm in norms.values()) else norms

    def query_factor(self, position_ids: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Return what each query is scaled with, (tokens, 1, 1), or None for 1."""
        if not self.variant.scales_queries or self.query_scaling is None or position_ids is None:
            return None
        beta, context = self.query_scaling
        factor = 1 + beta * torch.log(1 + torch.floor(position_ids[0] / context))
        return factor.to(dtype)[:, None, None]


def submodules(module: nn.Module) -> Iterator[nn.Module]:
    """Yield what is within a module; of an adapted one the original alone."""
    children = module._modules.values()
    for child in children if not isinstance(module, Wrapper) else [module.original]:
        if isinstance(child, nn.Module):
            yield child
            yield from submodules(child)


def _projection(layer: Any) -> Projection | None:
    if isinstance(layer, LoRALinear):
        return layer.projection()
    if isinstance(layer, QuantizedLinear):
        weight: Any = layer.quantized_weight
    elif type(layer).forward is Conv1D.forward:
        weight = layer.weight.T
    elif isinstance(layer, nn.Linear) and _multiplies(layer):
        weight = layer.weight
    else:
        return None
    bias: Tensor | None = layer.bias
    trains = [x.requires_grad for x in (weight, bias) if isinstance(x, Tensor)]
    return None if any(trains) else Projection.plain(weight, bias)


def _multiplies(layer: nn.Linear) -> bool:
    """Return what `multiplies` says of a layer, which is asked at every step, once."""
    if (known := _MULTIPLIES.get(layer)) is None:
        known = _MULTIPLIES[layer] = multiplies(layer)
    return known
