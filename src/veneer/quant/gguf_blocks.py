"""Frozen weights in the blocks of a GGUF file, just as they lie there: nothing is rounded again."""

from __future__ import annotations

from typing import Self

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from veneer.kernels.native import kernel
from veneer.quant.gguf_formulas import FORMULAS
from veneer.quant.weight import QuantizedWeight


class GGUFBlocks(QuantizedWeight):
    """A weight in the codes (rows in the file, bytes) of a GGUF format: Q4_K, Q8_0, ...

    order: the file's row for each row of the weight, (out,) in int64, where they are not the same.
    Each row is whole blocks, so that rows are taken in any order from where they lie.
    """

    published = True

    def __init__(
        self, kind: str, codes: Tensor, dtype: torch.dtype, *, order: Tensor | None = None
    ) -> None:
        numbers, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        self.kind, self.codes, self.order, self.dtype = kind, codes, order, dtype
        self.bits = int(kind.lstrip("IQ")[0])
        out = len(codes if order is None else order)
        self.shape, self.device = torch.Size((out, codes.shape[1] // size * numbers)), codes.device

    @property
    def label(self) -> str:
        return self.kind

    @property
    def _row_unit(self) -> int:
        return 1

    def _dequantize_rows(self, first: int, last: int) -> Tensor:
        if self.order is None:
            return self._numbers(self.codes[first:last], None)
        return self._numbers(self.codes, self.order[first:last])

    def rows(self, index: Tensor) -> Tensor:
        """Return some rows of the weight, (rows, in), in `dtype`; index (rows,) in int64."""
        index = index if self.order is None else self.order[index]
        return self._numbers(self.codes, index.contiguous())

    def _numbers(self, codes: Tensor, order: Tensor | None) -> Tensor:
        rows = len(codes if order is None else order)
        values = torch.empty(rows, self.shape[1], dtype=self.dtype, device=self.device)
        native = kernel(self.kind, values, source="gguf")
        if native is not None:
            native(codes, order, values, *values.shape)
            return values
        codes = codes if order is None else codes[order]
        _, size = GGML_QUANT_SIZES[GGMLQuantizationType[self.kind]]
        return values.copy_(FORMULAS[self.kind](codes.reshape(-1, size)).view(values.shape))

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.codes}

    def to(self, device: torch.device) -> Self:
        if self.device == device:
            return self
        order = None if self.order is None else self.order.to(device)
        return type(self)(self.kind, self.codes.to(device), self.dtype, order=order)
