"""The adapter cache: adapters in memory, loaded when they are first asked for, of which the least
recently used are dropped where memory ends."""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Lock

import torch
from torch import Tensor
from transformers import PreTrainedModel

from veneer.adapter.adapted import Adapted
from veneer.adapter.attach import adapted_layer
from veneer.adapter.config import LoRA
from veneer.adapter.experts import why_not_by_rows
from veneer.adapter.layers import AdaptedLayer
from veneer.adapter.method import Method
from veneer.adapter.modules_to_save import owner_of
from veneer.adapter.parameters import AdaptedParameter
from veneer.errors import AdapterError, joined, listed
from veneer.formats.adapters import read
from veneer.formats.contents import without_place
from veneer.formats.install import layer_adapters
from veneer.formats.state import AdapterState
from veneer.formats.validate import validate
from veneer.lowrank.update import LowRankUpdate, RowUpdates, mixed
from veneer.models.device import use_device
from veneer.serve.engine.library import Entry, Mix

log = logging.getLogger("veneer.serve")

ALIGNED = 64  # bytes, a line of the processor's cache


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """What an adapter, or a mix, adds to each layer of the base.

    content: a hash of all that it computes with. Equal hashes give equal answers, whatever names.
    invocation: the tokens from which on alone it acts; none where it acts on all.
    """

    content: str
    layers: Mapping[Adapted, LowRankUpdate]
    nbytes: int
    names: tuple[str, ...]
    invocation: tuple[int, ...] = ()


def row_updates(adapters: Sequence[LoadedAdapter | None]) -> RowUpdates:
    """Return which adapter acts on each row of a batch, as adapted layers take it."""
    distinct = list(dict.fromkeys(adapter for adapter in adapters if adapter is not None))
    which = tuple(None if adapter is None else distinct.index(adapter) for adapter in adapters)
    return RowUpdates([adapter.layers for adapter in distinct], which)


class AdapterCache:
    """The loaded adapters of one base, for any thread; the thread that asks does the loading.

    A row keeps its adapter whole in memory, also when the cache has dropped it.
    """

    def __init__(self, model: PreTrainedModel, limit: int) -> None:
        self.model, self.limit = model, limit
        self.nbytes = self.evicted = 0
        self._adapters: OrderedDict[object, LoadedAdapter] = OrderedDict()  # last used last
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

    def _get(self, mix: Mix) -> LoadedAdapter:
        if (adapter := self.find(mix)) is not None:
            return adapter
        if len(mix) == 1 and mix[0][1] == 1.0:
            adapter = load(self.model, mix[0][0])
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


def _key(mix: Mix) -> object:
    return tuple((entry.version, weight) for entry, weight in mix)


@torch.no_grad()
def load(model: PreTrainedModel, entry: Entry) -> LoadedAdapter:
    """Read an adapter and return it ready to act over `model`, whose layers it leaves unchanged.

    Raises AdapterError, which lists everything that is wrong.
    """
    state = _read(model, entry)
    config = _checked(model, state, entry)
    updates: dict[Adapted, LowRankUpdate] = {}
    paths: list[str] = []
    for path, adapter in layer_adapters(state, config).items():
        layer = adapted_layer(model, path)
        assert isinstance(layer, AdaptedLayer | AdaptedParameter)
        adapter.to(layer.device).requires_grad_(False)
        updates[layer] = layer.low_rank_update([(adapter, 1.0)], layer.compute_dtype)
        paths.append(path)
    invocation = config.invocation_tokens
    labels = [*paths, f"from {invocation} on"] if invocation else paths
    return replace(_in_one_buffer(updates, labels, (entry.name,)), invocation=invocation)


def why_not(model: PreTrainedModel, entry: Entry) -> str:
    """Return why an adapter cannot be served over `model`, or nothing where it can.

    Settings and shapes decide; values are read, and damage among them is seen, when it is loaded.
    """
    try:
        _checked(model, _read(model, entry, shapes_only=True), entry)
    except AdapterError as error:
        return str(error)
    except Exception:
        log.exception("The adapter %r in %s cannot be read.", entry.name, entry.directory)
        return f"{opening(entry)}: reading it failed, and the log says why."
    return ""


def opening(entry: Entry) -> str:
    """Return how each message about an adapter that is not served begins."""
    return f"The adapter {entry.name!r} in {entry.directory} cannot be served"


def _read(model: PreTrainedModel, entry: Entry, *, shapes_only: bool = False) -> AdapterState:
    try:
        return read(entry.directory, model, shapes_only=shapes_only)
    except AdapterError as error:
        raise AdapterError(f"{opening(entry)}: {error}") from error


def _checked(model: PreTrainedModel, state: AdapterState, entry: Entry) -> LoRA:
    if beyond := _beyond_factors(state, entry):
        problems = [beyond]
    else:
        problems = validate(model, state, None, force=False) or _of_experts(model, state)
    if problems:
        raise AdapterError(f"{opening(entry)}: {joined(problems)}.")
    assert isinstance(state.config, LoRA)
    return state.config


def _of_experts(model: PreTrainedModel, state: AdapterState) -> list[str]:
    """Return which adapted parameters cannot differ from row to row, and why."""
    problems = []
    for layer in state.layers():
        if layer.kind == "parameter" and (why := why_not_by_rows(*owner_of(model, layer.path))):
            problems.append(f"it changes {layer.path}, which acts on whole batches: {why}")
    return problems


def _beyond_factors(state: AdapterState, entry: Entry) -> str:
    """Return what of an adapter cannot differ from row to row, and what to do; nothing where all of
    it can."""
    merge = f"merge it and serve the result (veneer merge BASE {entry.directory} OUT)"
    config = state.config
    if isinstance(config, Method) and not config.replaces_weights:
        return (
            f"its {config.virtual_tokens} virtual tokens ({config.method}) act on whole batches; "
            f"ask it alone (veneer chat BASE --adapter {entry.directory})"
        )
    if isinstance(config, Method):
        return f"it replaces weights of the base ({config.method}), which all share; {merge}"
    if state.new_tokens is not None:
        count = len(state.new_tokens.tokens)
        return f"it adds {count} new tokens to the vocabulary, which all share; {merge}"
    if beyond := without_place(state, "serving"):
        return f"it has {listed(beyond)} beside its factors, which act on whole batches; {merge}"
    return ""


def _mixed(adapters: Sequence[tuple[LoadedAdapter, float]]) -> LoadedAdapter:
    """Return a mix of adapters as one. Raises AdapterError where one of them acts from an
    invocation on and others do not."""
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
    return replace(_in_one_buffer(updates, contents, names), invocation=invocations.pop())


def _in_one_buffer(
    updates: Mapping[Adapted, LowRankUpdate], labels: Sequence[str], names: tuple[str, ...]
) -> LoadedAdapter:
    """Return updates as an adapter with all tensors in one buffer, B as (..., rank, out) in memory.

    labels: what else goes into the hash of its content.
    """
    tensors = [t for update in updates.values() for t in (update.A, update.B.mT, update.gain)]
    sizes = [0 if t is None else -(t.nbytes // -ALIGNED) * ALIGNED for t in tensors]
    device = next(iter(updates)).device if updates else None
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
    content.update(buffer.cpu().numpy().tobytes())
    return LoadedAdapter(content.hexdigest(), layers, buffer.nbytes, names)


def _copied(tensor: Tensor | None, memory: Tensor) -> Tensor | None:
    """Copy a tensor into memory (bytes,) of at least its size, and return it there."""
    if tensor is None:
        return None
    return memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
