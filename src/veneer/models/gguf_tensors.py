"""The weights of a GGUF file by the names of a model: dense, or in the blocks that they lie in.

transformers maps the names and undoes what llama.cpp's converter does to each architecture's
tensors: it orders the rows of q and k in another way, adds 1 to a norm, keeps gate and up of
experts apart.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)

from veneer.models.gguf import check_consistent, field_of, unreadable
from veneer.models.gguf_header import check_header
from veneer.quant.gguf_blocks import GGUFBlocks
from veneer.quant.gguf_formulas import FORMULAS
from veneer.quant.joined import joined
from veneer.quant.stack import QuantizedStack
from veneer.quant.weight import QuantizedWeight

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
            if name := self._name_of(tensor.name):
                self._tensors[name].append(tensor)

    def _name_of(self, tensor: str) -> str | None:
        """Return the weight that a tensor is, or a part of: gate and up of experts are apart."""
        experts = getattr(self._processor, "GGUF_MOE_WEIGHTS_PATTERN", None)
        if experts and "name" in experts.groupindex and (match := experts.fullmatch(tensor)):
            tensor = match["name"]
        return self._names.get(tensor)

    @property
    def names(self) -> set[str]:
        """The names of the weights that the file has."""
        return set(self._tensors)

    def names_in_blocks(self) -> frozenset[str]:
        """Return the names of the weights that are in blocks in the file."""
        kinds = {name: tensors[0].tensor_type.name for name, tensors in self._tensors.items()}
        return frozenset(name for name, kind in kinds.items() if kind in FORMULAS)

    def read(self, name: str) -> Tensor:
        """Return a weight as the model keeps it, in float32."""
        return self._processed(name, lambda t: gguf.dequantize(t.data, t.tensor_type))

    def in_blocks(
        self, name: str, file: Tensor, dtype: torch.dtype, *, transposed: bool = False
    ) -> QuantizedWeight | None:
        """Return the weight of a linear layer as it lies in `file`, the bytes of the whole file.

        transposed: the model keeps it as (in, out). None where a format is none of `FORMULAS`, or
        the weight's rows are not rows of the file in some order.
        """
        origin = self._origin(name, transposed=transposed)
        if origin is None or origin.ndim != 1:
            return None
        return self._rows(name, origin, file, dtype)

    def experts_in_blocks(
        self, name: str, file: Tensor, dtype: torch.dtype
    ) -> QuantizedStack | None:
        """Return a stack of experts as it lies in `file`; None as above."""
        origin = self._origin(name)
        if origin is None or origin.ndim != 2:
            return None
        return QuantizedStack([self._rows(name, rows, file, dtype) for rows in origin])

    def _origin(self, name: str, *, transposed: bool = False) -> Tensor | None:
        """Return which row of the weight's tensors each of its rows is, (out,) or (experts, out).

        Rows are numbered through all of these tensors. None where that is not all that
        transformers does: it is found by numbers that say where they are.
        """
        tensors = self._tensors[name]
        if self._reader.byte_order != "I" or any(_kind(t) not in FORMULAS for t in tensors):
            return None
        ends = list(accumulate(map(_rows, tensors)))
        first = {t.name: end - _rows(t) for t, end in zip(tensors, ends, strict=True)}

        def numbers(tensor: gguf.ReaderTensor) -> np.ndarray:
            begin = first[tensor.name] * PROBE + 1  # 0 is what transformers has not written to
            own = np.arange(begin, begin + _rows(tensor) * PROBE, dtype=np.int64)
            return own.reshape(*tensor.data.shape[:-1], PROBE)

        try:
            there = self._processed(name, numbers)
        except Exception:  # it may be made for one number of columns only
            return None
        there = there.T if transposed else there
        origin = (there[..., 0] - 1) // PROBE
        every_row = torch.arange(ends[-1])
        if (
            there.shape != (*origin.shape, PROBE)
            or not torch.equal(there, origin[..., None] * PROBE + 1 + torch.arange(PROBE))
            or not torch.equal(origin.flatten().sort().values, every_row)
        ):
            return None
        return origin

    def _rows(self, name: str, origin: Tensor, file: Tensor, dtype: torch.dtype) -> QuantizedWeight:
        """Return the weight whose rows are `origin`, (out,)."""
        pieces: list[QuantizedWeight] = []
        tensors = self._tensors[name]
        ends = torch.tensor(list(accumulate(map(_rows, tensors))))
        which = torch.bucketize(origin, ends, right=True)
        for rows in torch.arange(len(origin)).tensor_split((which.diff() != 0).nonzero()[:, 0] + 1):
            tensor = tensors[int(which[rows[0]])]
            order = origin[rows] - (ends[which[rows[0]]] - _rows(tensor))
            codes = file[tensor.data_offset : tensor.data_offset + tensor.n_bytes]
            codes, begin = codes.view(_rows(tensor), -1), int(order[0])
            if torch.equal(order, torch.arange(begin, begin + len(order))):
                blocks = GGUFBlocks(_kind(tensor), codes[begin : begin + len(order)], dtype)
            else:
                blocks = GGUFBlocks(_kind(tensor), codes, dtype, order=order)
            pieces.append(blocks)
        return joined(pieces)

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


def _kind(tensor: gguf.ReaderTensor) -> str:
    return tensor.tensor_type.name


def _rows(tensor: gguf.ReaderTensor) -> int:
    return math.prod(tensor.data.shape[:-1])
