"""The table of published formats: a weight of its tensors and the model's `quantization_config`."""

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


def published_weight(tensors: Tensors, how: Settings, dtype: torch.dtype) -> QuantizedWeight:
    """Return the weight (out, in) of a quantized layer's tensors by the ends of their names.

    how: the model's `quantization_config`. Raises ValueError for tensors that do not belong
    together, and KeyError for missing ones.
    """
    return READERS[how["quant_method"]](tensors, how, dtype)


def is_quantized(tensors: Tensors) -> bool:
    """Return whether tensors are those of a quantized layer, by their names and dtypes."""
    weight = tensors.get("weight")
    is_eight_bits = weight is not None and weight.dtype.itemsize == 1
    return is_eight_bits or "qweight" in tensors or "weight_packed" in tensors


def _fp8(tensors: Tensors, how: Settings, dtype: torch.dtype) -> QuantizedWeight:
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


def _gptq(tensors: Tensors, how: Settings, dtype: torch.dtype) -> QuantizedWeight:
    words, group_of = tensors["qweight"], tensors.get("g_idx")
    inputs = words.shape[0] * 32 // how.get("bits", 4) if group_of is None else len(group_of)
    return GPTQ(
        words,
        tensors["qzeros"],
        tensors["scales"],
        dtype,
        inputs=inputs,
        group=how.get("group_size", 128),
        group_of=group_of,
        older=how.get("checkpoint_format") != "gptq_v2",
    )


def _awq(tensors: Tensors, how: Settings, dtype: torch.dtype) -> QuantizedWeight:
    words, zeros, scales = (tensors[name] for name in ("qweight", "qzeros", "scales"))
    return AWQ(words, zeros, scales, dtype, group=how.get("group_size", 128))


def _compressed(tensors: Tensors, how: Settings, dtype: torch.dtype) -> QuantizedWeight:
    schemes = [group["weights"] for group in how["config_groups"].values()]
    if "weight" in tensors and tensors["weight"].dtype != torch.int8:
        blocks = [scheme.get("block_structure") for scheme in schemes]
        block = next((tuple(block) for block in blocks if block), None)
        return _with_scales(tensors, dtype, block, CompressedInt.kind)
    codes = tensors["weight" if "weight" in tensors else "weight_packed"]
    inputs, bits = codes.shape[1], 8
    if "weight_packed" in tensors:  # which of the schemes it is, the width of its words says
        inputs = int(tensors["weight_shape"][-1])
        bits = next((b for b in (4, 8) if codes.shape[1] == -(inputs * b // -32)), 0)
    # Groups are whole, so that the number of scales says how wide they are.
    group = (
        -(inputs // -tensors["weight_scale"].shape[-1]) if tensors["weight_scale"].ndim else None
    )
    return CompressedInt(tensors, dtype, bits=bits, group=group)


READERS: Mapping[str, Callable[[Tensors, Settings, torch.dtype], QuantizedWeight]] = {
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
}


def published_experts(
    name: str, stored: Tensors, how: Settings, dtype: torch.dtype
) -> list[QuantizedWeight] | None:
    """Return the experts of a stack that files keep whole, as `name` with an ending; None where
    they do not.

    Each is (out, in), also where the module keeps them as (in, out).
    """
    if (blocks := stored.get(f"{name}_blocks")) is not None:
        pairs = zip(blocks, stored[f"{name}_scales"], strict=True)
        return [MXFP4(*pair, dtype) for pair in pairs]
    codes, scales = stored.get(name), stored.get(f"{name}_scale_inv")
    if codes is None or scales is None or codes.dtype.itemsize > 1:
        return None
    block = how.get("weight_block_size")
    sizes = (block[0], block[1]) if block else None
    return [FP8(*each, dtype, block=sizes) for each in zip(codes, scales, strict=True)]
