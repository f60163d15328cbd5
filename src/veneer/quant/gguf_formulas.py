"""The blocks of GGUF's formats as numbers, in torch: the formulas that kernels/gguf.cpp computes.

Each takes blocks (blocks, bytes) and returns (blocks, numbers) in float32, which are gguf-py's to
the bit. The formats are ggml's (ggml-common.h).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Of IQ4_NL and IQ4_XS: the values of the 16 codes, denser near zero.
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _half(blocks: Tensor, at: int) -> Tensor:
    """Return the float16 at a byte of each block, (blocks, 1)."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _signed(codes: Tensor) -> Tensor:
    return codes.contiguous().view(torch.int8).float()


def _fields(codes: Tensor, shifts: range, width: int) -> Tensor:
    """Return some bits of each code (blocks, groups, n), (blocks, groups · shifts, n).

    They are `width` bits at each shift.
    """
    steps = torch.tensor(shifts, dtype=torch.uint8, device=codes.device)[:, None]
    return (codes[:, :, None] >> steps & (2**width - 1)).flatten(1, 2)


def _halves(codes: Tensor) -> Tensor:
    """Return the low halves of 16 bytes, then their high halves: (blocks, 32)."""
    return _fields(codes[:, None], range(0, 8, 4), 4).flatten(1)


def _bits(codes: Tensor) -> Tensor:
    """Return the 32 bits of 4 bytes, the lowest first: (blocks, 32)."""
    shifts = torch.arange(8, dtype=torch.uint8, device=codes.device)
    return (codes[:, :, None] >> shifts & 1).flatten(1)


def _table(codes: Tensor) -> Tensor:
    return torch.tensor(IQ4, dtype=torch.float32, device=codes.device)[codes.long()]


def _q4_0(b: Tensor) -> Tensor:
    return _half(b, 0) * (_halves(b[:, 2:]).float() - 8)


def _q4_1(b: Tensor) -> Tensor:
    return _half(b, 0) * _halves(b[:, 4:]) + _half(b, 2)


def _q5_0(b: Tensor) -> Tensor:
    codes = _halves(b[:, 6:]) | _bits(b[:, 2:6]) << 4
    return _half(b, 0) * (codes.float() - 16)


def _q5_1(b: Tensor) -> Tensor:
    codes = _halves(b[:, 8:]) | _bits(b[:, 4:8]) << 4
    return _half(b, 0) * codes + _half(b, 2)


def _q8_0(b: Tensor) -> Tensor:
    return _half(b, 0) * _signed(b[:, 2:])


def _scales_and_minima(b: Tensor) -> tuple[Tensor, Tensor]:
    """Return those of the eight groups in a block of Q4_K or Q5_K, each (blocks, 8, 1)."""
    first, second, both = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scales = torch.cat([first & 63, both & 15 | first >> 6 << 4], 1)
    minima = torch.cat([second & 63, both >> 4 | second >> 6 << 4], 1)
    return (_half(b, 0) * scales)[:, :, None], (_half(b, 2) * minima)[:, :, None]


def _q4_k(b: Tensor) -> Tensor:
    scales, minima = _scales_and_minima(b)
    codes = _fields(b[:, 16:].unflatten(1, (4, 32)), range(0, 8, 4), 4)  # (blocks, 8, 32)
    return scales * codes - minima


def _q5_k(b: Tensor) -> Tensor:
    scales, minima = _scales_and_minima(b)
    codes = _fields(b[:, 48:].unflatten(1, (4, 32)), range(0, 8, 4), 4)
    highest = _fields(b[:, None, 16:48], range(8), 1)
    return scales * (codes | highest << 4) - minima


def _q6_k(b: Tensor) -> Tensor:
    low = _fields(b[:, :128].unflatten(1, (2, 64)), range(0, 8, 4), 4).reshape(-1, 16, 16)
    high = _fields(b[:, 128:192].unflatten(1, (2, 32)), range(0, 8, 2), 2).reshape(-1, 16, 16)
    scales = _half(b, 208) * _signed(b[:, 192:208])
    return scales[:, :, None] * ((low | high << 4).float() - 32)


def _q2_k(b: Tensor) -> Tensor:
    codes = _fields(b[:, 16:80].unflatten(1, (2, 32)), range(0, 8, 2), 2).reshape(-1, 16, 16)
    scales, minima = _half(b, 80) * (b[:, :16] & 15), _half(b, 82) * (b[:, :16] >> 4)
    return scales[:, :, None] * codes - minima[:, :, None]


def _q3_k(b: Tensor) -> Tensor:
    low = _fields(b[:, 32:96].unflatten(1, (2, 32)), range(0, 8, 2), 2).reshape(-1, 16, 16)
    highest = _fields(b[:, None, :32], range(8), 1).reshape(-1, 16, 16)
    of_scales = _fields(b[:, None, 104:108], range(0, 8, 2), 2).flatten(1)
    scales = _fields(b[:, None, 96:104], range(0, 8, 4), 4).flatten(1) | of_scales << 4
    codes = low.float() - 4 * (1 - highest.float())
    return (_half(b, 108) * (scales.float() - 32))[:, :, None] * codes


def _iq4_nl(b: Tensor) -> Tensor:
    return _half(b, 0) * _table(_halves(b[:, 2:]))


def _iq4_xs(b: Tensor) -> Tensor:
    high = _fields(b[:, 2:4, None], range(0, 8, 2), 2).flatten(1)  # of each of the 8 scales
    low = _fields(b[:, 4:8, None], range(0, 8, 4), 4).flatten(1)
    scales = _half(b, 0) * ((low | high << 4).float() - 32)
    codes = _fields(b[:, 8:].unflatten(1, (8, 16)), range(0, 8, 4), 4).reshape(-1, 8, 32)
    return scales[:, :, None] * _table(codes)


FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}
