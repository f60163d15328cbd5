"""The adapter cache: adapters in memory, loaded when they are first asked for, of which the least
recently used are dropped where memory ends."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from threading import Lock

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from veneer.adapter.experts import why_not_by_rows
from veneer.adapter.method import Method
from veneer.adapter.modules_to_save import owner_of
from veneer.adapter.virtual import keys_values
from veneer.adapter.weight_access import Place
from veneer.errors import AdapterError, ConfigError, joined, listed, passing_fault
from veneer.formats.adapters import read
from veneer.formats.contents import without_place
from veneer.formats.state import AdapterState
from veneer.formats.validate import validate
from veneer.generate.runners.adapter_rows import (
    shared_by_all,
    virtual_count,
)
from veneer.generate.runners.loaded import LoadedAdapter, in_one_buffer, made_ready
from veneer.lowrank.update import mixed
from veneer.models.device import use_device
from veneer.serve.engine.library import Entry, Mix, unmixed

log = logging.getLogger("veneer.serve")

_Key = tuple[tuple[int, float], ...]  # versions of adapters, with their weights


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
        """Return what an adapter's files say. Raises AdapterError for a misfit, which is refused
        for good; and what is of the system at that moment as it is."""
        try:
            return read(entry.directory, self.model, shapes_only=shapes_only)
        except AdapterError as error:
            if (fault := passing_fault(error)) is not None:
                raise fault from None
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


def load(fit: Fit, entry: Entry) -> LoadedAdapter:
    """Read an adapter and return it ready to act over a model, whose layers it leaves unchanged.

    Raises AdapterError, which lists everything that is wrong.
    """
    state = fit.read(entry)
    fit.check(state, entry)
    return made_ready(fit.model, state, entry.name)


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
    return replace(in_one_buffer(updates, contents, names, own=own), invocation=invocations.pop())
