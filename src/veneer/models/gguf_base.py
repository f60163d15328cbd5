"""Bases whose linear layers and experts stay in the blocks of their GGUF file, which is mapped."""

from __future__ import annotations

from pathlib import Path

import gguf
import torch
from transformers import PreTrainedModel
from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS
from transformers.pytorch_utils import Conv1D

from veneer.models.assemble import AnyWeight, assemble
from veneer.models.fingerprint import Marks
from veneer.models.gguf_header import read_header
from veneer.models.gguf_tensors import GGUFTensors
from veneer.models.placement import AS_THEY_ARE, Placement
from veneer.models.quantize import quantizable, quantizable_stacks
from veneer.models.source import untied
from veneer.quant.gguf_formulas import FORMULAS
from veneer.quant.stack import QuantizedStack, quantized_weights
from veneer.quant.weight import QuantizedWeight


def kinds_of(path: Path) -> list[str]:
    """Return the formats of blocks in a GGUF file: Q4_K, Q6_K, ..."""
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(str(path)).tensors}
    return sorted(kinds & FORMULAS.keys())


def block_bits(path: Path) -> float | None:
    """Return the bits a number, scales included, of the weights that stay in a GGUF file's blocks,
    by its header. None where none does."""
    header = read_header(path)
    if header.values.get("general.architecture") in GGUF_ARCHS:
        return None
    ends = ("token_embd.weight", "output.weight")
    inside = [(n, size) for name, (n, size) in header.sizes.items() if name not in ends]
    blocks = [(n, size) for n, size in inside if size < 2 * n]
    numbers = sum(n for n, _ in blocks)
    return 8 * sum(size for _, size in blocks) / numbers if blocks else None


def load_blocks(
    path: Path,
    skeleton: PreTrainedModel,
    dtype: torch.dtype,
    *,
    to: Placement = AS_THEY_ARE,
) -> PreTrainedModel | None:
    """Return the model of a GGUF file with its linear layers and experts in the file's blocks.

    All else is dense, also the embedding and the head. The blocks stay in the file unless they go
    to an accelerator. With a world of several processes, each has its shards in memory. None where
    no layer's blocks can stay: the file has none, or its tensors are not the model's weights one by
    one.
    """
    tensors, names = GGUFTensors(path, skeleton), untied(skeleton)
    # These architectures transformers reads in a way of its own.
    if tensors.architecture in GGUF_ARCHS or not set(names) <= tensors.names:
        return None
    layers, stacks = quantizable(skeleton), quantizable_stacks(skeleton)
    marks = Marks(skeleton)
    file = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)

    def weight_of(name: str) -> AnyWeight:
        owner, _, leaf = name.rpartition(".")
        weight: QuantizedWeight | QuantizedStack | None = None
        transposed = isinstance(layers.get(owner), Conv1D)
        if name in stacks:
            weight = tensors.experts_in_blocks(name, file, dtype)
        elif leaf == "weight":
            weight = tensors.in_blocks(name, file, dtype, transposed=transposed)
        if isinstance(weight, QuantizedStack):
            for e in range(len(weight)):
                marks.see(name, weight.expert(e), expert=e)
            return weight
        if weight is not None:
            marks.see(name, weight, transposed=transposed)
            # The embedding and the head: less time and memory than as float32 in between.
            return weight if owner in layers else weight.dequantize()
        dense = tensors.read(name)
        marks.see(name, dense)
        return dense

    weights = ((name, weight_of(name)) for name in names)
    model = assemble(skeleton, weights, dtype, to=to)
    if not quantized_weights(model):
        return None
    model.veneer_marks = marks.fingerprint()  # type: ignore[assignment]
    return model
