"""Bases whose linear layers stay in the blocks of their GGUF file, which is mapped, not read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS
from transformers.pytorch_utils import Conv1D

from veneer.models.assemble import assemble
from veneer.models.fingerprint import Marks
from veneer.models.gguf_tensors import GGUFTensors
from veneer.models.quantize import quantizable
from veneer.models.source import untied
from veneer.quant.gguf_formulas import FORMULAS
from veneer.quant.weight import QuantizedWeight, quantized_layers


def kinds_of(path: Path) -> list[str]:
    """Return the formats of blocks in a GGUF file: Q4_K, Q6_K, ..."""
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(str(path)).tensors}
    return sorted(kinds & FORMULAS.keys())


def load_blocks(
    path: Path, skeleton: PreTrainedModel, dtype: torch.dtype
) -> PreTrainedModel | None:
    """Return the model of a GGUF file with its linear layers in the file's blocks.

    All else is dense, also the embedding and the head. None where no layer's blocks can stay: the
    file has none, or its tensors are not the model's weights one by one.
    """
    tensors, names = GGUFTensors(path, skeleton), untied(skeleton)
    # These architectures transformers reads in a way of its own.
    if tensors.architecture in GGUF_ARCHS or not set(names) <= tensors.names:
        return None
    layers, marks = quantizable(skeleton), Marks(skeleton)
    file = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)

    def weights() -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
        for name in names:
            owner, _, leaf = name.rpartition(".")
            layer, weight = layers.get(owner), None
            if layer is not None and leaf == "weight":
                weight = tensors.in_blocks(name, layer, dtype, file)
            if weight is not None:
                marks.see(name, weight, transposed=isinstance(layer, Conv1D))
                yield name, weight
            else:
                dense = tensors.read(name)
                marks.see(name, dense)
                yield name, dense

    model = assemble(skeleton, weights(), dtype)
    if not quantized_layers(model):
        return None
    model.veneer_marks = marks.fingerprint()  # type: ignore[assignment]
    return model
