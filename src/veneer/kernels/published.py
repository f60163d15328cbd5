"""Weights in published formats as numbers: (code − zero) · scale, in float32 until it is stored.

The formulas in torch are here; published.cpp has them in one pass.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from veneer.kernels.native import kernel, strided

Code = Literal["uint4", "uint8", "int8", "e4m3", "e2m1"]
HALVES = ("uint4", "e2m1")  # the codes of 4 bits
# Twice the values of OCP's FP4 (e2m1), whose fourth bit is the sign. Half of 2^128, the largest
# scale, is a number of float32, and that itself is none.
TWICE_E2M1 = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the rows of the codes in a word, the lowest bits first


def by_rows(
    code: Code,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | float = 0.0,
    *,
    cols: int,
    group: int,
    dtype: torch.dtype,
    row_block: int = 1,
    group_of: Tensor | None = None,
) -> Tensor:
    """Return a weight (rows, cols) in `dtype` of codes that lie row by row.

    codes (rows, bytes): of two codes in a byte the lower half is first. scales, zeros
    (⌈rows / row_block⌉, groups): each for `group` columns, or for those that `group_of` (cols,)
    says. The scales of e2m1 are exponents e (uint8) of 2^(e − 127).
    """
    codes = codes.view(torch.uint8)
    if scales.dtype != torch.uint8:
        scales = scales.to(torch.float32).contiguous()
    values = torch.empty(len(codes), cols, dtype=dtype, device=codes.device)
    native = kernel(code, values, source="published")
    # A group that ends within a byte is computed by the formula.
    odd = code in HALVES and group % 2 and scales.shape[1] > 1 and group_of is None
    if native is None or odd:
        formula = _by_rows(code, codes, scales, zeros, cols, group, row_block, group_of)
        return formula.to(dtype)
    own, offset = (zeros, 0.0) if isinstance(zeros, Tensor) else (None, float(zeros))
    sizes = (*values.shape, codes.stride(0), row_block, scales.shape[1], group)
    native(codes, scales, own, group_of, values, *sizes, offset)
    return values


def _by_rows(
    code: Code,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | float,
    cols: int,
    group: int,
    row_block: int,
    group_of: Tensor | None,
) -> Tensor:
    numbers = _numbers(code, codes)[:, :cols]
    if scales.dtype == torch.uint8:
        scales = halves_of_powers(scales)
    if group_of is None:
        group_of = torch.arange(cols, device=codes.device) // group
    row = torch.arange(len(codes), device=codes.device) // row_block
    if isinstance(zeros, Tensor):
        zeros = zeros[row][:, group_of.long()]
    return (numbers - zeros) * scales[row][:, group_of.long()]


def _numbers(code: Code, codes: Tensor) -> Tensor:
    """Return what codes stand for, in float32; of e2m1 twice that."""
    if code == "e4m3":
        return codes.view(torch.float8_e4m3fn).to(torch.float32)
    if code in ("int8", "uint8"):
        return codes.view(torch.int8 if code == "int8" else torch.uint8).to(torch.float32)
    halves = torch.stack([codes & 15, codes >> 4], -1).flatten(1)
    if code == "uint4":
        return halves.to(torch.float32)
    values = [*TWICE_E2M1, *(-x for x in TWICE_E2M1)]
    return torch.tensor(values, device=codes.device)[halves.int()]


def halves_of_powers(exponents: Tensor) -> Tensor:
    """Return 2^(e − 128) in float32 for exponents e of 8 bits."""
    e = exponents.to(torch.int32)
    return torch.where(e > 1, (e - 1) << 23, 0x00200000 << e.clamp(max=1)).view(torch.float32)


def by_columns(
    bits: Literal[4, 8],
    words: Tensor,
    scales: Tensor,
    zeros: Tensor,
    *,
    group: int,
    dtype: torch.dtype,
    group_of: Tensor | None = None,
) -> Tensor:
    """Return a weight (rows, cols) in `dtype` of words as GPTQ has them.

    words (cols · bits / 32, rows), int32: the codes of columns side by side, the lowest bits first.
    scales, zeros (groups, rows).
    """
    rows, cols = words.shape[1], words.shape[0] * 32 // bits
    scales = scales.to(torch.float32).contiguous()
    values = torch.empty(rows, cols, dtype=dtype, device=words.device)
    native = kernel(f"columns{bits}", values, source="published")
    if native is None:
        codes = unpacked(words.T, bits).to(torch.float32)
        if group_of is None:
            group_of = torch.arange(cols, device=words.device) // group
        of = group_of.long()
        return ((codes - zeros[of].T) * scales[of].T).to(dtype)
    address, stride = strided(words)
    native(address, scales, zeros, group_of, values, rows, cols, stride, group)
    return values


def interleaved(
    words: Tensor, scales: Tensor, zeros: Tensor, *, group: int, dtype: torch.dtype
) -> Tensor:
    """Return a weight (rows, cols) in `dtype` of words as AWQ has them.

    words (cols, rows / 8), int32: the codes of eight rows in AWQ_ORDER, the lowest bits first.
    scales, zeros (groups, rows).
    """
    cols, rows = words.shape[0], words.shape[1] * 8
    scales = scales.to(torch.float32).contiguous()
    values = torch.empty(rows, cols, dtype=dtype, device=words.device)
    native = kernel("interleaved", values, source="published")
    if native is None:
        of = torch.arange(cols, device=words.device) // group
        codes = in_order(unpacked(words, 4)).to(torch.float32)
        return ((codes - zeros[of]) * scales[of]).T.to(dtype).contiguous()
    address, stride = strided(words)
    native(address, scales, zeros, values, rows, cols, stride, group)
    return values


def unpacked(words: Tensor, bits: int) -> Tensor:
    """Return the codes (rows, n · 32 / bits) in words of 32 bits (rows, n), the lowest first."""
    shifts = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(1)


def in_order(codes: Tensor) -> Tensor:
    """Return codes (rows, 8 n) that AWQ has interleaved in the order of their columns."""
    order = torch.tensor(AWQ_ORDER, device=codes.device).argsort()
    return codes.unflatten(1, (-1, 8))[..., order].flatten(1)
