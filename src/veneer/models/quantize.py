"""Quantize the linear layers of a base as its weights are read, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from veneer.errors import ConfigError, ModelError
from veneer.models.assemble import assemble
from veneer.models.description import multiplies
from veneer.models.fingerprint import Marks
from veneer.models.source import Source
from veneer.quant.settings import Bits
from veneer.quant.weight import QuantizedWeight


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


def quantize(weight: Tensor, bits: Bits, dtype: torch.dtype) -> QuantizedWeight:
    """Return a weight (out, in) in 4 or 8 bits a number, to be dequantized to `dtype`."""
    # bitsandbytes takes a second to import.
    if bits == 4:
        from veneer.quant.nf4 import NF4

        return NF4.quantize(weight, dtype)
    from veneer.quant.int8 import Int8

    return Int8.quantize(weight, dtype)


def quantized_model(
    source: Source, bits: Bits, dtype: torch.dtype, *, head: bool = False
) -> PreTrainedModel:
    """Return the base with quantized linear layers and its fingerprint before that.

    Raises as `quantized_weights` does.
    """
    marks = Marks(source.skeleton)
    weights = quantized_weights(source, bits, dtype, head=head, seen=marks.see)
    model = assemble(source.skeleton, weights, dtype)
    model.veneer_marks = marks.fingerprint()  # type: ignore[assignment]
    return model


def quantized_weights(
    source: Source,
    bits: Bits,
    dtype: torch.dtype,
    *,
    head: bool = False,
    seen: Callable[[str, Tensor], None],
) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
    """Yield every weight of the source by its name, those of `quantizable` layers quantized.

    `seen` is called with each weight before that. Raises ModelError for values that are not finite,
    which would spread through their block's scale.
    """
    layers = quantizable(source.skeleton, head=head)
    for name in source.names:
        weight = source.read(name)
        seen(name, weight)
        path, _, leaf = name.rpartition(".")
        if leaf != "weight" or path not in layers:
            yield name, weight
            continue
        if not bool(torch.isfinite(weight).all()):
            raise ModelError(
                f"{name} has values that are not finite numbers; it cannot be quantized."
            )
        weight = weight.T if isinstance(layers[path], Conv1D) else weight
        try:
            yield name, quantize(weight, bits, dtype)
        except ValueError as error:
            raise ModelError(f"{name} cannot be quantized: {error}.") from error
