"""FP8: eight bits a number as e4m3, with a float32 scale for each block, row or tensor.

DeepSeek-V3 and Qwen3-FP8 have blocks of 128 × 128 (`weight_scale_inv`, which in spite of its name
is what the codes are multiplied with), FBGEMM and compressed-tensors rows or whole tensors
(`weight_scale`). Values are transformers' own (integrations/finegrained_fp8.py).
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from veneer.kernels.published import by_rows, halves_of_powers
from veneer.quant.weight import QuantizedWeight

SCALES = ("weight_scale_inv", "weight_scale")


class FP8(QuantizedWeight):
    """A weight in e4m3 codes (out, in).

    block: the rows and columns of a scale; each dimension of a grid of scales (rows, columns) with
    one entry is for all of them. name: of the scales in files.
    """

    bits = 8
    published = True

    def __init__(
        self,
        codes: Tensor,
        scales: Tensor,
        dtype: torch.dtype,
        *,
        block: tuple[int, int] | None = None,
        name: str = SCALES[0],
        kind: str = "fp8",
    ) -> None:
        if codes.dtype != torch.float8_e4m3fn or codes.ndim != 2:
            raise ValueError(f"FP8 codes are {codes.dtype} of shape {tuple(codes.shape)}")
        self.codes, self.scales, self.name, self.kind = codes, scales, name, kind
        self.shape, self.device, self.dtype, self.block = codes.shape, codes.device, dtype, block
        rows, cols = self.grid.shape
        self._rows, self._cols = codes.shape if block is None else block
        self._rows = 1 if rows == codes.shape[0] else self._rows
        self._cols = codes.shape[1] if cols == 1 else self._cols
        needed = (
            1 if rows == 1 else -(codes.shape[0] // -self._rows),
            -(self.shape[1] // -self._cols),
        )
        if (rows, cols) != needed:
            raise ValueError(f"there are {rows} × {cols} scales for {tuple(self.shape)} numbers")

    @property
    def grid(self) -> Tensor:
        """The scales as (rows, columns)."""
        if self.scales.numel() == 1:
            return self.scales.reshape(1, 1)
        return self.scales if self.scales.ndim == 2 else self.scales.reshape(-1, 1)

    @property
    def _row_unit(self) -> int:
        return 1 if len(self.grid) == 1 else self._rows

    def _dequantize_rows(self, first: int, last: int) -> Tensor:
        grid, rows = self.grid, max(1, last - first)
        if len(grid) > 1:
            rows = self._rows
            grid = grid[first // rows : -(last // -rows)]
        # Some files have exponents of two as bytes.
        scales = 2 * halves_of_powers(grid) if grid.dtype == torch.uint8 else grid.to(torch.float32)
        return by_rows(
            "e4m3",
            self.codes[first:last],
            scales,
            cols=self.shape[1],
            group=self._cols,
            row_block=rows,
            dtype=self.dtype,
        )

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.codes, self.name: self.scales}

    def to(self, device: torch.device) -> Self:
        if self.device == device:
            return self
        return type(self)(
            self.codes.to(device),
            self.scales.to(device),
            self.dtype,
            block=self.block,
            name=self.name,
            kind=self.kind,
        )
