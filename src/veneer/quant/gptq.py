"""GPTQ (Frantar et al. 2022) as gptqmodel stores it: 4 or 8 bits, scales by groups of inputs.

w = (code − zero) · scale. The codes of inputs side by side are in one word of 32 bits, and so are
the zero points of outputs side by side. In the older files (`checkpoint_format: gptq`) these are
less one; gptqmodel adds the ones to whole words, with their carries, and so it is done here.
`g_idx` is the group of each input: with `desc_act` groups are of inputs that lie apart.
"""

from __future__ import annotations

from typing import Literal, Self, cast

import torch
from torch import Tensor

from veneer.kernels.published import by_columns, unpacked
from veneer.quant.weight import QuantizedWeight

ONES = {4: 0x11111111, 8: 0x01010101}  # 1 for each code of a word


class GPTQ(QuantizedWeight):
    """A weight (out, in) in words (in · bits / 32, out), with scales (groups, out).

    zeros (groups, out · bits / 32): as stored. older: these are less one. group: the inputs of a
    group that lie side by side, where there is no `group_of` (in,).
    """

    kind = "gptq"
    published = True
    bits: Literal[4, 8]

    def __init__(
        self,
        words: Tensor,
        zeros: Tensor,
        scales: Tensor,
        dtype: torch.dtype,
        *,
        inputs: int,
        group: int,
        group_of: Tensor | None = None,
        older: bool = True,
    ) -> None:
        bits = words.shape[0] * 32 // inputs
        if bits not in ONES or words.shape[0] * 32 != bits * inputs:
            raise ValueError(
                f"its codes are of {words.shape[0] * 32 / inputs:.3g} bits, not 4 or 8"
            )
        self.bits = cast(Literal[4, 8], bits)
        self.words, self.zeros, self.scales, self.dtype = words, zeros, scales, dtype
        self.group_of, self.older = group_of, older
        out = words.shape[1]
        self.shape, self.device = torch.Size((out, inputs)), words.device
        self.group = inputs if group <= 0 else group
        groups = len(scales)
        needed = groups if group_of is not None else -(inputs // -self.group)
        if scales.shape != (needed, out) or zeros.shape != (needed, -(out * bits // -32)):
            raise ValueError(
                f"scales are {tuple(scales.shape)} and zero points {tuple(zeros.shape)} for "
                f"{tuple(self.shape)} numbers"
            )
        if group_of is not None and not bool(((group_of >= 0) & (group_of < groups)).all()):
            raise ValueError(f"its g_idx names other groups than 0 to {groups - 1}")
        # Whether groups are simply inputs side by side, which is computed faster.
        in_turn = torch.arange(inputs, device=words.device) // self.group
        is_in_turn = group_of is not None and bool((group_of == in_turn).all())
        apart = None if is_in_turn or group_of is None else group_of
        self._groups_apart = None if apart is None else apart.to(torch.int32)

    @property
    def _row_unit(self) -> int:
        return 32 // self.bits

    def _dequantize_rows(self, first: int, last: int) -> Tensor:
        unit = self._row_unit
        zeros = self.zeros[:, first // unit : -(last // -unit)]
        zeros = unpacked(zeros + ONES[self.bits] if self.older else zeros, self.bits)
        return by_columns(
            self.bits,
            self.words[:, first:last],
            self.scales[:, first:last],
            zeros[:, : last - first].to(torch.float32).contiguous(),
            group=self.group,
            group_of=self._groups_apart,
            dtype=self.dtype,
        )

    def tensors(self) -> dict[str, Tensor]:
        stored = {"qweight": self.words, "qzeros": self.zeros, "scales": self.scales}
        return stored if self.group_of is None else stored | {"g_idx": self.group_of}

    def to(self, device: torch.device) -> Self:
        if self.device == device:
            return self
        words, zeros, scales = (x.to(device) for x in (self.words, self.zeros, self.scales))
        return type(self)(
            words,
            zeros,
            scales,
            self.dtype,
            inputs=self.shape[1],
            group=self.group,
            group_of=None if self.group_of is None else self.group_of.to(device),
            older=self.older,
        )
