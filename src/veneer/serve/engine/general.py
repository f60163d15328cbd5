"""Any causal language model through its own forward: one for all rows that answer.

Rows end at the same place, as in a batch that is padded on the left, so that masks, windows and
positions are what every model knows from transformers' own `generate`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from veneer.adapter.active import active_adapters_of
from veneer.adapter.virtual import keys_values
from veneer.errors import ConfigError, ModelError
from veneer.lowrank.update import RowUpdates
from veneer.serve.engine.adapter_cache import Loaded
from veneer.serve.engine.runner import Chunk

ROOM = 256  # places that are made at a time, at least


@dataclass
class Clock:
    """Where the rows of a batch stand: the next token of each of `rows` goes to place `at`, and the
    longest row reaches back to place `low`."""

    rows: int = 0
    at: int = 0
    low: int = 0


class SharedLayer(DynamicLayer):
    """Keys and values of one layer for all rows: (slots, heads, places, head_dim)."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        clock = self.clock
        assert key_states.shape[2] == 1
        seen = slice(clock.low, clock.at + 1)
        found = []
        for all_, new in ((self.keys, key_states), (self.values, value_states)):
            assert all_ is not None
            all_[: clock.rows, :, clock.at] = new[:, :, 0]
            found.append(all_[: clock.rows, :, seen])
        return found[0], found[1]

    def get_seq_length(self) -> int:
        return self.clock.at - self.clock.low

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0


class General:
    """A runner over the model's own forward. Raises ModelError for a model without a cache of keys
    and values, which alone can be put aside and taken up again."""

    def __init__(self, model: PreTrainedModel, slots: int) -> None:
        self.model, self.slots = model, slots
        self.active_adapters = active_adapters_of(model)
        try:
            shape = keys_values(model, torch.zeros(1, dtype=torch.long)).shape
        except ConfigError as error:
            raise ModelError(
                "Only models that keep keys and values, of one shape in all layers, can be served."
            ) from error
        layers, _, self.heads, _, self.dim = shape
        self.clock = Clock()
        self.shared = [SharedLayer(self.clock) for _ in range(layers)]
        self.own: dict[int, DynamicCache] = {}  # slots whose prompts are read
        self.order: list[int] = []  # slots of the rows that answer
        self.lengths: list[int] = []
        self._acting: tuple[tuple[Hashable, ...], RowUpdates] | None = None

    def step(self, chunks: Sequence[Chunk]) -> Tensor:
        answering = {c.slot: c for c in chunks if c.answering}
        found: dict[int, Tensor] = {}
        if answering:
            for slot in answering:
                if slot in self.own:
                    self._join(slot)
            # Rows that answer stay together; the engine lets none of them wait.
            assert answering.keys() == set(self.order), (answering.keys(), self.order)
            logits = self._answer([answering[slot] for slot in self.order])
            found.update(zip(self.order, logits.split(1), strict=True))
        for chunk in chunks:
            if not chunk.answering:
                found[chunk.slot] = self._read(chunk)
        return torch.cat([found[chunk.slot] for chunk in chunks])

    def prepare(self, loaded: Loaded) -> None:
        """Nothing: layers find what acts on them by themselves."""

    def keep(self, slot: int, first: int, last: int) -> Tensor:
        """Return keys and values (layers, 2, heads, tokens, head_dim)."""
        layers: list[Any] = self.own[slot].layers
        return torch.stack(
            [
                torch.stack([x[0, :, first:last] for x in (layer.keys, layer.values)])
                for layer in layers
            ]
        )

    def put(self, slot: int, pieces: Sequence[Any]) -> None:
        cache = self.own[slot] = DynamicCache()
        for layer, pair in enumerate(torch.cat(list(pieces), 3)):
            cache.update(pair[0][None], pair[1][None], layer)

    def free(self, slot: int) -> None:
        self.own.pop(slot, None)
        if slot in self.order:
            at, last = self.order.index(slot), len(self.order) - 1
            for layer in self.shared:
                for x in (layer.keys, layer.values):
                    assert x is not None
                    x[at] = x[last]
            for of_rows in (self.order, self.lengths):
                of_rows[at] = of_rows[last]
                of_rows.pop()

    def _read(self, chunk: Chunk) -> Tensor:
        """Compute a part of a prompt, and return the logits that are wanted of it."""
        cache = self.own.setdefault(chunk.slot, DynamicCache())
        assert cache.get_seq_length() == chunk.start
        tokens = torch.tensor([list(chunk.tokens)], device=self.model.device)
        positions = torch.arange(chunk.start, chunk.start + tokens.shape[1])[None]
        seen = torch.ones(1, chunk.start + tokens.shape[1], dtype=torch.long)
        logits = self._forward(
            [chunk.loaded],
            input_ids=tokens,
            position_ids=positions.to(tokens.device),
            attention_mask=seen.to(tokens.device),
            cache=cache,
            keep=0 if chunk.wanted == "all" else 1,
        )
        return logits[0, logits.shape[1] if chunk.wanted == "none" else 0 :]

    def _answer(self, chunks: Sequence[Chunk]) -> Tensor:
        """Compute the next token of each row that answers, and return its logits."""
        self._make_room()
        clock = self.clock
        clock.rows, clock.low = len(chunks), clock.at - max(self.lengths)
        device = self.model.device
        lengths = torch.tensor(self.lengths)[:, None]
        places = torch.arange(clock.low, clock.at + 1)[None]
        cache = DynamicCache()
        cache.layers = list(self.shared)
        logits = self._forward(
            [chunk.loaded for chunk in chunks],
            input_ids=torch.tensor([list(chunk.tokens) for chunk in chunks], device=device),
            position_ids=lengths.to(device),
            attention_mask=(places >= clock.at - lengths).long().to(device),
            cache=cache,
            keep=1,
        )
        clock.at += 1
        self.lengths = [length + 1 for length in self.lengths]
        return logits[:, -1]

    def _forward(self, acting: Sequence[Loaded | None], *, keep: int, **inputs: Any) -> Tensor:
        """Return the last logits of each row, `keep` of them or, for 0, all: float32."""
        self.active_adapters.row_updates = self._rows(acting)
        try:
            with torch.inference_mode():
                out = self.model(**inputs, use_cache=True, logits_to_keep=keep)
        finally:
            self.active_adapters.row_updates = None
        return out.logits.float()

    def _rows(self, acting: Sequence[Loaded | None]) -> RowUpdates:
        """Return which adapter acts on which row; the same value as long as nothing changes."""
        key = tuple(acting)
        if self._acting is not None and self._acting[0] == key and len(key) > 1:
            return self._acting[1]
        different = list(dict.fromkeys(each for each in acting if each is not None))
        which = tuple(None if each is None else different.index(each) for each in acting)
        rows = RowUpdates([each.layers for each in different], which)
        if len(key) > 1:
            self._acting = (key, rows)
        return rows

    def _join(self, slot: int) -> None:
        """Let a row whose prompt has been read be one of those that answer."""
        cache = self.own.pop(slot)
        length = cache.get_seq_length()
        self.order.append(slot)
        self.lengths.append(length)
        self._make_room(length)
        at, clock = len(self.order) - 1, self.clock
        layers: list[Any] = cache.layers
        for layer, own in zip(self.shared, layers, strict=True):
            for all_, new in ((layer.keys, own.keys), (layer.values, own.values)):
                assert all_ is not None
                all_[at, :, clock.at - length : clock.at] = new[0]

    def _make_room(self, length: int = 0) -> None:
        """Move what the rows hold so that a row of `length` ends where they do, and that the next
        token has a place."""
        clock, others = self.clock, self.lengths[:-1] if length else self.lengths
        longest = max(others, default=0)
        keys = self.shared[0].keys
        places = 0 if keys is None else keys.shape[2]
        if length <= clock.at < places:
            return
        wanted = max(length, longest) + 1
        if wanted + ROOM > places:
            places = wanted + max(ROOM, wanted)
        at, kept = max(length, longest), slice(clock.at - longest, clock.at)
        for layer in self.shared:
            layer.keys, layer.values = (
                self._moved(x, slice(at - longest, at), kept, places)
                for x in (layer.keys, layer.values)
            )
        clock.at = at

    def _moved(self, x: Tensor | None, to: slice, kept: slice, places: int) -> Tensor:
        if x is None:
            shape = (self.slots, self.heads, places, self.dim)
            return torch.zeros(shape, dtype=self.model.dtype, device=self.model.device)
        if places == x.shape[2]:
            x[:, :, to] = x[:, :, kept].clone()
            return x
        return F.pad(x[:, :, kept], (0, 0, to.start, places - to.stop))
