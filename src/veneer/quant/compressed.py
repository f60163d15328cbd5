"""The integers of compressed-tensors: 4 or 8 bits, with scales by groups, rows or for a tensor.

w = (code − zero) · scale. "pack-quantized" files have codes plus 8 (or 128) in words of 32 bits,
the codes of inputs side by side, and so the zero points of outputs side by side; "int-quantized"
files have bytes. FP8 of compressed-tensors is in quant/fp8.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self, cast

import torch
from torch import Tensor

from veneer.kernels.published import Code, by_rows, unpacked
from veneer.quant.weight import QuantizedWeight


class CompressedInt(QuantizedWeight):
    """A weight (out, in) of `tensors`, by their names in files.

    bits: of a code. group: the inputs of a scale, for scales (out, groups); else a scale is for a
    row (out, 1) or for the whole tensor (1,).
    """

    kind = "compressed-tensors"
    published = True

    def __init__(
        self, tensors: Mapping[str, Tensor], dtype: torch.dtype, *, bits: int, group: int | None
    ) -> None:
        if bits not in (4, 8):
            raise ValueError(f"its codes are of {bits} bits, not 4 or 8")
        self.bits = cast(Literal[4, 8], bits)
        self.dtype, self.group, self._tensors = dtype, group, dict(tensors)
        self._packed = "weight_packed" in tensors
        self.codes = tensors["weight_packed" if self._packed else "weight"]
        self.device = self.codes.device
        inputs = int(tensors["weight_shape"][-1]) if self._packed else self.codes.shape[1]
        self.shape = torch.Size((self.codes.shape[0], inputs))
        out, scales = self.shape[0], tensors["weight_scale"]
        self.scales = scales.reshape(1, 1) if scales.numel() == 1 else scales.reshape(out, -1)
        self._group = inputs if self.scales.shape[1] == 1 else group or 0
        width = -(inputs * bits // -32) if self._packed else inputs
        if self.codes.shape[1] != width or self.codes.dtype != self._dtype_of_codes:
            raise ValueError(f"its codes are {tuple(self.codes.shape)} of {self.codes.dtype}")
        if not self._group or self.scales.shape[1] != -(inputs // -self._group):
            raise ValueError(f"scales are {tuple(scales.shape)} for {tuple(self.shape)} numbers")
        group_of, groups = tensors.get("weight_g_idx"), self.scales.shape[1]
        # −1 for each input says that groups are side by side.
        apart = None if group_of is None or bool((group_of < 0).any()) else group_of
        if apart is not None and int(apart.max()) >= groups:
            raise ValueError(f"its g_idx names other groups than 0 to {groups - 1}")
        self._group_of = None if apart is None else apart.to(torch.int32)

    @property
    def label(self) -> str:
        return self.kind

    @property
    def _dtype_of_codes(self) -> torch.dtype:
        return torch.int32 if self._packed else torch.int8

    @property
    def _row_unit(self) -> int:
        return 32 // self.bits if self._packed else 1

    def _dequantize_rows(self, first: int, last: int) -> Tensor:
        code: Code = "int8"
        codes, zeros = self.codes[first:last], self._zeros(first, last)
        if self._packed:
            code = "uint4" if self.bits == 4 else "uint8"
            codes = codes.view(torch.uint8)
        whole = len(self.scales) == 1
        return by_rows(
            code,
            codes,
            self.scales if whole else self.scales[first:last],
            zeros,
            cols=self.shape[1],
            group=self._group,
            row_block=max(1, last - first) if whole else 1,
            group_of=self._group_of,
            dtype=self.dtype,
        )

    def _zeros(self, first: int, last: int) -> Tensor | float:
        """Return the zero points of some rows (rows, groups), or that of all."""
        zeros = self._tensors.get("weight_zero_point")
        if zeros is None:
            return float(2 ** (self.bits - 1)) if self._packed else 0.0
        if self._packed:
            unit = self._row_unit
            words = zeros[first // unit : -(last // -unit)]
            return unpacked(words.T, self.bits).T[: last - first].to(torch.float32).contiguous()
        if zeros.numel() == 1:
            return float(zeros)
        return zeros.reshape(self.shape[0], -1)[first:last].to(torch.float32)

    def tensors(self) -> dict[str, Tensor]:
        return dict(self._tensors)

    def to(self, device: torch.device) -> Self:
        if self.device == device:
            return self
        moved = {name: tensor.to(device) for name, tensor in self._tensors.items()}
        return type(self)(moved, self.dtype, bits=self.bits, group=self.group)
