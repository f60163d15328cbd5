"""The number format to compute a base in, chosen by a measurement."""

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
    x, weight = torch.ones(256, 1024), torch.ones(1024, 1024)
    inputs = {dtype: (x.to(dtype), weight.to(dtype)) for dtype in (torch.float32, torch.bfloat16)}
    best = dict.fromkeys(inputs, float("inf"))
    # One thread, in turns, and the best of each, so that other work on the machine decides nothing.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(5):
            for dtype, factors in inputs.items():
                start = time.perf_counter()
                F.linear(*factors)
                best[dtype] = min(best[dtype], time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return min(best, key=best.__getitem__)
