"""Which number format a base is computed in, chosen by a measurement."""

from __future__ import annotations

import time

import torch
from torch.nn import functional as F

from veneer.errors import ConfigError

NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16}


def resolve_dtype(name: str) -> torch.dtype:
    """Return the dtype called `name`; `auto` measures which is faster on this processor.

    Processors without AVX512-BF16 or AMX compute bfloat16 more slowly than float32.
    """
    if name == "auto":
        return fastest_dtype()
    if name not in NAMES:
        raise ConfigError(f"dtype is {name!r}, but must be auto, float32 or bf16.")
    return NAMES[name]


def fastest_dtype() -> torch.dtype:
    """Return bfloat16 or float32, whichever multiplies faster here; takes about 50 ms."""
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    seconds = {dtype: _product_time(dtype) for dtype in (torch.float32, torch.bfloat16)}
    return min(seconds, key=seconds.__getitem__)


def _product_time(dtype: torch.dtype) -> float:
    x, weight = torch.ones(512, 512, dtype=dtype), torch.ones(1024, 512, dtype=dtype)
    F.linear(x, weight)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        F.linear(x, weight)
        best = min(best, time.perf_counter() - start)
    return best
