"""A model's decoder layers as the table that the compiled step reads (kernels/decode.py)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from veneer.adapter.layers import AdaptedLayer
from veneer.fused.layers import FusedLayer
from veneer.fused.norms import with_weights
from veneer.fused.recognise import recognise
from veneer.fused.structure import FeedForwardStructure, LayerStructure
from veneer.generate.runners.loaded import LoadedAdapter
from veneer.kernels import decode
from veneer.kernels.activation import Activation
from veneer.kernels.rotary import Rotary
from veneer.models.blocks import decoder_layers
from veneer.quant.int8 import Int8
from veneer.quant.nf4 import NF4
from veneer.quant.weight import QuantizedLinear

ACTIVATIONS: Sequence[Activation] = get_args(Activation)  # in the order of decode.cpp


class Unsuited(Exception):
    """Why a model cannot be computed by the compiled step."""


def proven_layers(model: PreTrainedModel, tokens: Tensor) -> tuple[FusedLayer, ...]:
    """Return a model's layers, each proven to be made of its parts. Raises Unsuited."""
    recognised = recognise(model, tokens)
    for path, layer in recognised.items():
        if isinstance(layer, str):
            raise Unsuited(f"its layers are not made of known parts ({path}: {layer})")
        if layer.structure.mixture is not None:
            raise Unsuited(f"its layers are not made of known parts ({path}: a mixture of experts)")
        if layer.structure.attention.latent is not None:
            raise Unsuited(f"its layers are not made of known parts ({path}: latent attention)")
    layers = tuple(layer for layer in recognised.values() if isinstance(layer, FusedLayer))
    if not layers or [layer.layer for layer in layers] != list(decoder_layers(model) or ()):
        raise Unsuited("its layers are not those of a decoder")
    return layers


class LayerTable:
    """The layers as `decode.Layer` structures, and each adapter's updates of them.

    angles: of each layer, for all positions (1, positions). Raises Unsuited.
    """

    def __init__(
        self,
        layers: Sequence[FusedLayer],
        angles: Sequence[Rotary | None],
        positions: Tensor,
        dtype: torch.dtype,
    ) -> None:
        self.layers, self.dtype = layers, dtype
        self.kept: list[Tensor] = []  # what the table points to, beside the model's own
        self.rows = (decode.Layer * len(layers))()
        for row, layer, rotary in zip(self.rows, layers, angles, strict=True):
            self._describe(row, layer, rotary, positions)
        shapes = {self._shape_of(row, layer) for row, layer in zip(self.rows, layers, strict=True)}
        if len(shapes) > 1:
            raise Unsuited("its layers are of different sizes")
        widest = max(linear.in_ for row in self.rows for linear in row.linears)
        self.shape = decode.Shape(len(layers), *shapes.pop(), widest)
        self._updates: WeakKeyDictionary[LoadedAdapter, tuple[Any, int]] = WeakKeyDictionary()

    def updates_of(self, adapter: LoadedAdapter) -> tuple[int, int]:
        """Return the address of an adapter's updates of all linear layers, and the largest sum of
        ranks over linear layers that share an input."""
        if (updates_and_most := self._updates.get(adapter)) is None:
            updates_and_most = self._updates[adapter] = self._updates_and_most(adapter)
        return ctypes.addressof(updates_and_most[0]), updates_and_most[1]

    def _updates_and_most(self, adapter: LoadedAdapter) -> tuple[Any, int]:
        updates, most = (decode.Update * (len(self.layers) * decode.LINEARS))(), 0
        for number, layer in enumerate(self.layers):
            ranks = [0] * decode.LINEARS
            for place, path in _linears(layer.structure):
                module = layer.module(path)
                update = adapter.layers.get(module) if isinstance(module, AdaptedLayer) else None
                if update is not None:
                    A, B, gain = update.A, update.B.T, update.gain
                    assert A.is_contiguous()
                    assert B.is_contiguous()
                    beside = (None if x is None else x.data_ptr() for x in (gain, update.bias))
                    ranks[place] = update.rank
                    updates[number * decode.LINEARS + place] = decode.Update(
                        A.data_ptr(), B.data_ptr(), *beside, update.rank
                    )
            most = max(most, *(sum(ranks[i] for i in group) for group in decode.GROUPS))
        return updates, most

    def _shape_of(self, row: decode.Layer, layer: FusedLayer) -> tuple[int, ...]:
        attention, feed_forward = layer.structure.attention, _feed_forward(layer.structure)
        dim, inner = row.linears[decode.ATTENTION_INPUTS].in_, row.linears[decode.DOWN].in_
        inner_columns = 2 * inner if feed_forward.is_gated else inner
        heads = (attention.heads, attention.key_heads, attention.head_dim, attention.value_dim)
        return dim, inner, inner_columns, *heads

    def _describe(
        self, row: decode.Layer, layer: FusedLayer, rotary: Rotary | None, positions: Tensor
    ) -> None:
        structure, variant = layer.structure, layer.variant
        attention, feed_forward = structure.attention, _feed_forward(structure)
        for place, path in _linears(structure):
            row.linears[place] = linear_of(layer.module(path), self.dtype, self.kept)
        dim = row.linears[decode.ATTENTION_INPUTS].in_
        norms = row.norms
        norms.before_attention = self._norm(layer, attention.norm, dim)
        norms.of_q = self._norm(layer, attention.q_norm, attention.head_dim)
        norms.of_k = self._norm(layer, attention.k_norm, attention.head_dim)
        norms.after_attention = self._norm(layer, attention.post_norm, dim)
        norms.before_feed_forward = self._norm(layer, feed_forward.norm, dim)
        norms.after_feed_forward = self._norm(layer, feed_forward.post_norm, dim)
        whole = max(norms.of_q.dim, norms.of_k.dim) > attention.head_dim
        if whole and variant.order == "by key head":
            raise Unsuited("it norms queries of all heads together that lie apart")
        if rotary is not None:
            self.kept += [rotary.cos, rotary.sin]
            row.cos, row.sin = rotary.cos.data_ptr(), rotary.sin.data_ptr()
            row.pairs, row.adjacent = rotary.cos.shape[1], rotary.interleaved
        row.q_factors = self._address(layer.query_factor(positions, self.dtype))
        if attention.sinks is not None:
            row.sinks = self._address(layer.layer.get_parameter(attention.sinks).float())
        row.scale, row.softcap = layer.scale, attention.softcap or 0.0
        row.multiplier, row.window = variant.multiplier, attention.window or 0
        row.by_key_head = variant.order == "by key head"
        row.attention_inputs, row.inner_inputs = len(attention.inputs), len(feed_forward.inputs)
        row.activation = ACTIVATIONS.index(variant.activation)
        row.gate_first, row.parallel = variant.gate_first, structure.parallel

    def _norm(self, layer: FusedLayer, path: str | None, dim: int) -> decode.Norm:
        """Return a norm over `dim` numbers, or over as many as its weight has."""
        if path is None:
            return decode.Norm()
        norm = with_weights(layer.norms[path], layer.module(path))
        weight, offset = norm.weight, norm.offset
        if weight is None:
            weight, offset = torch.zeros(dim, dtype=self.dtype), 1.0
        if any(x is not None and x.dtype != self.dtype for x in (weight, norm.bias)):
            raise Unsuited("its norms are of another dtype")
        addresses = self._address(weight), self._address(norm.bias)
        settings = (offset, norm.eps, len(weight), norm.centred, norm.rounds)
        return decode.Norm(*addresses, *settings)

    def _address(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        tensor = tensor.contiguous()
        self.kept.append(tensor)
        return tensor.data_ptr()


def linear_of(module: Any, dtype: torch.dtype, kept: list[Tensor]) -> decode.Linear:
    """Return a linear layer without its adapters. `kept` gets what has to live as long as that.
    Raises Unsuited."""
    module = module.original if isinstance(module, AdaptedLayer) else module
    if module.bias is not None and module.bias.dtype != dtype:
        raise Unsuited("its biases are of another dtype")
    if isinstance(module, nn.Linear | Conv1D):
        W = module.weight
        if isinstance(module, Conv1D):  # whose weight is (in, out)
            W = W.T.contiguous()
            kept.append(W)
        if W.dtype != dtype or not W.is_contiguous():
            raise Unsuited("its weights are of different dtypes")
        return plain_linear(W, module.bias)
    bias = None if module.bias is None else module.bias.data_ptr()
    weight = module.quantized_weight if isinstance(module, QuantizedLinear) else None
    if not isinstance(weight, Int8 | NF4) or weight.before_use is not None or weight.dtype != dtype:
        raise Unsuited("its weights lie in files, or are of a kind that has no compiled product")
    codes, (out, in_) = weight.codes.data_ptr(), weight.shape
    if isinstance(weight, Int8):
        absmax = weight.absmax.data_ptr()
        return decode.Linear(codes, bias, absmax, None, out, in_, decode.EIGHT_BITS)
    if weight.state.blocksize != 64 or in_ % 2 or out * in_ % 64:
        raise Unsuited("its weights are quantized in a way that has no compiled product")
    scales, values = weight.scales().contiguous(), weight.state.code.float().contiguous()
    kept += [scales, values]
    return decode.Linear(
        codes, bias, scales.data_ptr(), values.data_ptr(), out, in_, decode.FOUR_BITS
    )


def plain_linear(W: Tensor, bias: Tensor | None) -> decode.Linear:
    """Return a linear layer of W (out, in), contiguous, and a bias; both have to live as long."""
    address = None if bias is None else bias.data_ptr()
    return decode.Linear(W.data_ptr(), address, None, None, *W.shape, decode.NUMBERS)


def _linears(structure: LayerStructure) -> list[tuple[int, str]]:
    """Return the place of each linear layer in the table, and its path."""
    attention, feed_forward = structure.attention, _feed_forward(structure)
    return [
        *enumerate(attention.inputs, decode.ATTENTION_INPUTS),
        (decode.OUTPUT, attention.output),
        *enumerate(feed_forward.inputs, decode.INNER_INPUTS),
        (decode.DOWN, feed_forward.output),
    ]


def _feed_forward(structure: LayerStructure) -> FeedForwardStructure:
    assert isinstance(structure.feed_forward, FeedForwardStructure)  # by proven_layers
    return structure.feed_forward
