"""The table of published formats: from `quantization_config` and a layer's tensors to its weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from veneer.quant.awq import AWQ
from veneer.quant.compressed import CompressedInt
from veneer.quant.fp8 import FP8, SCALES
from veneer.quant.gptq import GPTQ
from veneer.quant.mxfp4 import MXFP4
from veneer.quant.weight import QuantizedWeight

# What files may hold of a linear layer, by the ends of the tensors' names.
KEYS = frozenset(
    {
        *("weight", *SCALES, "weight_packed", "weight_shape", "weight_zero_point", "weight_g_idx"),
        *("qweight", "qzeros", "scales", "g_idx"),
    }
)
Tensors = Mapping[str, Tensor]
Settings = Mapping[str, Any]


def published_weight(
    tensors: Tensors, how: Settings, dtype: torch.dtype, *, inputs: int
) -> QuantizedWeight | None:
    """Return the weight (out, in) of a layer's tensors by the ends of their names, or None for a
    layer that is not quantized.

    how: the model's `quantization_config`. inputs: the layer's in. Raises ValueError for tensors
    that do not belong together.
    """
    if not is_quantized(tensors):
        return None
    return READERS[how["quant_method"]](tensors, how, dtype, inputs)


def is_quantized(tensors: Tensors) -> bool:
    """Return whether tensors are those of a quantized layer, by their names and dtypes."""
    weight = tensors.get("weight")
    return bool(tensors) and (weight is None or weight.dtype.itemsize == 1)


def _fp8(tensors: Tensors, how: Settings, dtype: torch.dtype, inputs: int) -> QuantizedWeight:
    block = how.get("weight_block_size")
    return _with_scales(tensors, dtype, tuple(block) if block else None, "fp8")


def _with_scales(
    tensors: Tensors, dtype: torch.dtype, block: tuple[int, ...] | None, kind: str
) -> QuantizedWeight:
    name = next((name for name in SCALES if name in tensors), None)
    if name is None:
        raise ValueError("it has no scales")
    sizes = None if block is None else (block[0], block[1])
    return FP8(tensors["weight"], tensors[name], dtype, block=sizes, name=name, kind=kind)


def _gptq(tensors: Tensors, how: Settings, dtype: torch.dtype, inputs: int) -> QuantizedWeight:
    return GPTQ(
        tensors["qweight"],
        tensors["qzeros"],
        tensors["scales"],
        dtype,
        inputs=inputs,
        group=how.get("group_size", 128),
        group_of=tensors.get("g_idx"),
        older=how.get("checkpoint_format") != "gptq_v2",
    )


def _awq(tensors: Tensors, how: Settings, dtype: torch.dtype, inputs: int) -> QuantizedWeight:
    stored = (tensors[name] for name in ("qweight", "qzeros", "scales"))
    return AWQ(*stored, dtype, group=how.get("group_size", 128))


def _compressed(tensors: Tensors, how: Settings, dtype: torch.dtype, inputs: int) -> QuantizedWeight:
    schemes = [group["weights"] for group in how["config_groups"].values()]
    if "weight" in tensors and tensors["weight"].dtype != torch.int8:
        blocks = [scheme.get("block_structure") for scheme in schemes]
        block = next((tuple(block) for block in blocks if block), None)
        return _with_scales(tensors, dtype, block, CompressedInt.kind)
    if "weight" in tensors:
        bits = 8
    else:  # which of the schemes it is, the width of its words says
        words = tensors["weight_packed"].shape[-1]
        bits = next((b for b in (4, 8) if words == -(inputs * b // -32)), 0)
    # Groups are whole, so that the number of scales says how wide they are.
    group = -(inputs // -tensors["weight_scale"].shape[-1]) if tensors["weight_scale"].ndim else None
    return CompressedInt(tensors, dtype, bits=bits, group=group)


READERS: Mapping[str, Callable[[Tensors, Settings, torch.dtype, int], QuantizedWeight]] = {
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
    # The layers beside its experts are dense; those are read by `published_experts`.
    "mxfp4": _fp8,
}


def published_experts(
    name: str, stored: Tensors, how: Settings, dtype: torch.dtype
) -> list[QuantizedWeight] | None:
    """Return the experts of a stack that files keep whole, as `name` with an ending; None where
    they do not.

    Each is (out, in), also where the module keeps them as (in, out).
    """
    if (blocks := stored.get(f"{name}_blocks")) is not None:
        scales = stored[f"{name}_scales"]
        return [MXFP4(*each, dtype) for each in zip(blocks, scales, strict=True)]
    codes, scales = stored.get(name), stored.get(f"{name}_scale_inv")
    if codes is None or scales is None or codes.dtype.itemsize > 1:
        return None
    block = how.get("weight_block_size")
    sizes = (block[0], block[1]) if block else None
    return [FP8(*each, dtype, block=sizes) for each in zip(codes, scales, strict=True)]
