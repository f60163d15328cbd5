"""The number format to compute a base in, chosen by a measurement."""

from __future__ import annotations

import time

import torch
from torch.nn import functional as F

from veneer.errors import ConfigError
from veneer.models.device import CPU, computes_bf16, device_name, synchronize

ROWS, WIDTH = 256, 1024  # of the products that are measured
NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16}


def resolve_dtype(name: str, device: torch.device = CPU) -> torch.dtype:
    """Return the dtype called `name`; `auto` is the one that the device computes faster.

    Processors without AVX512-BF16 or AMX compute bfloat16 more slowly than float32. Raises
    ConfigError for an unknown name, and for bfloat16 on an accelerator that has no such numbers.
    """
    if name == "auto":
        return fastest_dtype(device)
    if name not in NAMES:
        raise ConfigError(f"dtype is {name!r}, but must be auto, float32 or bf16.")
    dtype, is_processor = NAMES[name], device.type == "cpu"
    if dtype == torch.bfloat16 and not is_processor and not computes_bf16(device, slowly=True):
        raise ConfigError(
            f"dtype is {name!r}, but {device_name(device)} has no bfloat16: take float32, or "
            "compute on the processor by --device cpu."
        )
    return dtype


def fastest_dtype(device: torch.device = CPU) -> torch.dtype:
    """Return bfloat16 or float32, whichever multiplies faster on the device; on a processor, by a
    measurement of about 50 ms."""
    if device.type != "cpu":
        return torch.bfloat16 if computes_bf16(device) else torch.float32
    # One thread, so that other work on the machine decides nothing.
    seconds = product_seconds(ROWS, WIDTH, threads=1)
    return min(seconds, key=seconds.__getitem__)


def product_seconds(
    rows: int, width: int, *, threads: int, rounds: int = 5, device: torch.device = CPU
) -> dict[torch.dtype, float]:
    """Return the seconds that a product (rows, width) × (width, width) takes in float32 and in
    bfloat16: the best of some rounds, in which the two take turns."""
    x, weight = torch.ones(rows, width, device=device), torch.ones(width, width, device=device)
    inputs = {dtype: (x.to(dtype), weight.to(dtype)) for dtype in (torch.float32, torch.bfloat16)}
    best = dict.fromkeys(inputs, float("inf"))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(rounds):
            for dtype, factors in inputs.items():
                start = time.perf_counter()
                F.linear(*factors)
                synchronize(device)
                best[dtype] = min(best[dtype], time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return best
