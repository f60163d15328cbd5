"""A model on a CPU through one compiled function for a step of all rows.

The result for a token never depends on what else is computed with it (kernels/decode.cpp), so an
answer alone and among others is the same to the bit. Before a model is run like this, its logits
are compared with those of its own forward.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from veneer.fused.head import own_logits_and_head
from veneer.generate.runners.layer_table import LayerTable, Unsuited, proven_layers
from veneer.generate.runners.runner import Chunk
from veneer.generate.runners.surroundings import Surroundings, tokens_of
from veneer.kernels import decode

FIRST_TOKENS = 256  # that a slot has space for at first; the space doubles as it fills
PROBE = 40  # tokens that are compared, more than one block of the compiled step
# How far logits may be from the model's own on average, relative to their length: rounding through
# all layers. In bfloat16 those of SmolLM2-135M are 0.03 apart, and as far from float32's.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


def tokens_held(tokens: int) -> int:
    """Return for how many tokens a row has memory that has as many as this."""
    longer = FIRST_TOKENS
    while longer < tokens:
        longer *= 2
    return longer


@dataclass(frozen=True, eq=False)
class KVBlock:
    """Keys (layers, heads, tokens / 16, head_dim, 16) and values (layers, heads, tokens, head_dim)
    of some tokens."""

    keys: Tensor
    values: Tensor

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


class CompiledRunner:
    """A runner over decode.cpp. Raises Unsuited for a model that it does not compute."""

    is_exact = True
    cut = 4  # tokens that share one reading of a weight

    def __init__(self, model: PreTrainedModel, slots: int, context: int) -> None:
        self.model, self.context = model.requires_grad_(False), context
        self.dtype = model.dtype
        if model.device.type != "cpu":
            raise Unsuited("it is not on a CPU")
        try:
            self.compiled = decode.Decode(self.dtype)
        except OSError as error:
            raise Unsuited(str(error)) from error
        tokens = tokens_of(model, min(PROBE, context))
        layers = proven_layers(model, tokens)
        with torch.inference_mode():
            own_logits, head, why_not = own_logits_and_head(model, tokens)
        if head is None:
            raise Unsuited(str(why_not))
        self.surroundings = Surroundings(model, layers, head, context)
        positions = torch.arange(context)[None]
        self.table = LayerTable(layers, self.surroundings.angles, positions, self.dtype)
        self.slots: list[KVBlock | None] = [None] * slots
        self._workspace: tuple[tuple[int, ...], decode.Workspace, list[Tensor]] | None = None
        self.hidden: dict[int, Tensor] = {}
        self._prove(tokens, own_logits)

    # ---- what the engine asks for ----

    def step(self, chunks: Sequence[Chunk]) -> Tensor:
        ids = torch.tensor([token for chunk in chunks for token in chunk.tokens])
        places = [chunk.start + i for chunk in chunks for i in range(len(chunk.tokens))]
        positions = torch.tensor(places)
        adapters = [chunk.adapter for chunk in chunks for _ in chunk.tokens]
        with torch.inference_mode():
            x = self.surroundings.embed(ids, positions, adapters)  # (tokens, dim)
            self._through_layers(chunks, positions, x)
            ends = list(accumulate(len(chunk.tokens) for chunk in chunks))
            self.hidden = {
                chunk.slot: self.surroundings.normed(x[end - len(chunk.tokens) : end]).float()
                for chunk, end in zip(chunks, ends, strict=True)
                if chunk.hidden
            }
            rows = [
                row
                for chunk, end in zip(chunks, ends, strict=True)
                for row in range(end - chunk.logits, end)
            ]
            of_rows = [adapters[row] for row in rows]
            return self.surroundings.logits(x[rows], of_rows, self.compiled)

    def block(self, slot: int, first: int, last: int) -> KVBlock:
        cache = self.slots[slot]
        assert cache is not None
        assert first % decode.KEYS == last % decode.KEYS == 0
        keys = cache.keys[:, :, first // decode.KEYS : last // decode.KEYS]
        return KVBlock(keys.clone(), cache.values[:, :, first:last].clone())

    def fill(self, slot: int, blocks: Sequence[Any]) -> None:
        cache = self._cache_for(slot, sum(block.values.shape[2] for block in blocks))
        first = 0
        for block in blocks:
            last = first + block.values.shape[2]
            cache.keys[:, :, first // decode.KEYS : last // decode.KEYS] = block.keys
            cache.values[:, :, first:last] = block.values
            first = last

    def begin(self, slot: int, prefix: Tensor) -> None:
        count, size = prefix.shape[3], decode.KEYS
        cache = self._cache_for(slot, count)
        keys, values = F.pad(prefix, (0, 0, 0, -count % size)).unbind(1)
        blocks = keys.unflatten(2, (-1, size)).mT  # (layers, heads, tokens / 16, head_dim, 16)
        cache.keys[:, :, : blocks.shape[2]] = blocks
        cache.values[:, :, :count] = values[:, :, :count]

    def copy(self, slot: int, other: int, length: int) -> None:
        cache = self.slots[slot]
        assert cache is not None
        self.slots[other] = KVBlock(cache.keys.clone(), cache.values.clone())

    def free(self, slot: int) -> None:
        self.slots[slot] = None

    # ---- a step ----

    def _through_layers(self, chunks: Sequence[Chunk], positions: Tensor, x: Tensor) -> None:
        """Take embeddings (tokens, dim) of the chunks through all layers, in place."""
        count = len(x)
        caches = (decode.KVCache * count)()
        tables = (ctypes.c_void_p * count)()
        ranks = at = capacity = 0
        for chunk in chunks:
            cache = self._cache_for(chunk.slot, chunk.start + len(chunk.tokens))
            length = cache.values.shape[2]
            of_slot = decode.KVCache(cache.keys.data_ptr(), cache.values.data_ptr(), length)
            capacity = max(capacity, length)
            table = None
            if chunk.adapter is not None:
                table, most = self.table.updates_of(chunk.adapter)
                ranks = max(ranks, most)
            for i in range(at, at + len(chunk.tokens)):
                caches[i] = of_slot
                tables[i] = table
            at += len(chunk.tokens)
        batch = decode.Batch(
            count, ctypes.addressof(caches), positions.data_ptr(), ctypes.addressof(tables), ranks
        )
        workspace = self._workspace_for(count, ranks, capacity)
        self.compiled.step(self.table.rows, self.table.shape, batch, workspace, x)

    # ---- memory ----

    def _cache_for(self, slot: int, tokens: int) -> KVBlock:
        """Return a slot's keys and values, with space for at least this many tokens."""
        old = self.slots[slot]
        length = 0 if old is None else old.values.shape[2]
        if old is not None and tokens <= length:
            return old
        longer = tokens_held(tokens)
        shape, keys = self.table.shape, decode.KEYS
        outer = (shape.layers, shape.key_heads)
        new = KVBlock(
            torch.zeros(*outer, longer // keys, shape.head_dim, keys, dtype=self.dtype),
            torch.zeros(*outer, longer, shape.value_dim, dtype=self.dtype),
        )
        if old is not None:
            new.keys[:, :, : length // keys] = old.keys
            new.values[:, :, :length] = old.values
        self.slots[slot] = new
        return new

    def _workspace_for(self, tokens: int, ranks: int, capacity: int) -> decode.Workspace:
        """Return memory for a step's intermediate results; it grows and is used again."""
        sizes = (tokens, ranks, capacity, torch.get_num_threads())
        if self._workspace is not None:
            sizes = tuple(map(max, self._workspace[0], sizes))  # type: ignore[assignment]
            if sizes == self._workspace[0]:
                return self._workspace[1]
        tokens, ranks, capacity, threads = sizes
        shape = self.table.shape
        group = shape.heads // shape.key_heads
        qkv = shape.heads * shape.head_dim + shape.key_heads * (shape.head_dim + shape.value_dim)
        attended = shape.heads * shape.value_dim
        columns = (shape.dim, qkv, attended, shape.inner_columns, shape.inner)
        buffers = [torch.empty(tokens, n, dtype=self.dtype) for n in columns]
        buffers.append(torch.empty(tokens, ranks, dtype=torch.float32))
        buffers.append(torch.empty(threads, group, capacity, dtype=torch.float32))
        buffers.append(torch.empty(threads, decode.OUTPUTS, shape.widest, dtype=self.dtype))
        # Attention scores of a thread are `capacity` apart, however many of them a step fills.
        workspace = decode.Workspace(*(buffer.data_ptr() for buffer in buffers), capacity)
        self._workspace = (sizes, workspace, buffers)
        return workspace

    def _prove(self, tokens: Tensor, own_logits: Tensor) -> None:
        """Raise Unsuited where logits are not those of the model's own forward."""
        own = own_logits.double()
        half = tokens.shape[1] // 2
        logits = []
        for first, last in ((0, half), (half, tokens.shape[1])):
            ids = tokens[0, first:last].tolist()
            logits.append(self.step([Chunk(0, ids, first, None, len(ids))]))
        self.free(0)
        difference = (torch.cat(logits).double() - own).norm(dim=-1) / own.norm(dim=-1)
        if not float(difference.mean()) <= TOLERANCE[self.dtype]:
            raise Unsuited("the compiled step gives something else")
