"""AWQ (Lin et al. 2023) as AutoAWQ stores it ("gemm"): 4 bits, scales by groups of inputs.

w = (code − zero) · scale. The codes of eight outputs are in one word of 32 bits, in the order 0, 2,
4, 6, 1, 3, 5, 7, and so are their zero points.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from veneer.kernels.published import in_order, interleaved, unpacked
from veneer.quant.weight import QuantizedWeight


class AWQ(QuantizedWeight):
    """A weight (out, in) in words (in, out / 8), with scales (groups, out).

    zeros (groups, out / 8): as stored. group: inputs that share a scale.
    """

    bits = 4
    kind = "awq"
    published = True

    def __init__(
        self, words: Tensor, zeros: Tensor, scales: Tensor, dtype: torch.dtype, *, group: int
    ) -> None:
        inputs, out = words.shape[0], words.shape[1] * 8
        self.words, self.zeros, self.scales, self.dtype = words, zeros, scales, dtype
        self.shape, self.device = torch.Size((out, inputs)), words.device
        self.group = inputs if group <= 0 else group
        groups = -(inputs // -self.group)
        if scales.shape != (groups, out) or zeros.shape != (groups, out // 8):
            raise ValueError(
                f"scales are {tuple(scales.shape)} and zero points {tuple(zeros.shape)} for "
                f"{tuple(self.shape)} numbers"
            )

    @property
    def _row_unit(self) -> int:
        return 8

    def _dequantize_rows(self, first: int, last: int) -> Tensor:
        rows = slice(first // 8, last // 8)
        zeros = in_order(unpacked(self.zeros[:, rows], 4)).to(torch.float32)
        words, scales = self.words[:, rows], self.scales[:, first:last]
        return interleaved(words, scales, zeros, group=self.group, dtype=self.dtype)

    def tensors(self) -> dict[str, Tensor]:
        return {"qweight": self.words, "qzeros": self.zeros, "scales": self.scales}

    def to(self, device: torch.device) -> Self:
        if self.device == device:
            return self
        words, zeros, scales = (x.to(device) for x in (self.words, self.zeros, self.scales))
        return type(self)(words, zeros, scales, self.dtype, group=self.group)
