"""What an adapter adds to each layer of a base, ready to act on single rows of a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from veneer.adapter.adapted import Adapted
from veneer.adapter.attach import adapted_layer
from veneer.adapter.config import LoRA
from veneer.adapter.embedding import LoRAEmbedding
from veneer.adapter.layers import AdaptedLayer
from veneer.adapter.linear import LoRALinear
from veneer.adapter.own_rows import BatchUpdates, OwnRows, tensors_of
from veneer.adapter.parameters import AdaptedParameter
from veneer.formats.install import layer_adapters
from veneer.formats.state import AdapterState
from veneer.generate.runners.adapter_rows import (
    biases_of_layers,
    own_rows,
    virtual_count,
    why_not_mixed,
)
from veneer.lowrank.update import LowRankUpdate

ALIGNED = 64  # bytes, a line of the processor's cache


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """What an adapter, or a mix, adds to each layer of the base, and has for itself.

    content: a hash of all that it computes with. Equal hashes give equal answers, whatever names.
    invocation: the tokens from which on alone it acts; none where it acts on all. own: rows of
    embedding and head. prefix: keys and values that come first in each slot, (layers, 2, kv_heads,
    virtual, head_dim). why_not_mixed: why it acts alone or not at all, if it does.
    """

    content: str
    layers: Mapping[Adapted, LowRankUpdate]
    nbytes: int
    names: tuple[str, ...]
    invocation: tuple[int, ...] = ()
    own: OwnRows | None = None
    prefix: Tensor | None = None
    why_not_mixed: str = ""

    @cached_property
    def embeds(self) -> bool:
        """Whether it adds to embeddings, of tokens or of positions."""
        return any(isinstance(layer, LoRAEmbedding) for layer in self.layers)


def row_updates(adapters: Sequence[LoadedAdapter | None]) -> BatchUpdates:
    """Return which adapter acts on each row of a batch, as adapted layers take it."""
    distinct = list(dict.fromkeys(adapter for adapter in adapters if adapter is not None))
    which = tuple(None if adapter is None else distinct.index(adapter) for adapter in adapters)
    own = [adapter.own for adapter in distinct]
    return BatchUpdates([adapter.layers for adapter in distinct], which, own=own)


@torch.no_grad()
def made_ready(model: PreTrainedModel, state: AdapterState, name: str) -> LoadedAdapter:
    """Return an adapter ready to act over a model that it fits, whose layers stay as they are."""
    config = state.config
    updates: dict[Adapted, LowRankUpdate] = {}
    paths: list[str] = []
    for path, adapter in layer_adapters(state, config).items() if isinstance(config, LoRA) else ():
        layer = adapted_layer(model, path)
        assert isinstance(layer, AdaptedLayer | AdaptedParameter)
        adapter.to(layer.device).requires_grad_(False)
        updates[layer] = layer.low_rank_update([(adapter, 1.0)], layer.compute_dtype)
        paths.append(path)
    for path, bias in biases_of_layers(model, state).items():
        linear = adapted_layer(model, path)
        assert isinstance(linear, LoRALinear)
        updates[linear] = _with_bias(linear, updates.get(linear), bias)
        paths.append(f"{path}.bias")
    invocation = config.invocation_tokens if isinstance(config, LoRA) else ()
    labels = [*paths, f"from {invocation} on"] if invocation else paths
    prefix = state.tensors.get("prefix") if virtual_count(state) else None
    loaded = in_one_buffer(
        *(updates, labels, (name,)),
        own=own_rows(model, state),
        prefix=None if prefix is None else prefix.to(model.device, model.dtype),
    )
    return replace(loaded, invocation=invocation, why_not_mixed=why_not_mixed(state))


def _with_bias(layer: LoRALinear, update: LowRankUpdate | None, bias: Tensor) -> LowRankUpdate:
    """Return an update whose layer has another bias (out,); one of zeros where there is none."""
    own: Tensor | None = layer.original.bias  # type: ignore[assignment]
    change = bias.to(layer.device, torch.float32) - (0.0 if own is None else own.float())
    if update is None:
        out, in_ = layer.base_weight.shape
        zeros: dict[str, Any] = {"dtype": layer.compute_dtype, "device": layer.device}
        update = LowRankUpdate(torch.zeros(1, in_, **zeros), torch.zeros(out, 1, **zeros), None)
    return replace(update, bias=change if update.bias is None else update.bias + change)


def in_one_buffer(
    updates: Mapping[Adapted, LowRankUpdate],
    labels: Sequence[str],
    names: tuple[str, ...],
    *,
    own: OwnRows | None = None,
    prefix: Tensor | None = None,
) -> LoadedAdapter:
    """Return updates as an adapter with all tensors in one buffer, B as (..., rank, out) in memory.

    labels: what else goes into the hash of its content. own, prefix: copied into the buffer too.
    """
    fields = {} if own is None else tensors_of(own)
    tensors = [t for own in updates.values() for t in (own.A, own.B.mT, own.gain, own.bias)]
    tensors += [*fields.values(), prefix]
    sizes = [0 if t is None else -(t.nbytes // -ALIGNED) * ALIGNED for t in tensors]
    device = next((t.device for t in tensors if t is not None), None)
    buffer = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
    copies = map(_copied, tensors, buffer.split(sizes))
    layers: dict[Adapted, LowRankUpdate] = {}
    content = hashlib.sha256("\n".join(labels).encode())
    for layer in updates:
        A, B, gain, bias = next(copies), next(copies), next(copies), next(copies)
        assert A is not None
        assert B is not None
        layers[layer] = LowRankUpdate(A, B.mT, gain, bias)
        which = f"{gain is None} {bias is None}"
        content.update(f"{tuple(A.shape)} {A.dtype} {which}\n".encode())
    if own is not None:
        copied: dict[str, Any] = {name: next(copies) for name in fields}
        own = replace(own, **copied)
        shapes = {name: tuple(x.shape) for name, x in fields.items()}
        content.update(f"{own.size} {shapes}\n".encode())
    if prefix is not None:
        prefix = next(copies)
        assert prefix is not None
        content.update(f"{tuple(prefix.shape)}\n".encode())
    content.update(buffer.cpu().numpy().data)
    return LoadedAdapter(content.hexdigest(), layers, buffer.nbytes, names, own=own, prefix=prefix)


def _copied(tensor: Tensor | None, memory: Tensor) -> Tensor | None:
    """Copy a tensor into memory (bytes,) of at least its size, and return it there."""
    if tensor is None:
        return None
    return memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
