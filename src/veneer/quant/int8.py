"""Eight bits a number, one scale a row, as LLM.int8() keeps weights (Dettmers et al. 2022).

Only the weight is quantized: the inputs stay as they are. Codes, scales and the names in files are
bitsandbytes' own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from veneer.kernels.native import kernel
from veneer.quant.weight import QuantizedWeight


class Int8(QuantizedWeight):
    """A weight in codes (out, in) of -127 to 127 with each row's largest magnitude (out,)."""

    bits = 8
    kind = "int8"

    def __init__(self, codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> None:
        self.codes, self.absmax, self.dtype = codes, absmax, dtype
        self.shape, self.device = codes.shape, codes.device

    @classmethod
    def quantize(cls, weight: Tensor, dtype: torch.dtype) -> Int8:
        """Quantize a weight (out, in), to be dequantized to `dtype`.

        Raises ValueError for numbers beyond 65,504.
        """
        # By way of float16, as bitsandbytes' Int8Params does.
        half = weight.to(torch.float16).contiguous()
        if not bool(torch.isfinite(half).all()):
            raise ValueError("some numbers are too large for 8 bits by way of float16")
        codes, absmax, _ = bnb.int8_vectorwise_quant(half)
        return cls(codes, absmax, dtype)

    def requantized(self, weight: Tensor, dtype: torch.dtype) -> Int8:
        return self.quantize(weight, dtype)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Int8:
        """Return the weight whose `tensors()` these are, without a copy of the codes.

        Raises ValueError for other kinds of numbers.
        """
        codes, absmax = tensors["weight"], tensors["SCB"]
        if (codes.dtype, absmax.dtype) != (torch.int8, torch.float32) or len(codes) != len(absmax):
            raise ValueError(f"8-bit codes are {codes.dtype}, their scales {absmax.dtype}")
        if int(tensors.get("weight_format", torch.tensor(0))) != 0:
            raise ValueError("only codes in rows are known")
        return cls(codes, absmax, dtype)

    @property
    def _row_unit(self) -> int:
        return 1

    def rows(self, index: Tensor) -> Tensor:
        return self._dequantize(self.codes[index], self.absmax[index])

    def _dequantize_rows(self, first: int, last: int) -> Tensor:
        return self._dequantize(self.codes[first:last], self.absmax[first:last])

    def _dequantize(self, codes: Tensor, absmax: Tensor) -> Tensor:
        values = torch.empty(codes.shape, dtype=self.dtype, device=self.device)
        native = kernel("dequantize_int8", values)
        if native is None:
            return torch.ops.bitsandbytes.int8_vectorwise_dequant(codes, absmax).to(self.dtype)
        native(codes, absmax, values, *codes.shape)
        return values

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.codes, "SCB": self.absmax}

    def to(self, device: torch.device) -> Self:
        if self.device == device:
            return self
        return type(self)(self.codes.to(device), self.absmax.to(device), self.dtype)
