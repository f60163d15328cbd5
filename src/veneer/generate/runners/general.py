"""Any causal language model through its own forward, once for all rows that decode.

Rows end at the same place of the cache, as in a batch that is padded on the left, so masks, windows
and positions are those that every model knows from transformers' `generate`.
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

from veneer.adapter.own_rows import BatchUpdates, acting, joined
from veneer.adapter.use import base_alone
from veneer.adapter.virtual import keys_values
from veneer.errors import ConfigError, ModelError
from veneer.generate.runners.loaded import LoadedAdapter, row_updates
from veneer.generate.runners.runner import Chunk
from veneer.generate.slots import PROBE, equal_within_rounding, probe_ids
from veneer.kernels.decode import KEYS
from veneer.kernels.transfer import sent
from veneer.models.context import own_context
from veneer.models.evaluating import evaluating

MORE_PLACES = 256  # by which the shared cache grows, at least


@dataclass
class Clock:
    """Where the decoding rows are in the shared cache: the next token of each of `rows` goes to
    place `at`, and the longest row begins at place `low`."""

    rows: int = 0
    at: int = 0
    low: int = 0


class SharedLayer(DynamicLayer):
    """Keys and values of one layer for all decoding rows: (slots, heads, places, head_dim)."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        clock = self.clock
        assert key_states.shape[2] == 1
        assert self.keys is not None
        assert self.values is not None
        for cached, new in ((self.keys, key_states), (self.values, value_states)):
            cached[: clock.rows, :, clock.at] = new[:, :, 0]
        places = slice(clock.low, clock.at + 1)
        return self.keys[: clock.rows, :, places], self.values[: clock.rows, :, places]

    def get_seq_length(self) -> int:
        return self.clock.at - self.clock.low

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0


class GeneralRunner:
    """A runner over the model's own forward.

    A prompt is read into a cache of its own; with its first new token the row moves to the cache
    that all decoding rows share. Raises ModelError for a model that does not keep keys and values,
    as nothing else can be copied into blocks and back, and for one whose logits are others where a
    prompt is read in chunks: encoders see a whole text.
    """

    is_exact = False
    cut = KEYS
    hidden = None

    def __init__(self, model: PreTrainedModel, slots: int) -> None:
        self.model, self.slots = model, slots
        try:
            shape = keys_values(model, torch.zeros(1, dtype=torch.long)).shape
        except ConfigError as error:
            raise ModelError(
                "Only models that keep keys and values, of one shape in all layers, can be served."
            ) from error
        layers, _, self.heads, _, self.dim = shape
        self.clock = Clock()
        self.shared = [SharedLayer(self.clock) for _ in range(layers)]
        self.prefilling: dict[int, DynamicCache] = {}  # by slot
        self.decoding: list[int] = []  # slots, in the order of the shared cache's rows
        self.lengths: list[int] = []  # of these rows
        self._last_updates: tuple[tuple[Hashable, ...], BatchUpdates] | None = None
        self._prove()

    def step(self, chunks: Sequence[Chunk]) -> Tensor:
        decoding = {chunk.slot: chunk for chunk in chunks if chunk.decoding}
        logits: dict[int, Tensor] = {}
        if decoding:
            for slot in decoding:
                if slot in self.prefilling:
                    self._join(slot)
            # The shared cache moves on by one place, so no decoding row may sit out a step.
            assert decoding.keys() == set(self.decoding), (decoding.keys(), self.decoding)
            all_logits = self._decode([decoding[slot] for slot in self.decoding])
            logits.update(zip(self.decoding, all_logits.split(1), strict=True))
        for chunk in chunks:
            if not chunk.decoding:
                logits[chunk.slot] = self._prefill(chunk)
        return joined([logits[chunk.slot] for chunk in chunks])

    def block(self, slot: int, first: int, last: int) -> Tensor:
        """Return keys and values (layers, 2, heads, tokens, head_dim)."""
        layers: list[Any] = self.prefilling[slot].layers
        pairs = [[x[0, :, first:last] for x in (layer.keys, layer.values)] for layer in layers]
        return torch.stack([torch.stack(pair) for pair in pairs])

    def fill(self, slot: int, blocks: Sequence[Any]) -> None:
        cache = self.prefilling[slot] = DynamicCache()
        for layer, (keys, values) in enumerate(torch.cat(list(blocks), 3)):
            cache.update(keys[None], values[None], layer)

    def begin(self, slot: int, prefix: Tensor) -> None:
        self.fill(slot, [prefix])

    def copy(self, slot: int, other: int, length: int) -> None:
        self.fill(other, [self.block(slot, 0, length)])

    def free(self, slot: int) -> None:
        self.prefilling.pop(slot, None)
        if slot in self.decoding:  # the last row of the shared cache takes its place
            at, last = self.decoding.index(slot), len(self.decoding) - 1
            for layer in self.shared:
                for x in (layer.keys, layer.values):
                    assert x is not None
                    x[at] = x[last]
            for of_rows in (self.decoding, self.lengths):
                of_rows[at] = of_rows[last]
                of_rows.pop()

    def _prove(self) -> None:
        """Raise ModelError where two chunks and a step do not give the model's own logits."""
        count = min(PROBE, own_context(self.model.config.get_text_config()) or PROBE)
        ids, half = probe_ids(self.model, count), count // 2
        chunks = [
            Chunk(0, ids[:half], 0, None, half),
            Chunk(0, ids[half:-1], half, None, count - 1 - half),
            Chunk(0, ids[-1:], count - 1, None, 1, decoding=True),
        ]
        with torch.no_grad(), base_alone(self.model), evaluating(self.model):
            inputs = sent([ids], self.model.device)
            own = self.model(input_ids=inputs, use_cache=False).logits[0]
            try:
                logits = torch.cat([self.step([chunk]) for chunk in chunks])
            except Exception as error:  # of foreign code
                raise ModelError(
                    "Only models that read a prompt in chunks can be served, and this one's code "
                    f"raises {type(error).__name__}: {error}"
                ) from error
        self.free(0)
        if not equal_within_rounding(logits, own, self.model.dtype):
            raise ModelError(
                "Only models that give the same logits where a prompt is read in chunks can be "
                "served, and this one does not. It may be an encoder, whose tokens see those "
                "behind them."
            )

    def _prefill(self, chunk: Chunk) -> Tensor:
        """Compute tokens of a prompt, and return the logits that the chunk asks for."""
        cache = self.prefilling.setdefault(chunk.slot, DynamicCache())
        assert cache.get_seq_length() == chunk.start
        device = self.model.device
        tokens = sent([list(chunk.tokens)], device)
        end = chunk.start + tokens.shape[1]
        logits = self._forward(
            [chunk.adapter],
            input_ids=tokens,
            position_ids=torch.arange(chunk.start, end, device=device)[None],
            attention_mask=torch.ones(1, end, dtype=torch.long, device=device),
            cache=cache,
            keep=max(1, chunk.logits),  # 0 would mean all
        )
        return logits[0, logits.shape[1] - chunk.logits :]

    def _decode(self, chunks: Sequence[Chunk]) -> Tensor:
        """Compute the newest token of each decoding row, and return the logits (rows, vocab)."""
        self._make_places()
        clock = self.clock
        clock.rows, clock.low = len(chunks), clock.at - max(self.lengths)
        device = self.model.device
        lengths = sent(self.lengths, device)[:, None]
        places = torch.arange(clock.low, clock.at + 1, device=device)[None]
        cache = DynamicCache()
        cache.layers = list(self.shared)
        logits = self._forward(
            [chunk.adapter for chunk in chunks],
            input_ids=sent([list(chunk.tokens) for chunk in chunks], device),
            position_ids=lengths,
            attention_mask=(places >= clock.at - lengths).long(),
            cache=cache,
            keep=1,
        )
        clock.at += 1
        self.lengths = [length + 1 for length in self.lengths]
        return logits[:, -1]

    def _forward(
        self, adapters: Sequence[LoadedAdapter | None], *, keep: int, **inputs: Any
    ) -> Tensor:
        """Return the last `keep` logits of each row, float32."""
        updates = self._row_updates(adapters)
        with acting(self.model, updates), torch.inference_mode():
            out = self.model(**inputs, use_cache=True, logits_to_keep=keep)
            return updates.limited(out.logits.float())

    def _row_updates(self, adapters: Sequence[LoadedAdapter | None]) -> BatchUpdates:
        """Return which adapter acts on which row: the same value while decoding rows stay the same,
        as layers keep in it what they have stacked."""
        key = tuple(adapters)
        if len(key) == 1:
            return row_updates(key)
        if self._last_updates is None or self._last_updates[0] != key:
            self._last_updates = (key, row_updates(key))
        return self._last_updates[1]

    def _join(self, slot: int) -> None:
        """Move a row whose prompt is computed into the shared cache."""
        cache = self.prefilling.pop(slot)
        length = cache.get_seq_length()
        self.decoding.append(slot)
        self.lengths.append(length)
        self._make_places(length)
        row, at = len(self.decoding) - 1, self.clock.at
        layers: list[Any] = cache.layers
        for layer, own in zip(self.shared, layers, strict=True):
            for x, new in ((layer.keys, own.keys), (layer.values, own.values)):
                assert x is not None
                x[row, :, at - length : at] = new[0]

    def _make_places(self, length: int = 0) -> None:
        """Move what the shared cache holds so that a new row of `length` can end where the others
        do, and the next token has a place."""
        clock, others = self.clock, self.lengths[:-1] if length else self.lengths
        longest = max(others, default=0)
        keys = self.shared[0].keys
        places = 0 if keys is None else keys.shape[2]
        if length <= clock.at < places:
            return
        at = max(length, longest)
        if at + 1 + MORE_PLACES > places:
            places = at + 1 + max(MORE_PLACES, at + 1)
        old, new = slice(clock.at - longest, clock.at), slice(at - longest, at)
        for layer in self.shared:
            layer.keys = self._moved(layer.keys, old, new, places)
            layer.values = self._moved(layer.values, old, new, places)
        clock.at = at

    def _moved(self, x: Tensor | None, old: slice, new: slice, places: int) -> Tensor:
        if x is None:
            shape = (self.slots, self.heads, places, self.dim)
            return torch.zeros(shape, dtype=self.model.dtype, device=self.model.device)
        if places == x.shape[2]:
            x[:, :, new] = x[:, :, old].clone()
            return x
        return F.pad(x[:, :, old], (0, 0, new.start, places - new.stop))
