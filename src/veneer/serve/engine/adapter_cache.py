"""Adapters that are ready to act: loaded when they are first asked for, the least recently used
ones let go where memory ends."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor
from transformers import PreTrainedModel

from veneer.adapter.attach import adapted_layer
from veneer.adapter.config import LoRA
from veneer.adapter.layers import AdaptedLayer
from veneer.errors import AdapterError, listed
from veneer.formats.adapters import read
from veneer.formats.parts import adapters_from
from veneer.formats.state import AdapterState
from veneer.formats.validate import validate
from veneer.lowrank.update import LowRankUpdate, mixed
from veneer.serve.engine.library import Entry

ALIGNED = 64  # bytes, a line of the processor's cache


@dataclass(frozen=True, eq=False)
class Loaded:
    """What an adapter, or a mix, lays over each layer of the base.

    content: a mark of all that it computes with. Equal marks give equal answers, whatever names.
    """

    content: str
    layers: Mapping[AdaptedLayer, LowRankUpdate]
    nbytes: int
    names: tuple[str, ...]


Mix = tuple[tuple[Entry, float], ...]


class Resident:
    """The adapters over one base that are ready. For any thread; loading is done by the caller's.

    One that was asked for stays whole for whoever holds it, though it be let go here.
    """

    def __init__(self, model: PreTrainedModel, limit: int) -> None:
        self.model, self.limit = model, limit
        self.evicted = 0
        self._loaded: OrderedDict[object, Loaded] = OrderedDict()  # the one used last at the end
        self._lock = Lock()
        self._loading = Lock()  # one at a time: it takes memory and all cores

    def find(self, mix: Mix) -> Loaded | None:
        """Return a mix if it is ready."""
        key = _key(mix)
        with self._lock:
            if (found := self._loaded.get(key)) is not None:
                self._loaded.move_to_end(key)
            return found

    def get(self, mix: Mix) -> Loaded:
        """Return a mix, loading what is not ready. Raises AdapterError for what does not fit."""
        with self._loading:
            if (found := self.find(mix)) is not None:
                return found
            if len(mix) == 1 and mix[0][1] == 1.0:
                loaded = load(self.model, mix[0][0])
            else:
                each = [(self._single(entry), weight) for entry, weight in mix]
                loaded = _mixed(each)
            self._keep(_key(mix), loaded)
            return loaded

    def _single(self, entry: Entry) -> Loaded:
        one = ((entry, 1.0),)
        if (found := self.find(one)) is None:
            found = load(self.model, entry)
            self._keep(_key(one), found)
        return found

    def _keep(self, key: object, loaded: Loaded) -> None:
        with self._lock:
            self._loaded[key] = loaded
            while self.nbytes > self.limit and len(self._loaded) > 1:
                self._loaded.popitem(last=False)
                self.evicted += 1

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self._loaded.values())

    def names(self) -> tuple[str, ...]:
        """Return what is ready, the one used last at the end."""
        with self._lock:
            return tuple(" + ".join(each.names) for each in self._loaded.values())


def _key(mix: Mix) -> object:
    return tuple((entry.version, weight) for entry, weight in mix)


@torch.no_grad()
def load(model: PreTrainedModel, entry: Entry) -> Loaded:
    """Read an adapter and return it ready to act over `model`, whose layers it changes in nothing.

    Raises AdapterError, which says all that is wrong.
    """
    state = read(entry.directory, model)
    config = _checked(model, state, entry)
    acting: dict[AdaptedLayer, LowRankUpdate] = {}
    paths: list[str] = []
    for path, adapter in adapters_from(state, config).items():
        layer = adapted_layer(model, path)
        assert isinstance(layer, AdaptedLayer)
        adapter.to(layer.base_weight.device).requires_grad_(False)
        acting[layer] = layer.low_rank_update([(adapter, 1.0)], layer.compute_dtype)
        paths.append(path)
    return _packed(acting, paths, (entry.name,))


def _checked(model: PreTrainedModel, state: AdapterState, entry: Entry) -> LoRA:
    problems = []
    if not isinstance(state.config, LoRA):
        problems.append(
            f"{state.config.method} is no low-rank adapter, and cannot answer beside others"
        )
    if state.rows is not None:
        problems.append(
            f"it brings {len(state.rows.words)} new words, which a shared base has no place for; "
            "merge it, and serve the merged model"
        )
    elif beyond := state.beyond_factors():
        problems.append(
            f"it has {listed(beyond)} beside its factors, which act on whole batches; merge it, "
            "and serve the merged model"
        )
    problems = problems or validate(model, state, None, force=False)
    if problems:
        raise AdapterError(
            f"The adapter {entry.name!r} in {entry.directory} cannot be served: "
            + "; ".join(problems)
            + "."
        )
    assert isinstance(state.config, LoRA)
    return state.config


def _mixed(each: Sequence[tuple[Loaded, float]]) -> Loaded:
    """Return a mix of adapters as one."""
    layers = dict.fromkeys(layer for one, _ in each for layer in one.layers)
    acting = {
        layer: mixed(
            [one.layers[layer] for one, _ in each if layer in one.layers],
            [weight for one, weight in each if layer in one.layers],
        )
        for layer in layers
    }
    contents = [f"{one.content}*{weight!r}" for one, weight in each]
    names = tuple(f"{weight:g}*{one.names[0]}" for one, weight in each)
    return _packed(acting, contents, names)


def _packed(
    acting: Mapping[AdaptedLayer, LowRankUpdate], marks: Sequence[str], names: tuple[str, ...]
) -> Loaded:
    """Return what acts, with all its tensors in one buffer, B as (rank, out) in memory."""
    tensors = [t for one in acting.values() for t in (one.A, one.B.T, one.gain)]
    sizes = [0 if t is None else _aligned(t.nbytes) for t in tensors]
    device = next(iter(acting)).base_weight.device if acting else None
    buffer = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
    laid = iter([_laid(t, part) for t, part in zip(tensors, buffer.split(sizes), strict=True)])
    layers: dict[AdaptedLayer, LowRankUpdate] = {}
    content = hashlib.sha256("\n".join(marks).encode())
    for layer in acting:
        A, B, gain = next(laid), next(laid), next(laid)
        assert A is not None
        assert B is not None
        layers[layer] = LowRankUpdate(A, B.T, gain)
        content.update(f"{tuple(A.shape)} {A.dtype} {gain is None}\n".encode())
    content.update(buffer.cpu().numpy().tobytes())
    return Loaded(content.hexdigest(), layers, buffer.nbytes, names)


def _laid(tensor: Tensor | None, room: Tensor) -> Tensor | None:
    if tensor is None:
        return None
    place = room[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return place.copy_(tensor)


def _aligned(count: int) -> int:
    return -(count // -ALIGNED) * ALIGNED
