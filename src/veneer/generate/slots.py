"""A causal language model whose rows decode in fixed places, for devices that are not to wait.

Each slot of the cache holds a row's keys and values from place 0 on. Where a step's tokens go, and
what they see, is said by small tensors, so that a step of so many rows and places has the same
shapes and the same memory each time, and nothing in it is asked of the device. It is the model's
own forward with a cache and masks of ours; before a model is run like this, its logits are compared
with those of its own forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from veneer.adapter.own_rows import BatchUpdates, acting
from veneer.adapter.virtual import keys_values
from veneer.errors import ConfigError
from veneer.kernels.transfer import sent
from veneer.lowrank.update import RowUpdates
from veneer.models.evaluating import evaluating

FIRST_PLACES = 256  # of a slot at first; they double as they fill
KINDS = ("full_attention", "sliding_attention")  # of attention, by transformers' names
MASKED_BY = ("sdpa", "eager")  # implementations of attention that take a mask of ours
PROBE, DECODED = 24, 8  # tokens that are compared: read as a prompt, and then one by one
# How far logits may be from the model's own on average, relative to their length: rounding through
# all layers, as for the compiled step.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


class NotInSlots(Exception):
    """The model cannot be decoded in slots; the message says why."""


@dataclass(eq=False)
class Pass:
    """Where the tokens of a pass are. A prompt's are in places `start` to `end` of `slot`; of rows
    that decode, the first ones of the cache, each has one, in the place that `at` says."""

    end: int = 0  # places that are seen
    start: int = 0
    slot: int = 0
    at: Tensor | None = None  # (rows,)

    def write(self, cached: Tensor, new: Tensor) -> None:
        """Write keys or values (rows, heads, tokens, dim) to (slots, heads, places, dim)."""
        new = new.to(cached.dtype)
        if self.at is None:
            cached[self.slot, :, self.start : self.end] = new[0]
        else:
            index = self.at[:, None, None, None].expand_as(new)
            cached[: len(self.at)].scatter_(2, index, new)

    def read(self, cached: Tensor) -> Tensor:
        """Return what the rows of the pass may see, (rows, heads, places, dim)."""
        first = self.slot if self.at is None else 0
        rows = 1 if self.at is None else len(self.at)
        return cached[first : first + rows, :, : self.end]


class SlotLayer(DynamicLayer):
    """Keys and values of one layer for all slots, (slots, heads, places, head_dim)."""

    def __init__(self, where: Pass, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.where, self.is_initialized = where, True
        self.keys, self.values = keys, values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        self.where.write(self.keys, key_states)
        self.where.write(self.values, value_states)
        return self.where.read(self.keys), self.where.read(self.values)

    def get_seq_length(self) -> int:
        return self.where.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.where.end, 0


class SlotModel:
    """A model with a cache for so many slots. Raises NotInSlots where it is no such model.

    The last place of each slot is for what nobody reads: rows that sit out a step write there.
    """

    def __init__(self, model: PreTrainedModel, slots: int, context: int) -> None:
        self.model, self.slots, self.context = model, slots, context
        self._kinds, self._window, self._is_additive = _masks_of(model)
        try:
            probe = keys_values(model, torch.zeros(1, dtype=torch.long))
        except ConfigError as error:
            raise NotInSlots("its layers do not all keep keys and values of one shape") from error
        layers, _, self.heads, _, self.dim = probe.shape
        self.where, self.places = Pass(), 0
        with torch.no_grad():
            empty = [probe.new_empty(slots, self.heads, 0, self.dim) for _ in range(2)]
            self.layers = [SlotLayer(self.where, *empty) for _ in range(layers)]
            self.reserve(0)
            self._prove()

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def unread(self) -> int:
        """The place that nobody reads."""
        return self.places - 1

    def reserve(self, tokens: int) -> None:
        """Have places for rows of so many tokens. The cache moves where that takes more places."""
        if tokens < self.places:
            return
        places = max(self.places, FIRST_PLACES)
        while places <= tokens:
            places *= 2
        places = min(places, -(-(self.context + 1) // 16) * 16)
        for layer in self.layers:
            layer.keys = self._longer(layer.keys, places)
            layer.values = self._longer(layer.values, places)
        self.places = places

    @torch.no_grad()
    def prefill(
        self,
        slot: int,
        tokens: Sequence[int],
        start: int,
        *,
        keep: int,
        updates: RowUpdates | None = None,
    ) -> Tensor:
        """Compute tokens of a prompt behind the `start` that a slot holds; return the logits of the
        last `keep`, (keep, vocab), float32. updates: what acts on the row, unless all are alike."""
        end = start + len(tokens)
        self.reserve(end)
        self.where.start, self.where.end, self.where.slot, self.where.at = start, end, slot, None
        positions = torch.arange(start, end, device=self.device)[None]
        logits = self._forward(sent([list(tokens)], self.device), positions, updates, max(1, keep))
        return logits[0, logits.shape[1] - keep :]

    @torch.no_grad()
    def decode(
        self, tokens: Tensor, where: Tensor, seen: int, updates: RowUpdates | None = None
    ) -> Tensor:
        """Compute one token of each of the first slots; return their logits (rows, vocab), float32.

        tokens (rows,). where (3, rows): each token's position; the place where its keys and values
        go, which is `unread` for a row that sits out; and which of `updates` is the row's, -1 for
        none. seen: places from the first on that any row may see.
        """
        positions, at, mixes = where.unbind()
        self.where.start, self.where.end, self.where.slot, self.where.at = seen - 1, seen, 0, at
        updates = None if updates is None else updates.with_numbers(mixes)
        return self._forward(tokens[:, None], positions[:, None], updates, 1)[:, -1]

    @torch.no_grad()
    def block(self, slot: int, first: int, last: int) -> Tensor:
        """Return a copy of keys and values, (layers, 2, heads, tokens, head_dim)."""
        pairs = [[x[slot, :, first:last] for x in self._cached(layer)] for layer in self.layers]
        return torch.stack([torch.stack(pair) for pair in pairs])

    @torch.no_grad()
    def fill(self, slot: int, blocks: Sequence[Tensor]) -> None:
        """Write such copies into an empty slot, end to end."""
        self.reserve(sum(block.shape[3] for block in blocks))
        first = 0
        for block in blocks:
            last = first + block.shape[3]
            for layer, pair in zip(self.layers, block, strict=True):
                for cached, new in zip(self._cached(layer), pair, strict=True):
                    cached[slot, :, first:last] = new
            first = last

    def _forward(
        self, ids: Tensor, positions: Tensor, updates: RowUpdates | None, keep: int
    ) -> Tensor:
        cache = DynamicCache()
        cache.layers = list(self.layers)
        with acting(self.model, updates):
            out = self.model(
                input_ids=ids,
                position_ids=positions,
                attention_mask=self._masks(positions),
                cache=cache,
                use_cache=True,
                logits_to_keep=keep,
            )
        logits = out.logits.float()
        return updates.limited(logits) if isinstance(updates, BatchUpdates) else logits

    def _masks(self, positions: Tensor) -> Any:
        """Return what each token (rows, tokens) sees of the places, as the model takes it."""
        places = torch.arange(self.where.end, device=positions.device)
        last = positions[:, None, :, None]  # (rows, 1, tokens, 1)
        masks = {}
        for kind in self._kinds:
            visible = places <= last
            if kind == "sliding_attention":
                assert self._window is not None
                visible &= places > last - self._window
            if self._is_additive:
                bias = torch.zeros_like(visible, dtype=self.model.dtype)
                masks[kind] = bias.masked_fill_(~visible, torch.finfo(bias.dtype).min)
            else:
                masks[kind] = visible
        return masks if isinstance(self._kinds, frozenset) else masks[self._kinds[0]]

    def _cached(self, layer: SlotLayer) -> tuple[Tensor, Tensor]:
        assert layer.keys is not None
        assert layer.values is not None
        return layer.keys, layer.values

    def _longer(self, x: Tensor | None, places: int) -> Tensor:
        assert x is not None
        longer = x.new_zeros(self.slots, self.heads, places, self.dim)
        # But for the place that nobody reads, which is no token's.
        longer[:, :, : x.shape[2]] = x
        return longer

    def _prove(self) -> None:
        """Raise NotInSlots where logits are not those of the model's own forward."""
        count = min(PROBE + DECODED, self.context)
        read = count - min(DECODED, count // 2)
        ids = probe_ids(self.model, count)
        tokens = sent(ids, self.device)
        with evaluating(self.model):
            try:
                own = self.model(input_ids=tokens[None], use_cache=False).logits[0]
                slot = self.slots - 1
                logits = [self.prefill(slot, ids[: read // 2], 0, keep=read // 2)]
                logits.append(
                    self.prefill(slot, ids[read // 2 : read], read // 2, keep=read - read // 2)
                )
                places = [[0] * slot, [self.unread] * slot, [-1] * slot]
                for i in range(read, count):
                    where = [[*row, last] for row, last in zip(places, (i, i, -1), strict=True)]
                    rows = tokens[i].expand(self.slots)
                    # As steps do: they see more places than their rows have tokens.
                    seen = count if i % 2 else self.places
                    logits.append(self.decode(rows, sent(where, self.device), seen)[slot:])
            except Exception as error:  # whatever a foreign architecture raises
                why = f"{type(error).__name__}: {error}"
                raise NotInSlots(f"its own code takes no masks of ours ({why})") from error
        if not equal_within_rounding(torch.cat(logits), own, self.model.dtype):
            raise NotInSlots("its rows in slots give something else")


def probe_ids(model: PreTrainedModel, count: int) -> list[int]:
    """Return `count` tokens, by whose logits a way of computing the model is judged."""
    vocab = model.config.get_text_config().vocab_size
    return [(7 * i + 3) % vocab for i in range(count)]


def equal_within_rounding(logits: Tensor, own: Tensor, dtype: torch.dtype) -> bool:
    """Return whether logits (tokens, vocab) are the model's own, but for rounding in `dtype`.

    Each half of the tokens is judged: an encoder's last ones see almost what they see of the whole.
    """
    logits, own = logits.cpu().double(), own.cpu().double()  # MPS has no float64
    difference = (logits - own).norm(dim=-1) / own.norm(dim=-1)
    return all(float(half.mean()) <= TOLERANCE[dtype] for half in difference.chunk(2))


def _masks_of(model: PreTrainedModel) -> tuple[frozenset[str] | tuple[str], int | None, bool]:
    """Return the kinds of masks that a model takes (several, by their names, or a single one), its
    window, and whether masks are added to scores. Raises NotInSlots."""
    config: Any = model.config.get_text_config()
    if config._attn_implementation not in MASKED_BY:
        raise NotInSlots(f"its attention ({config._attn_implementation}) takes no mask of ours")
    if "local" in (getattr(config, "attention_layers", None) or ()):  # GPT-Neo's
        raise NotInSlots("its own code counts its windows from the end of the cache")
    window = getattr(config, "sliding_window", None)
    if getattr(config, "layer_types", None) is not None:
        kinds: frozenset[str] | tuple[str] = frozenset(config.layer_types)
    else:
        kinds = ("sliding_attention",) if window is not None else ("full_attention",)
    if unknown := sorted({*kinds} - {*KINDS}):
        raise NotInSlots(f"it has layers of another kind ({', '.join(unknown)})")
    return kinds, window, config._attn_implementation == "eager"
