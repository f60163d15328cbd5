"""Quantize the linear layers of a base as its weights are read, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from veneer.errors import ConfigError, ModelError
from veneer.models.assemble import AnyWeight, assemble
from veneer.models.description import keeps_experts, multiplies
from veneer.models.fingerprint import Marks
from veneer.models.placement import AS_THEY_ARE, Placement
from veneer.models.source import Source
from veneer.models.stored_names import Piece, StoredNames, stored_names
from veneer.quant.joined import joined
from veneer.quant.settings import Bits
from veneer.quant.stack import QuantizedStack
from veneer.quant.weight import QuantizedWeight, dense

LOOK_UP = nn.Embedding.forward


def quantizable(skeleton: PreTrainedModel, *, head: bool = False) -> dict[str, nn.Module]:
    """Return the layers to quantize, by path: every linear one; the head only with `head`.

    Raises ConfigError for a head that is the embedding too, which stays dense.
    """
    output = skeleton.get_output_embeddings()
    if head and output is not None and output.weight is skeleton.get_input_embeddings().weight:
        raise ConfigError("The head of this model is its embedding too, and cannot be quantized.")
    return {
        path: layer
        for path, layer in skeleton.named_modules()
        if (isinstance(layer, Conv1D) or (isinstance(layer, nn.Linear) and multiplies(layer)))
        and (head or layer is not output)
    }


def quantizable_embedding(skeleton: PreTrainedModel) -> str:
    """Return the name of the embedding's weight, which can be quantized too.

    Raises ConfigError where it is the head too, or does more than look rows up.
    """
    embedding, head = skeleton.get_input_embeddings(), skeleton.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or type(embedding).forward is not LOOK_UP:
        raise ConfigError("The embedding of this model cannot be quantized: it is one of its own.")
    if head is not None and head.weight is embedding.weight:
        raise ConfigError("The embedding of this model is its head too, and cannot be quantized.")
    return next(f"{path}.weight" for path, m in skeleton.named_modules() if m is embedding)


def quantizable_stacks(skeleton: nn.Module) -> dict[str, Tensor]:
    """Return the stacks of experts to quantize, by the names of their parameters."""
    return {
        f"{path}.{leaf}": weight
        for path, module in skeleton.named_modules()
        if keeps_experts(module)
        for leaf, weight in module._parameters.items()
        if weight is not None and weight.ndim == 3
    }


def quantize(weight: Tensor, bits: Bits, dtype: torch.dtype) -> QuantizedWeight:
    """Return a weight (out, in) in 4 or 8 bits a number, to be dequantized to `dtype`."""
    # bitsandbytes takes a second to import.
    if bits == 4:
        from veneer.quant.nf4 import NF4

        return NF4.quantize(weight, dtype)
    from veneer.quant.int8 import Int8

    return Int8.quantize(weight, dtype)


def second_rounding(source: Source, bits: Bits) -> tuple[str, float] | None:
    """Return the first weight to quantize that the files hold quantized already, and ‖W − Ŵ‖ / ‖W‖
    of it in `bits` bits, of a stack that of its first expert; None where there is no such weight.
    """
    stacks = quantizable_stacks(source.skeleton)
    layers = {f"{path}.weight" for path in quantizable(source.skeleton)}
    again = source.rounded & (stacks.keys() | layers)
    name = next((name for name in source.names if name in again), None)
    if name is None:
        return None
    owner = source.skeleton.get_submodule(name.rpartition(".")[0])
    if name in stacks:
        weight = source.expert(name, 0)
        is_turned = bool(getattr(owner, "is_transposed", False))
    else:
        weight, is_turned = source.read(name), isinstance(owner, Conv1D)
    weight = (weight.T if is_turned else weight).to(torch.float32)
    error = dense(_quantized(weight, bits, torch.float32, name)) - weight
    return name, float(error.norm() / weight.norm())


def quantized_model(
    source: Source,
    bits: Bits,
    dtype: torch.dtype,
    *,
    head: bool = False,
    to: Placement = AS_THEY_ARE,
) -> PreTrainedModel:
    """Return the base with quantized linear layers and its fingerprint before that.

    Where several processes share it, each quantizes every weight, and keeps its shards. Raises as
    `quantized_weights` does.
    """
    marks = Marks(source.skeleton)
    weights = quantized_weights(source, bits, dtype, head=head, seen=marks.see)
    model = assemble(source.skeleton, weights, dtype, to=to)
    model.veneer_marks = marks.fingerprint()  # type: ignore[assignment]
    return model


def quantized_weights(
    source: Source,
    bits: Bits,
    dtype: torch.dtype,
    *,
    head: bool = False,
    embedding: bool = False,
    seen: Callable[..., None],
) -> Iterator[tuple[str, AnyWeight]]:
    """Yield every weight of the source by its name, those of `quantizable` layers and stacks of
    experts quantized, experts one by one, and with `embedding` the embedding in 8 bits.

    `seen` is called with the name and each weight before that, and with the number of an expert as
    `expert`. Raises ModelError for values that are not finite, which would spread through their
    block's scale.
    """
    layers = quantizable(source.skeleton, head=head)
    stacks = quantizable_stacks(source.skeleton)
    names = stored_names(source.skeleton) if stacks else None
    looked_up = quantizable_embedding(source.skeleton) if embedding else None
    for name in source.names:
        if name in stacks:
            assert names is not None
            yield name, _quantized_stack(source, name, bits, dtype, names, seen)
            continue
        weight = source.read(name)
        seen(name, weight)
        if name == looked_up:
            yield name, _quantized(weight, 8, dtype, name)
            continue
        path, _, leaf = name.rpartition(".")
        if leaf != "weight" or path not in layers:
            yield name, weight
            continue
        weight = weight.T if isinstance(layers[path], Conv1D) else weight
        yield name, _quantized(weight, bits, dtype, name)


def _quantized_stack(
    source: Source,
    name: str,
    bits: Bits,
    dtype: torch.dtype,
    names: StoredNames,
    seen: Callable[..., None],
) -> QuantizedStack:
    owner = source.skeleton.get_submodule(name.rpartition(".")[0])
    transposed = bool(getattr(owner, "is_transposed", False))
    experts = []
    for e, pieces in enumerate(names.pieces(name)):
        weight = source.expert(name, e)
        seen(name, weight, expert=e)
        weight = weight.T if transposed else weight
        experts.append(_quantized_expert(weight, pieces, bits, dtype, f"expert {e} of {name}"))
    return QuantizedStack(experts, transposed=transposed)


def _quantized_expert(
    weight: Tensor, pieces: Sequence[Piece], bits: Bits, dtype: torch.dtype, name: str
) -> QuantizedWeight:
    return joined([_quantized(weight[piece.rows], bits, dtype, name) for piece in pieces])


def _quantized(weight: Tensor, bits: Bits, dtype: torch.dtype, name: str) -> QuantizedWeight:
    if not bool(torch.isfinite(weight).all()):
        raise ModelError(f"{name} has values that are not finite numbers; it cannot be quantized.")
    try:
        return quantize(weight, bits, dtype)
    except ValueError as error:
        raise ModelError(f"{name} cannot be quantized: {error}.") from error
