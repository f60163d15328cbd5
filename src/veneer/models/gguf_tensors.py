"""The weights of a GGUF file by the names of a model: dense, or in the blocks that they lie in.

transformers maps the names and undoes what llama.cpp's converter does to each architecture's
tensors: it orders the rows of q and k in another way, adds 1 to a norm, keeps gate and up of
experts apart.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)
from transformers.pytorch_utils import Conv1D

from veneer.models.gguf import check_consistent, field_of, unreadable
from veneer.models.gguf_header import check_header
from veneer.quant.gguf_blocks import GGUFBlocks
from veneer.quant.gguf_formulas import FORMULAS

PROBE = 8  # columns of the numbers that tell what transformers does to a tensor's rows


class GGUFTensors:
    """A GGUF file's tensors by the names of `skeleton`'s weights. Raises ModelError for damage."""

    def __init__(self, path: Path, skeleton: PreTrainedModel) -> None:
        check_header(path)
        try:
            check_consistent(path)
            self._parsed: dict[str, Any] = load_gguf_checkpoint(str(path))
            self.architecture = str(field_of(path, "general.architecture"))
            processor = TENSOR_PROCESSORS.get(self.architecture, TensorProcessor)
            self._processor: Any = processor(config=self._parsed["config"])
            self._names = get_gguf_hf_weights_map(skeleton, self._processor)
            self._reader = gguf.GGUFReader(str(path))
        except Exception as error:
            raise unreadable(path, error) from error
        self._tensors: dict[str, list[gguf.ReaderTensor]] = defaultdict(list)
        for tensor in self._reader.tensors:
            if name := self._names.get(tensor.name):
                self._tensors[name].append(tensor)

    @property
    def names(self) -> set[str]:
        """The names of the weights that the file has."""
        return set(self._tensors)

    def read(self, name: str) -> Tensor:
        """Return a weight as the model keeps it, in float32."""
        return self._processed(name, lambda t: gguf.dequantize(t.data, t.tensor_type))

    def in_blocks(
        self, name: str, layer: nn.Module, dtype: torch.dtype, file: Tensor
    ) -> GGUFBlocks | None:
        """Return the weight of a linear layer as it lies in `file`, the bytes of the whole file.

        None where its format is not one of those, or its rows are not the model's in another order.
        """
        (tensor,) = self._tensors[name]
        kind = tensor.tensor_type.name
        if kind not in FORMULAS or self._reader.byte_order != "I":
            return None
        rows = len(tensor.data)
        own = np.arange(rows * PROBE, dtype=np.int64).reshape(rows, PROBE)
        try:
            there = self._processed(name, lambda _: own)
        except Exception:  # it may be made for one number of columns only
            return None
        there = there.T if isinstance(layer, Conv1D) else there
        if there.shape != own.shape:
            return None
        order = there[:, 0] // PROBE
        if not torch.equal(torch.from_numpy(own)[order], there) or len(order.unique()) != rows:
            return None
        codes = file[tensor.data_offset : tensor.data_offset + tensor.n_bytes].view(rows, -1)
        is_own = torch.equal(order, torch.arange(rows))
        return GGUFBlocks(kind, codes, dtype, order=None if is_own else order)

    def _processed(self, name: str, numbers: Callable[[gguf.ReaderTensor], np.ndarray]) -> Tensor:
        """Return what transformers makes of `numbers` of each of a weight's tensors."""
        parsed = {**self._parsed, "tensors": {}}
        for tensor in self._tensors[name]:
            done = self._processor.process(
                weights=numbers(tensor),
                name=tensor.name,
                tensor_key_mapping=self._names,
                parsed_parameters=parsed,
            )
            parsed["tensors"].setdefault(name, torch.from_numpy(np.array(done.weights)))
        weight: Tensor = parsed["tensors"][name]
        return weight
