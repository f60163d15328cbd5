"""MXFP4, as gpt-oss is published: 32 numbers of 4 bits (e2m1) with a power of two as their scale.

OCP Microscaling Formats, version 1.0. 4 + 8 / 32 = 4.25 bits a number. Names and values are
transformers' own (integrations/mxfp4.py).
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from veneer.kernels.published import by_rows
from veneer.quant.weight import QuantizedWeight

BLOCK = 32


class MXFP4(QuantizedWeight):
    """A weight (out, in) in `blocks` of codes (out, in / 32, 16) with exponents (out, in / 32)."""

    bits = 4
    kind = "mxfp4"
    published = True

    def __init__(self, blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> None:
        if blocks.shape != (*scales.shape, BLOCK // 2) or blocks.dtype != torch.uint8:
            raise ValueError(f"blocks {tuple(blocks.shape)} have scales {tuple(scales.shape)}")
        self.codes, self.scales, self.dtype = blocks, scales.view(torch.uint8), dtype
        self.shape = torch.Size((blocks.shape[0], blocks.shape[1] * BLOCK))
        self.device = blocks.device

    @property
    def _row_unit(self) -> int:
        return 1

    def _dequantize_rows(self, first: int, last: int) -> Tensor:
        codes, scales = self.codes[first:last].flatten(1), self.scales[first:last]
        return by_rows("e2m1", codes, scales, cols=self.shape[1], group=BLOCK, dtype=self.dtype)

    def tensors(self) -> dict[str, Tensor]:
        return {"blocks": self.codes, "scales": self.scales}

    def to(self, device: torch.device) -> Self:
        if self.device == device:
            return self
        return type(self)(self.codes.to(device), self.scales.to(device), self.dtype)
