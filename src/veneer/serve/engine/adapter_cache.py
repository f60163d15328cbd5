"""The adapter cache: adapters in memory, loaded when they are first asked for, of which the least
recently used are dropped where memory ends."""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from veneer.adapter.adapted import Adapted
from veneer.adapter.attach import adapted_layer
from veneer.adapter.config import LoRA
from veneer.adapter.embedding import LoRAEmbedding
from veneer.adapter.experts import why_not_by_rows
from veneer.adapter.layers import AdaptedLayer
from veneer.adapter.method import Method
from veneer.adapter.modules_to_save import owner_of
from veneer.adapter.own_rows import BatchUpdates, OwnRows, tensors_of
from veneer.adapter.parameters import AdaptedParameter
from veneer.adapter.virtual import keys_values
from veneer.adapter.weight_access import Place
from veneer.errors import AdapterError, ConfigError, joined, listed
from veneer.formats.adapters import read
from veneer.formats.contents import without_place
from veneer.formats.install import layer_adapters
from veneer.formats.state import AdapterState
from veneer.formats.validate import validate
from veneer.lowrank.update import LowRankUpdate, mixed
from veneer.models.device import use_device
from veneer.serve.engine.adapter_rows import (
    own_rows,
    shared_by_all,
    virtual_count,
    why_not_mixed,
)
from veneer.serve.engine.library import Entry, Mix, unmixed

log = logging.getLogger("veneer.serve")

_Key = tuple[tuple[int, float], ...]  # versions of adapters, with their weights
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


class AdapterCache:
    """The loaded adapters of one base, for any thread; the thread that asks does the loading.

    A row keeps its adapter whole in memory, also when the cache has dropped it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        limit: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
        context: int | None = None,
    ) -> None:
        self.fit = Fit(model, tokenizer, context)
        self.model, self.limit = model, limit
        self.nbytes = self.evicted = 0
        self._adapters: OrderedDict[_Key, LoadedAdapter] = OrderedDict()  # last used last
        self._lock = Lock()
        self._loading = Lock()  # one at a time: it takes memory and all cores

    def find(self, mix: Mix) -> LoadedAdapter | None:
        """Return a mix if it is in memory."""
        key = _key(mix)
        with self._lock:
            if (adapter := self._adapters.get(key)) is not None:
                self._adapters.move_to_end(key)
            return adapter

    def get(self, mix: Mix) -> LoadedAdapter:
        """Return a mix, loading what is not in memory. Raises AdapterError for a misfit."""
        use_device(self.model.device)
        with self._loading:
            return self._get(mix)

    def names(self) -> tuple[str, ...]:
        """Return what is in memory, the most recently used last."""
        with self._lock:
            return tuple(" + ".join(adapter.names) for adapter in self._adapters.values())

    def drop_gone(self, versions: Collection[int]) -> None:
        """Drop what is made of versions other than these. Rows that use it keep it."""
        with self._lock:
            for key in list(self._adapters):
                if not all(version in versions for version, _ in key):
                    self.nbytes -= self._adapters.pop(key).nbytes

    def _get(self, mix: Mix) -> LoadedAdapter:
        if (adapter := self.find(mix)) is not None:
            return adapter
        if (alone := unmixed(mix)) is not None:
            adapter = load(self.fit, alone)
        else:
            adapter = _mixed([(self._get(((entry, 1.0),)), weight) for entry, weight in mix])
        with self._lock:
            self._adapters[_key(mix)] = adapter
            self.nbytes += adapter.nbytes
            while self.nbytes > self.limit and len(self._adapters) > 1:
                _, dropped = self._adapters.popitem(last=False)
                self.nbytes -= dropped.nbytes
                self.evicted += 1
        return adapter


def _key(mix: Mix) -> _Key:
    return tuple((entry.version, weight) for entry, weight in mix)


class Fit:
    """What adapters must fit: a model, its tokenizer, and the tokens that it reads at most."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        context: int | None,
    ) -> None:
        self.model, self.tokenizer, self.context = model, tokenizer, context
        self.keys_values: tuple[int, ...] | None = None
        with suppress(ConfigError):  # a prefix is then refused
            # Now, for nothing else may run the model once the engine does.
            self.keys_values = tuple(keys_values(model, torch.zeros(1, dtype=torch.long)).shape)

    def why_not(self, entry: Entry) -> str:
        """Return why an adapter cannot be served, or nothing where it can.

        Settings and shapes decide; values are read, and damage among them is seen, when it is
        loaded.
        """
        try:
            self.check(self.read(entry, shapes_only=True), entry)
        except AdapterError as error:
            return str(error)
        except Exception:
            log.exception("The adapter %r in %s cannot be read.", entry.name, entry.directory)
            return f"{opening(entry)}: reading it failed, and the log says why."
        return ""

    def read(self, entry: Entry, *, shapes_only: bool = False) -> AdapterState:
        """Return what an adapter's files say. Raises AdapterError."""
        try:
            return read(entry.directory, self.model, shapes_only=shapes_only)
        except AdapterError as error:
            raise AdapterError(f"{opening(entry)}: {error}") from error

    def check(self, state: AdapterState, entry: Entry) -> None:
        """Raise AdapterError, which lists everything that is wrong."""
        model = self.model
        if beyond := _beyond_rows(model, state, entry):
            problems = [beyond]
        else:
            # Only ids of new tokens depend on a vocabulary.
            tokenizer = None if state.new_tokens is None else self.tokenizer
            problems = validate(
                *(model, state, tokenizer), force=False, beside=True, keys_values=self.keys_values
            ) or _of_whole_batches(model, state)
            if self.context is not None and (count := virtual_count(state)) >= self.context:
                problems.append(
                    f"its {count:,} virtual tokens fill the context of {self.context:,}"
                )
        if problems:
            raise AdapterError(f"{opening(entry)}: {joined(problems)}.")


@torch.no_grad()
def load(fit: Fit, entry: Entry) -> LoadedAdapter:
    """Read an adapter and return it ready to act over a model, whose layers it leaves unchanged.

    Raises AdapterError, which lists everything that is wrong.
    """
    model, state = fit.model, fit.read(entry)
    fit.check(state, entry)
    updates: dict[Adapted, LowRankUpdate] = {}
    paths: list[str] = []
    config = state.config
    for path, adapter in layer_adapters(state, config).items() if isinstance(config, LoRA) else ():
        layer = adapted_layer(model, path)
        assert isinstance(layer, AdaptedLayer | AdaptedParameter)
        adapter.to(layer.device).requires_grad_(False)
        updates[layer] = layer.low_rank_update([(adapter, 1.0)], layer.compute_dtype)
        paths.append(path)
    invocation = config.invocation_tokens if isinstance(config, LoRA) else ()
    labels = [*paths, f"from {invocation} on"] if invocation else paths
    prefix = state.tensors.get("prefix") if virtual_count(state) else None
    loaded = _in_one_buffer(
        *(updates, labels, (entry.name,)),
        own=own_rows(model, state),
        prefix=None if prefix is None else prefix.to(model.device, model.dtype),
    )
    return replace(loaded, invocation=invocation, why_not_mixed=why_not_mixed(state))


def opening(entry: Entry) -> str:
    """Return how each message about an adapter that is not served begins."""
    return f"The adapter {entry.name!r} in {entry.directory} cannot be served"


def _of_whole_batches(model: PreTrainedModel, state: AdapterState) -> list[str]:
    """Return which adapted layers and parameters cannot differ from row to row, and why."""
    problems = []
    for layer in state.layers():
        owner, name = owner_of(model, layer.path)
        if layer.kind == "parameter":
            why = why_not_by_rows(owner, name)
        else:
            computes = Place(type(owner), name).is_never_called
            why = "the model's code computes with its weight" if computes else ""
        if why:
            problems.append(f"it changes {layer.path}, which acts on whole batches: {why}")
    return problems


def _beyond_rows(model: PreTrainedModel, state: AdapterState, entry: Entry) -> str:
    """Return what of an adapter cannot differ from row to row, and what to do; nothing where all of
    it can."""
    merge = f"merge it and serve the result (veneer merge BASE {entry.directory} OUT)"
    config = state.config
    if isinstance(config, Method):
        if config.replaces_weights:
            return f"it replaces weights of the base ({config.method}), which all share; {merge}"
        return ""
    if beyond := [*without_place(state, "serving"), *shared_by_all(model, state)]:
        return f"it has {listed(beyond)} beside its factors, which act on whole batches; {merge}"
    return ""


def _mixed(adapters: Sequence[tuple[LoadedAdapter, float]]) -> LoadedAdapter:
    """Return a mix of adapters as one. Raises AdapterError for adapters that cannot be mixed."""
    for adapter, _ in adapters:
        if adapter.why_not_mixed:
            why = f"{adapter.why_not_mixed}, which act alone or not at all"
            raise AdapterError(f"{adapter.names[0]} cannot be mixed: it {why}.")
    with_tokens = [adapter for adapter, _ in adapters if adapter.own is not None]
    if len(with_tokens) > 1:
        both = listed([adapter.names[0] for adapter in with_tokens])
        raise AdapterError(f"{both} cannot be mixed: each has new tokens, with the same ids.")
    invocations = {adapter.invocation for adapter, _ in adapters}
    if len(invocations) > 1:
        later = listed(adapter.names[0] for adapter, _ in adapters if adapter.invocation)
        raise AdapterError(
            f"{later} cannot be mixed with adapters that do not act from the same invocation on."
        )
    layers = dict.fromkeys(layer for adapter, _ in adapters for layer in adapter.layers)
    updates = {
        layer: mixed(
            [adapter.layers[layer] for adapter, _ in adapters if layer in adapter.layers],
            [weight for adapter, weight in adapters if layer in adapter.layers],
        )
        for layer in layers
    }
    contents = [f"{adapter.content}*{weight!r}" for adapter, weight in adapters]
    names = tuple(f"{weight:g}*{adapter.names[0]}" for adapter, weight in adapters)
    own = with_tokens[0].own if with_tokens else None
    return replace(_in_one_buffer(updates, contents, names, own=own), invocation=invocations.pop())


def _in_one_buffer(
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
    tensors = [t for update in updates.values() for t in (update.A, update.B.mT, update.gain)]
    tensors += [*fields.values(), prefix]
    sizes = [0 if t is None else -(t.nbytes // -ALIGNED) * ALIGNED for t in tensors]
    device = next((t.device for t in tensors if t is not None), None)
    buffer = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
    copies = map(_copied, tensors, buffer.split(sizes))
    layers: dict[Adapted, LowRankUpdate] = {}
    content = hashlib.sha256("\n".join(labels).encode())
    for layer in updates:
        A, B, gain = next(copies), next(copies), next(copies)
        assert A is not None
        assert B is not None
        layers[layer] = LowRankUpdate(A, B.mT, gain)
        content.update(f"{tuple(A.shape)} {A.dtype} {gain is None}\n".encode())
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
