"""Models such as LLaMA on a CPU, through one compiled function for a step of all rows.

The result for a token never depends on what else is computed with it (kernels/decode.cpp), so an
answer alone and among others is the same to the bit. Before a model is run like this, its logits
are compared with those of its own forward.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.adapter.active import active_adapters_of
from veneer.adapter.layers import AdaptedLayer
from veneer.fused.head import own_logits_and_head
from veneer.fused.layers import FusedLayer
from veneer.fused.norms import norm_of
from veneer.fused.recognise import recognise
from veneer.fused.structure import Variant
from veneer.kernels import decode
from veneer.kernels.cross_entropy import PLAIN
from veneer.kernels.norm import Norm
from veneer.models.blocks import decoder_layers, decoder_of
from veneer.quant.int8 import Int8
from veneer.quant.nf4 import NF4
from veneer.quant.weight import QuantizedLinear
from veneer.serve.engine.adapter_cache import LoadedAdapter, row_updates
from veneer.serve.engine.runner import Chunk

FIRST_TOKENS = 256  # that a slot has space for at first; the space doubles as it fills
PROBE = 40  # tokens that are compared, more than one block of the compiled step
# How far logits may be from the model's own on average, relative to their length: rounding through
# all layers. In bfloat16 those of SmolLM2-135M are 0.03 apart, and as far from float32's.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
CHANGING = ("dynamic", "longrope")  # rotary embeddings that depend on the length of the text


class Unsuited(Exception):
    """Why a model cannot be computed like this."""


@dataclass(frozen=True)
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

    def __init__(self, model: PreTrainedModel, slots: int, context: int) -> None:
        self.model, self.context = model.requires_grad_(False), context
        self.dtype = model.dtype
        if model.device.type != "cpu":
            raise Unsuited("it is not on a CPU")
        try:
            self.compiled = decode.Decode(self.dtype)
        except OSError as error:
            raise Unsuited(str(error)) from error
        tokens = torch.randint(
            model.config.get_text_config().vocab_size,
            (1, min(PROBE, context)),
            generator=torch.Generator().manual_seed(0),
        )
        self.layers = _proven_layers(model, tokens)
        with torch.inference_mode():
            own_logits, head, why_not = own_logits_and_head(model, tokens)
        if head is None:
            raise Unsuited(str(why_not))
        self.head = head
        self.active_adapters = active_adapters_of(model)
        self.decoder: Any = decoder_of(model)
        self.angles = _angles(self.decoder, context, self.dtype)
        self._kept: list[Tensor] = []  # what the table below points to, beside the model's own
        self._table = (decode.Layer * len(self.layers))()
        for row, layer in zip(self._table, self.layers, strict=True):
            self._describe(row, layer)
        norm = norm_of(self.decoder.norm, model.config.get_text_config().hidden_size)
        if norm is None:
            raise Unsuited("its last norm is none that is known")
        self.norm: Norm = norm
        self.shape = self._shape()
        self.slots: list[KVBlock | None] = [None] * slots
        self._adapter_tables: WeakKeyDictionary[LoadedAdapter, tuple[Any, int]]
        self._adapter_tables = WeakKeyDictionary()
        self._workspace: tuple[tuple[int, ...], decode.Workspace, list[Tensor]] | None = None
        self._prove(tokens, own_logits)

    # ---- what the engine asks for ----

    def step(self, chunks: Sequence[Chunk]) -> Tensor:
        ids = torch.tensor([token for chunk in chunks for token in chunk.tokens])
        adapters = [chunk.adapter for chunk in chunks for _ in chunk.tokens]
        with torch.inference_mode():
            x = self._by_module(self.model.get_input_embeddings(), ids, adapters)
            x = x.to(self.dtype).contiguous()  # (tokens, dim)
            self._through_layers(chunks, x)
            ends = accumulate(len(chunk.tokens) for chunk in chunks)
            rows = [
                row
                for chunk, end in zip(chunks, ends, strict=True)
                for row in range(end - chunk.logits, end)
            ]
            return self._logits(x[rows], [adapters[row] for row in rows])

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

    def free(self, slot: int) -> None:
        self.slots[slot] = None

    # ---- a step ----

    def _through_layers(self, chunks: Sequence[Chunk], x: Tensor) -> None:
        """Take embeddings (tokens, dim) of the chunks through all layers, in place."""
        count = len(x)
        caches = (decode.KVCache * count)()
        tables = (ctypes.c_void_p * count)()
        positions = torch.tensor(
            [chunk.start + i for chunk in chunks for i in range(len(chunk.tokens))]
        )
        ranks = at = capacity = 0
        for chunk in chunks:
            cache = self._cache_for(chunk.slot, chunk.start + len(chunk.tokens))
            length = cache.values.shape[2]
            of_slot = decode.KVCache(cache.keys.data_ptr(), cache.values.data_ptr(), length)
            capacity = max(capacity, length)
            table = None
            if chunk.adapter is not None:
                table, most = self._table_of(chunk.adapter)
                ranks = max(ranks, most)
            for i in range(at, at + len(chunk.tokens)):
                caches[i] = of_slot
                tables[i] = table
            at += len(chunk.tokens)
        batch = decode.Batch(
            count, ctypes.addressof(caches), positions.data_ptr(), ctypes.addressof(tables), ranks
        )
        workspace = self._workspace_for(count, ranks, capacity)
        self.compiled.step(self._table, self.shape, batch, workspace, x, self.angles)

    def _logits(self, x: Tensor, adapters: Sequence[LoadedAdapter | None]) -> Tensor:
        normed, _ = self.norm.forward(x)
        head: Any = self.model.get_output_embeddings()
        plain = type(head) is nn.Linear and head.bias is None and head.weight.dtype == self.dtype
        if plain and len(normed):
            z = self.compiled.product(normed.contiguous(), head.weight)
        else:
            z = self._by_module(head, normed, adapters).float()
        if self.head.logits != PLAIN:
            for row in z:  # one by one: a row's logits may not depend on how many are beside it
                row.copy_(self.head.logits(row))
        return z

    def _by_module(
        self, module: Any, x: Tensor, adapters: Sequence[LoadedAdapter | None]
    ) -> Tensor:
        """Return the output of a module outside of the layers, each token as a row of its own."""
        if not isinstance(module, AdaptedLayer):
            y: Tensor = module(x)
            return y
        self.active_adapters.row_updates = row_updates(adapters)
        try:
            y = module(x[:, None])[:, 0]
        finally:
            self.active_adapters.row_updates = None
        return y

    def _table_of(self, adapter: LoadedAdapter) -> tuple[int, int]:
        """Return the address of an adapter's table, which has its update of each linear layer, and
        the largest sum of ranks over linear layers that share an input."""
        if (table_and_most := self._adapter_tables.get(adapter)) is None:
            table, most = (decode.Update * (len(self.layers) * decode.LINEARS))(), 0
            for number, layer in enumerate(self.layers):
                ranks = []
                for at, module in enumerate(layer.linears()):
                    update = None
                    if isinstance(module, AdaptedLayer):
                        update = adapter.layers.get(module)
                    ranks.append(0 if update is None else update.rank)
                    if update is not None:
                        A, B, gain = update.A, update.B.T, update.gain
                        assert A.is_contiguous()
                        assert B.is_contiguous()
                        gains = None if gain is None else gain.data_ptr()
                        table[number * decode.LINEARS + at] = decode.Update(
                            A.data_ptr(), B.data_ptr(), gains, update.rank
                        )
                most = max(most, *(sum(ranks[i] for i in group) for group in decode.GROUPS))
            table_and_most = self._adapter_tables[adapter] = (table, most)
        return ctypes.addressof(table_and_most[0]), table_and_most[1]

    # ---- memory ----

    def _cache_for(self, slot: int, tokens: int) -> KVBlock:
        """Return a slot's keys and values, with space for at least this many tokens."""
        old = self.slots[slot]
        length = 0 if old is None else old.values.shape[2]
        if old is not None and tokens <= length:
            return old
        longer = max(2 * length, FIRST_TOKENS)
        while longer < tokens:
            longer *= 2
        shape, keys = self.shape, decode.KEYS
        outer = (shape.layers, shape.shared_heads)
        new = KVBlock(
            torch.zeros(*outer, longer // keys, shape.head_dim, keys, dtype=self.dtype),
            torch.zeros(*outer, longer, shape.head_dim, dtype=self.dtype),
        )
        if old is not None:
            new.keys[:, :, : length // keys] = old.keys
            new.values[:, :, :length] = old.values
        self.slots[slot] = new
        return new

    def _workspace_for(self, tokens: int, ranks: int, capacity: int) -> decode.Workspace:
        """Return memory for a step's intermediate results; it grows and is used again."""
        sizes = (tokens, ranks, capacity)
        if self._workspace is not None:
            sizes = tuple(map(max, self._workspace[0], sizes))  # type: ignore[assignment]
            if sizes == self._workspace[0]:
                return self._workspace[1]
        tokens, ranks, capacity = sizes
        shape, threads = self.shape, torch.get_num_threads()
        queries = shape.heads * shape.head_dim
        keys = shape.shared_heads * shape.head_dim
        columns = (shape.dim, queries, keys, keys, queries, shape.inner, shape.inner)
        buffers = [torch.empty(tokens, n, dtype=self.dtype) for n in columns]
        group = shape.heads // shape.shared_heads
        buffers.append(torch.empty(tokens, ranks, dtype=torch.float32))
        buffers.append(torch.empty(threads, group, capacity, dtype=torch.float32))
        buffers.append(torch.empty(threads, decode.OUTPUTS, shape.widest, dtype=self.dtype))
        # Attention scores of a thread are `capacity` apart, however many of them a step fills.
        workspace = decode.Workspace(*(buffer.data_ptr() for buffer in buffers), capacity)
        self._workspace = (sizes, workspace, buffers)
        return workspace

    # ---- what the model is ----

    def _shape(self) -> decode.Shape:
        first: Any = self.layers[0].layer
        head_dim = first.self_attn.head_dim
        q, k, _, _, gate, *_ = self._table[0].linears
        return decode.Shape(
            len(self.layers),
            q.in_,
            gate.out,
            q.out // head_dim,
            k.out // head_dim,
            head_dim,
            max(linear.in_ for row in self._table for linear in row.linears),
        )

    def _describe(self, row: decode.Layer, layer: FusedLayer) -> None:
        weights = [layer.module(path).weight for path in layer.structure.norms]
        if any(weight.dtype != self.dtype for weight in weights):
            raise Unsuited("its norms are of another dtype")
        row.first_norm, row.second_norm = (weight.data_ptr() for weight in weights)
        row.first_eps, row.second_eps = (norm.eps for norm in layer.norms.values())
        attention = layer.structure.attention
        row.scale, row.window = attention.scale, attention.window or 0
        for number, module in enumerate(layer.linears()):
            original = module.original if isinstance(module, AdaptedLayer) else module
            row.linears[number] = self._linear(original)

    def _linear(self, module: Any) -> decode.Linear:
        bias = None
        if module.bias is not None:
            if module.bias.dtype != self.dtype:
                raise Unsuited("its biases are of another dtype")
            bias = module.bias.data_ptr()
        if type(module) is nn.Linear:
            W = module.weight
            if W.dtype != self.dtype or not W.is_contiguous():
                raise Unsuited("its weights are of different dtypes")
            return decode.Linear(W.data_ptr(), bias, None, None, *W.shape, decode.NUMBERS)
        weight = module.quantized_weight if isinstance(module, QuantizedLinear) else None
        if (
            not isinstance(weight, Int8 | NF4)
            or weight.before_use is not None
            or weight.dtype != self.dtype
        ):
            raise Unsuited(
                "its weights lie in files, or are of a kind that has no compiled product"
            )
        codes, (out, in_) = weight.codes.data_ptr(), weight.shape
        if isinstance(weight, Int8):
            absmax = weight.absmax.data_ptr()
            return decode.Linear(codes, bias, absmax, None, out, in_, decode.EIGHT_BITS)
        if weight.state.blocksize != 64 or in_ % 2 or out * in_ % 64:
            raise Unsuited("its weights are quantized in a way that has no compiled product")
        scales, values = weight.scales().contiguous(), weight.state.code.float().contiguous()
        self._kept += [scales, values]
        return decode.Linear(
            codes, bias, scales.data_ptr(), values.data_ptr(), out, in_, decode.FOUR_BITS
        )

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


def _proven_layers(model: PreTrainedModel, tokens: Tensor) -> tuple[FusedLayer, ...]:
    layers = [it for it in recognise(model, tokens).values() if _is_like_llama(it)]
    if [layer.layer for layer in layers] != list(decoder_layers(model) or ()) or not layers:
        raise Unsuited("its layers are not those of LLaMA")
    return tuple(layers)


def _is_like_llama(layer: FusedLayer | str) -> TypeGuard[FusedLayer]:
    """Return whether a layer is made of what the compiled step computes."""
    if isinstance(layer, str):
        return False
    attention, feed_forward = layer.structure.attention, layer.structure.feed_forward
    norms = (attention.norm, feed_forward.norm)
    plain = Norm(None, eps=0.0, rounds=True)
    return (
        layer.variant == Variant()
        and not layer.structure.parallel
        and layer.structure.norms == norms
        and all(replace(norm, eps=0.0) == plain for norm in layer.norms.values())
        and len(feed_forward.inputs) == 2
        and attention.softcap is None
        and attention.sinks is None
        and attention.value_dim == attention.head_dim
    )


def _angles(decoder: Any, context: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin of all positions, (positions, head_dim)."""
    rotary = getattr(decoder, "rotary_emb", None)
    if rotary is None or getattr(rotary, "rope_type", None) in CHANGING:
        raise Unsuited("its positions are not those of LLaMA")
    with torch.inference_mode():
        angles = rotary(torch.empty(1, 1, dtype=dtype), torch.arange(context)[None])
    cos, sin = (angle[0].to(dtype).contiguous() for angle in angles)
    return cos, sin
