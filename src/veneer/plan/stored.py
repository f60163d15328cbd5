"""How the files of a base keep its weights quantized, in bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from veneer.models.load import bits_of_blocks
from veneer.quant.settings import Bits, quantization_of


@dataclass(frozen=True)
class Stored:
    """What stays as it is in the files, which are mapped.

    bits: what the format is called by. head: whether the head is quantized too. format: a published
    format's name, "" for bitsandbytes' (NF4, 8 bits). bits_a_number: of a published format, with
    scales and all. experts_alone: whether nothing but experts is quantized. rest_mapped: whether
    what is dense is mapped too where a run computes in bfloat16, and not cast into memory.
    """

    bits: Bits
    head: bool = False
    format: str = ""
    bits_a_number: float = 0.0
    experts_alone: bool = False
    rest_mapped: bool = True


def stored_of(name: str | Path, config: PretrainedConfig) -> Stored | None:
    """Return how the files of the base `name` are quantized, or None where they are dense.

    Raises ModelError for what cannot be read here.
    """
    settings = config.to_dict()
    quantization = quantization_of(settings)
    if quantization is None:
        return _in_gguf(name)
    bits, head = quantization.bits, quantization.head
    if not quantization.is_published:
        return Stored(bits, head)
    method, how = quantization.method, settings["quantization_config"]
    return Stored(
        bits,
        head,
        method,
        _bits(method, bits, how),
        experts_alone=method == "mxfp4",
        # gpt-oss' config.json names no dtype: what is dense there is in bfloat16.
        rest_mapped="bfloat16" in str(settings.get("dtype") or torch.bfloat16),
    )


def _in_gguf(name: str | Path) -> Stored | None:
    bits = bits_of_blocks(name)
    if bits is None:
        return None
    return Stored(4 if bits < 6 else 8, format="GGUF", bits_a_number=bits, rest_mapped=False)


def _bits(method: str, bits: int, how: Mapping[str, Any]) -> float:
    """Return the bits of a number with its share of scales and zeros: a scale of 8 bits for 32 in
    MXFP4, one of 32 bits a block in FP8, one of 16 bits and a zero a group elsewhere."""
    if method == "mxfp4":
        return 4 + 8 / 32
    if method in ("fp8", "fbgemm_fp8"):
        block = how.get("weight_block_size")
        return 8 + 32 / (block[0] * block[1]) if block else 8.0
    if method == "compressed-tensors":
        schemes = (group["weights"] for group in how["config_groups"].values())
        groups = [scheme.get("group_size") for scheme in schemes]
        group, zero = next((size for size in groups if size and size > 0), None), 0
    else:
        group, zero = how.get("group_size", 128), bits
    return bits + (16 + zero) / group if group and group > 0 else float(bits)
