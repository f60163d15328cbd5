"""Four bits a number in blocks, as QLoRA has it (Dettmers et al. 2023, section 3).

Each block of 64 numbers is divided by its largest magnitude and rounded to the 16 values of NF4;
the magnitudes, less their mean, are kept in 8 bits in blocks of 256. That is 4 + 8 / 64 +
32 / (64 · 256) = 4.127 bits a number. Codes, scales, dequantized values and the names in files are
bitsandbytes' own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from functools import cache
from typing import Any, Self

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from veneer.kernels.native import kernel
from veneer.quant.weight import QuantizedWeight

BLOCK, BLOCK_OF_SCALES = 64, 256
# Tokens up to which bitsandbytes may multiply with the codes on a card; beyond, it says itself, the
# dequantized weight is faster (backends/cuda/ops.py), of which we make a piece at a time.
FEW = 512
STATE = "weight.quant_state.bitsandbytes__"  # followed by the kind, nf4 or fp4


class NF4(QuantizedWeight):
    """A weight in 4-bit codes (bytes, 1) with bitsandbytes' state of scales, of either kind."""

    bits = 4

    def __init__(self, codes: Tensor, state: Any, dtype: torch.dtype) -> None:
        self.codes, self.state, self.dtype = codes, state, dtype
        self.kind = state.quant_type
        self.shape, self.device = torch.Size(state.shape), codes.device

    @classmethod
    def quantize(cls, weight: Tensor, dtype: torch.dtype) -> NF4:
        """Quantize a weight (out, in), to be dequantized to `dtype`."""
        codes, absmax = _codes_and_absmax(weight.contiguous())
        offset = absmax.mean()
        scales, state2 = bnb.quantize_blockwise(absmax - offset, blocksize=BLOCK_OF_SCALES)
        state = bnb.QuantState(
            absmax=scales,
            shape=weight.shape,
            code=_table(weight.device),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=weight.dtype,
            offset=offset,
            state2=state2,
        )
        return cls(codes, state, dtype)

    def requantized(self, weight: Tensor, dtype: torch.dtype) -> NF4:
        return self.quantize(weight, dtype)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> NF4:
        """Return the weight whose `tensors()` these are, without a copy of the codes."""
        entries = {name.removeprefix("weight."): t for name, t in tensors.items()}
        codes = entries.pop("weight")
        state = bnb.QuantState.from_dict(entries, device=codes.device)
        # Some files have the bytes as wider numbers, which FSDP needs.
        return cls(codes.view(torch.uint8).view(-1, 1), state, dtype)

    def product_of_few(self, x: Tensor) -> Tensor | None:
        state = self.state
        if x.device.type != "cuda" or len(x) > FEW or self.shape[1] % state.blocksize:
            return None
        if state.nested and state.state2.blocksize != BLOCK_OF_SCALES:
            return None
        if not hasattr(torch.ops.bitsandbytes, "gemm_4bit"):  # which 0.50 brought
            return None
        if self.before_use is not None:
            self.before_use()
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        """Return x Wᵀ by bitsandbytes, which on a card chooses by size whether its kernel reads
        the codes, or the weight is dequantized."""
        state = self.state
        nested: dict[str, Tensor] = {}
        if state.nested:
            nested = {
                "absmax_8bit": state.absmax,
                "absmax_code": state.state2.code,
                "absmax_offset": state.offset,
            }
        scales = state.state2.absmax if state.nested else state.absmax
        settings = (self.shape, scales, state.blocksize, state.quant_type)
        y: Tensor = torch.ops.bitsandbytes.gemm_4bit(x, self.codes, *settings, **nested)
        return y

    @property
    def _row_unit(self) -> int:
        state = self.state
        numbers = state.blocksize * (state.state2.blocksize if state.nested else 1)
        return numbers // math.gcd(numbers, self.shape[1])

    def _dequantize_rows(self, first: int, last: int) -> Tensor:
        state, block = self.state, self.state.blocksize
        begin, numbers = first * self.shape[1], (last - first) * self.shape[1]
        absmax = self._scales(begin // block, -(numbers // -block))
        # bitsandbytes' kernel for CPUs takes each row for whole blocks, and is wrong where rows are
        # shorter than one. Blocks go on from row to row, so it gets blocks as rows.
        whole = numbers % block == 0
        shape = (numbers // block, block) if whole else (1, numbers + numbers % 2)
        values = torch.ops.bitsandbytes.dequantize_4bit(
            _slice(self.codes, begin // 2, -(numbers // -2)),
            absmax,
            block,
            state.quant_type,
            shape,
            # For wider dtypes bitsandbytes' kernel for CPUs returns memory that it has not written.
            torch.float32 if self.dtype == torch.float64 else self.dtype,
        )
        return values.view(-1)[:numbers].view(last - first, self.shape[1]).to(self.dtype)

    def scales(self) -> Tensor:
        """Return the largest magnitude of each block of numbers, in float32."""
        return self._scales(0, -(self.shape.numel() // -self.state.blocksize))

    def _scales(self, first: int, count: int) -> Tensor:
        state = self.state
        absmax = _slice(state.absmax, first, count)
        if state.nested:
            wide = state.state2.blocksize
            scales = _slice(state.state2.absmax, first // wide, -(len(absmax) // -wide))
            absmax = torch.ops.bitsandbytes.dequantize_blockwise(
                absmax, scales, state.state2.code, wide, torch.float32
            )
            absmax += state.offset
        return absmax

    def tensors(self) -> dict[str, Tensor]:
        state = {f"weight.{name}": t for name, t in self.state.as_dict(packed=True).items()}
        # All weights here share one table; safetensors refuses shared memory.
        state["weight.quant_map"] = state["weight.quant_map"].clone()
        return {"weight": self.codes, **state}

    def to(self, device: torch.device) -> Self:
        if self.device == device:
            return self
        state = copy.copy(self.state)
        if state.nested:
            state.state2 = copy.copy(state.state2)
        state.to(device)
        return type(self)(self.codes.to(device), state, self.dtype)


def _codes_and_absmax(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes (bytes, 1) and the largest magnitude of each block, in float32."""
    if weight.dtype == torch.float16:  # exact, and there is a kernel for float32
        weight = weight.to(torch.float32)
    native = kernel("quantize_4bit", weight)
    if native is None:
        return torch.ops.bitsandbytes.quantize_4bit(weight, BLOCK, "nf4", torch.uint8)
    # On CPUs bitsandbytes searches the table for each number by itself: fifty times slower.
    numbers, table = weight.numel(), _table(weight.device)
    codes = torch.empty(-(numbers // -2), 1, dtype=torch.uint8)
    absmax = torch.empty(-(numbers // -BLOCK), dtype=torch.float32)
    native(weight, (table[:-1] + table[1:]) / 2, absmax, codes, numbers, BLOCK)
    return codes, absmax


@cache
def _table(device: torch.device) -> Tensor:
    return bnb.get_4bit_type("nf4", device=device)


def _slice(tensor: Tensor, first: int, count: int) -> Tensor:
    return tensor[first : first + count]
