"""Models such as LLaMA on a CPU, through one compiled function for a step of all rows.

What a token gives never depends on what else is computed with it (kernels/decode.cpp), so that an
answer alone and among others is the same to the bit. Whether a model really computes what this one
function does is proven by numbers before it is taken.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.adapter.active import active_adapters_of
from veneer.adapter.layers import AdaptedLayer
from veneer.fused.layers import FusedLayer, fused_layers, norm_of
from veneer.kernels import decode
from veneer.kernels.norm import rms_norm
from veneer.lowrank.update import RowUpdates
from veneer.models.blocks import decoder_layers
from veneer.quant.int8 import Int8
from veneer.quant.nf4 import NF4
from veneer.quant.weight import QuantizedLinear
from veneer.serve.engine.adapter_cache import Loaded
from veneer.serve.engine.runner import Chunk

FIRST_PLACES = 256  # that a row's memory begins with; it doubles as it fills
PROBE = 40  # tokens on which the way is proven, more than a step's block of them
# How far logits may be from the model's own, relatively to them, on average: rounding through all
# layers. In bfloat16 those of SmolLM2-135M are 0.03 from each other, and as far from float32's.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
MOVING = ("dynamic", "longrope")  # rotary embeddings that look at the length of the text


class Unsuited(Exception):
    """Why a model cannot be computed like this."""


@dataclass(frozen=True)
class Piece:
    """Keys (layers, heads, tokens / 16, head_dim, 16) and values (layers, heads, tokens, head_dim)
    of some tokens."""

    keys: Tensor
    values: Tensor

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


class Compiled:
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
        self.active_adapters = active_adapters_of(model)
        self.decoder: Any = model.get_decoder()
        self.angles = _angles(self.decoder, self.layers[0], context, self.dtype)
        self._kept: list[Tensor] = []  # what the tables below point to, beside the model's own
        self._table = (decode.Layer * len(self.layers))()
        for row, layer in zip(self._table, self.layers, strict=True):
            self._describe(row, layer)
        self.shape = self._shape()
        self.memories: list[Piece | None] = [None] * slots
        self._patches: WeakKeyDictionary[Loaded, tuple[Any, int]] = WeakKeyDictionary()
        self._room: tuple[tuple[int, ...], decode.Room, list[Tensor]] | None = None
        self._prove(tokens)

    # ---- what the engine asks for ----

    def step(self, chunks: Sequence[Chunk]) -> Tensor:
        ids = torch.tensor([token for chunk in chunks for token in chunk.tokens])
        acting = [chunk.loaded for chunk in chunks for _ in chunk.tokens]
        with torch.inference_mode():
            x = self._by_module(self.model.get_input_embeddings(), ids, acting)
            x = x.to(self.dtype).contiguous()  # (tokens, dim)
            self._through_layers(chunks, x)
            rows = _wanted(chunks)
            return self._logits(x[rows], [acting[row] for row in rows])

    def prepare(self, loaded: Loaded) -> None:
        self._patch(loaded)

    def keep(self, slot: int, first: int, last: int) -> Piece:
        memory = self.memories[slot]
        assert memory is not None
        assert first % decode.KEYS == last % decode.KEYS == 0
        keys = memory.keys[:, :, first // decode.KEYS : last // decode.KEYS]
        return Piece(keys.clone(), memory.values[:, :, first:last].clone())

    def put(self, slot: int, pieces: Sequence[Any]) -> None:
        places = sum(piece.values.shape[2] for piece in pieces)
        memory, at = self._memory(slot, places), 0
        for piece in pieces:
            end = at + piece.values.shape[2]
            memory.keys[:, :, at // decode.KEYS : end // decode.KEYS] = piece.keys
            memory.values[:, :, at:end] = piece.values
            at = end

    def free(self, slot: int) -> None:
        self.memories[slot] = None

    # ---- a step ----

    def _through_layers(self, chunks: Sequence[Chunk], x: Tensor) -> None:
        """Take embeddings (tokens, dim) of the chunks through all layers, in place."""
        count = len(x)
        memories = (decode.Memory * count)()
        patches = (ctypes.c_void_p * count)()
        positions = torch.tensor(
            [chunk.start + i for chunk in chunks for i in range(len(chunk.tokens))]
        )
        ranks = at = places = 0
        for chunk in chunks:
            memory = self._memory(chunk.slot, chunk.start + len(chunk.tokens))
            own = decode.Memory(
                memory.keys.data_ptr(), memory.values.data_ptr(), memory.values.shape[2]
            )
            places = max(places, memory.values.shape[2])
            patch = None
            if chunk.loaded is not None:
                patch, most = self._patch(chunk.loaded)
                ranks = max(ranks, most)
            for i in range(at, at + len(chunk.tokens)):
                memories[i] = own
                patches[i] = patch
            at += len(chunk.tokens)
        batch = decode.Batch(
            count,
            ctypes.addressof(memories),
            positions.data_ptr(),
            ctypes.addressof(patches),
            ranks,
        )
        room = self._room_for(count, ranks, places)
        self.compiled.step(self._table, self.shape, batch, room, x, self.angles)

    def _logits(self, x: Tensor, acting: Sequence[Loaded | None]) -> Tensor:
        norm = norm_of(self.decoder.norm)
        normed, _ = rms_norm(x, norm.weight, norm.eps)
        head: Any = self.model.get_output_embeddings()
        plain = type(head) is nn.Linear and head.bias is None and head.weight.dtype == self.dtype
        if plain and len(normed):
            return self.compiled.product(normed.contiguous(), head.weight)
        return self._by_module(head, normed, acting).float()

    def _by_module(self, module: Any, x: Tensor, acting: Sequence[Loaded | None]) -> Tensor:
        """Return what a module outside of the layers gives for each token as a row of its own."""
        if not isinstance(module, AdaptedLayer):
            found: Tensor = module(x)
            return found
        different = list(dict.fromkeys(each for each in acting if each is not None))
        which = tuple(None if each is None else different.index(each) for each in acting)
        self.active_adapters.row_updates = RowUpdates([each.layers for each in different], which)
        try:
            found = module(x[:, None])[:, 0]
        finally:
            self.active_adapters.row_updates = None
        return found

    def _patch(self, loaded: Loaded) -> tuple[int, int]:
        """Return the address of what a loaded adapter lays over each part of each layer, and the
        most ranks that act on one group of parts."""
        if (known := self._patches.get(loaded)) is None:
            table, most = (decode.Part * (len(self.layers) * decode.PARTS))(), 0
            for number, layer in enumerate(self.layers):
                parts: list[decode.Part] = []
                for module in layer.linears():
                    one = loaded.layers.get(module) if isinstance(module, AdaptedLayer) else None
                    part = decode.Part()
                    if one is not None:
                        assert one.A.is_contiguous()
                        assert one.B.T.is_contiguous()
                        gain = None if one.gain is None else one.gain.data_ptr()
                        part = decode.Part(one.A.data_ptr(), one.B.data_ptr(), gain, one.rank)
                    table[number * decode.PARTS + len(parts)] = part
                    parts.append(part)
                most = max(most, *(sum(parts[i].rank for i in g) for g in decode.GROUPS))
            known = self._patches[loaded] = (table, most)
        return ctypes.addressof(known[0]), known[1]

    # ---- memory ----

    def _memory(self, slot: int, places: int) -> Piece:
        """Return a slot's keys and values, with room for so many tokens at least."""
        known = self.memories[slot]
        before = 0 if known is None else known.values.shape[2]
        if known is not None and places <= before:
            return known
        after = max(2 * before, FIRST_PLACES)
        while after < places:
            after *= 2
        shape = self.shape
        outer = (shape.layers, shape.shared_heads)
        grown = Piece(
            torch.zeros(
                *outer, after // decode.KEYS, shape.head_dim, decode.KEYS, dtype=self.dtype
            ),
            torch.zeros(*outer, after, shape.head_dim, dtype=self.dtype),
        )
        if known is not None:
            grown.keys[:, :, : before // decode.KEYS] = known.keys
            grown.values[:, :, :before] = known.values
        self.memories[slot] = grown
        return grown

    def _room_for(self, tokens: int, ranks: int, places: int) -> decode.Room:
        wanted = (tokens, ranks, places)
        if self._room is not None and all(
            have >= need for have, need in zip(self._room[0], wanted, strict=True)
        ):
            # The least of places is a stride, not a bound: it may be more than is needed.
            return self._room[1]
        if self._room is not None:
            wanted = tuple(map(max, self._room[0], wanted))  # type: ignore[assignment]
        tokens, ranks, places = wanted
        shape, threads = self.shape, torch.get_num_threads()
        queries = shape.heads * shape.head_dim
        keys = shape.shared_heads * shape.head_dim
        columns = (shape.dim, queries, keys, keys, queries, shape.inner, shape.inner)
        made = [torch.empty(tokens, n, dtype=self.dtype) for n in columns]
        group = shape.heads // shape.shared_heads
        made.append(torch.empty(tokens, ranks, dtype=torch.float32))
        made.append(torch.empty(threads, group, places, dtype=torch.float32))
        made.append(torch.empty(threads, decode.OUTPUTS, shape.widest, dtype=self.dtype))
        room = decode.Room(*(tensor.data_ptr() for tensor in made), places)
        self._room = (wanted, room, made)
        return room

    # ---- what the model is ----

    def _shape(self) -> decode.Shape:
        first: Any = self.layers[0].layer
        parts = [part for row in self._table for part in row.parts]
        head_dim = first.self_attn.head_dim
        q, k, _, _, gate, *_ = self._table[0].parts
        return decode.Shape(
            len(self.layers),
            q.in_,
            gate.out,
            q.out // head_dim,
            k.out // head_dim,
            head_dim,
            max(part.in_ for part in parts),
        )

    def _describe(self, row: decode.Layer, layer: FusedLayer) -> None:
        norms = layer.norms()
        for norm in norms:
            if norm.weight.dtype != self.dtype:
                raise Unsuited("its norms are of another dtype")
        row.first_norm, row.second_norm = (norm.weight.data_ptr() for norm in norms)
        row.first_eps, row.second_eps = (norm.eps for norm in norms)
        row.scale, row.window = layer.scale, layer.window or 0
        for number, module in enumerate(layer.linears()):
            original = module.original if isinstance(module, AdaptedLayer) else module
            row.parts[number] = self._linear(original)

    def _linear(self, module: Any) -> decode.Linear:
        bias = None
        if module.bias is not None:
            if module.bias.dtype != self.dtype:
                raise Unsuited("its biases are of another dtype")
            bias = module.bias.data_ptr()
        if type(module) is nn.Linear:
            weight = module.weight
            if weight.dtype != self.dtype or not weight.is_contiguous():
                raise Unsuited("its weights are of different dtypes")
            return decode.Linear(weight.data_ptr(), bias, None, None, *weight.shape, decode.NUMBERS)
        packed = module.quantized_weight if isinstance(module, QuantizedLinear) else None
        if packed is None or packed.before_use is not None or packed.dtype != self.dtype:
            raise Unsuited(
                "its weights lie in files, or are of a kind that has no compiled product"
            )
        out, in_ = packed.shape
        if isinstance(packed, Int8):
            scales = packed.absmax
            return decode.Linear(
                packed.codes.data_ptr(), bias, scales.data_ptr(), None, out, in_, decode.EIGHT_BITS
            )
        whole = in_ % 2 == 0 and out * in_ % 64 == 0
        if not isinstance(packed, NF4) or packed.state.blocksize != 64 or not whole:
            raise Unsuited("its weights are packed in a way that has no compiled product")
        scales, values = packed.scales().contiguous(), packed.state.code.float().contiguous()
        self._kept += [scales, values]
        return decode.Linear(
            packed.codes.data_ptr(),
            bias,
            scales.data_ptr(),
            values.data_ptr(),
            out,
            in_,
            decode.FOUR_BITS,
        )

    def _prove(self, tokens: Tensor) -> None:
        """Raise Unsuited where logits are not what the model's own forward gives."""
        with torch.inference_mode():
            wanted = self.model(input_ids=tokens, use_cache=False).logits[0].double()
        half = tokens.shape[1] // 2
        found = []
        for first, last in ((0, half), (half, tokens.shape[1])):
            some = tokens[0, first:last].tolist()
            found.append(self.step([Chunk(0, some, first, None, "all", False)]))
        self.free(0)
        difference = (torch.cat(found).double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        if not float(difference.mean()) <= TOLERANCE[self.dtype]:
            raise Unsuited("the compiled step gives something else")


def _proven_layers(model: PreTrainedModel, tokens: Tensor) -> tuple[FusedLayer, ...]:
    layers = fused_layers(model, tokens)
    if [layer.layer for layer in layers] != list(decoder_layers(model) or ()) or not layers:
        raise Unsuited("its layers are not those of LLaMA")
    return layers


def _angles(
    decoder: Any, layer: FusedLayer, context: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return cos and sin of all positions, (positions, head_dim)."""
    rotary = getattr(decoder, "rotary_emb", None)
    if rotary is None or getattr(rotary, "rope_type", None) in MOVING:
        raise Unsuited("its positions are not those of LLaMA")
    with torch.inference_mode():
        angles = rotary(torch.empty(1, 1, dtype=dtype), torch.arange(context)[None])
    cos, sin = (angle[0].to(dtype).contiguous() for angle in angles)
    return cos, sin


def _wanted(chunks: Sequence[Chunk]) -> list[int]:
    """Return which tokens' logits are wanted."""
    rows: list[int] = []
    at = 0
    for chunk in chunks:
        end = at + len(chunk.tokens)
        rows += range({"none": end, "last": end - 1, "all": at}[chunk.wanted], end)
        at = end
    return rows
