"""How many rows of a quantized weight should be dequantized at a time?

python -m bench.dequantize
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from veneer.kernels.heap import kept_heap
from veneer.quant import weight as quantized
from veneer.quant.nf4 import NF4

# Tokens in a pass, and the layer's out and in: of a 70B and of a 7B model.
CASES = ((64, 28672, 8192), (64, 8192, 28672), (512, 11008, 4096), (512, 4096, 11008))
SIZES = (21, 22, 23, 24, 25, 28)


def best(run: Callable[[], object], times: int = 5) -> float:
    """Return the least milliseconds of several runs."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return 1e3 * min(seconds)


def times(tokens: int, out: int, in_: int) -> list[str]:
    """Return forward and backward milliseconds: over a dense weight, and for each size."""
    weight = NF4.quantize(0.02 * torch.randn(out, in_), torch.bfloat16)
    x = torch.randn(tokens, in_, dtype=torch.bfloat16)
    y = torch.empty(tokens, out, dtype=torch.bfloat16)
    dense = weight.dequantize()
    seconds = [(best(lambda: torch.mm(x, dense.T, out=y)), best(lambda: y @ dense))]
    for size in SIZES:
        quantized.BLOCK_NUMBERS = 2**size
        forward = best(lambda: quantized.product(x, weight, y))
        seconds.append((forward, best(lambda: quantized.product_back(y, weight))))
    return [f"{forward:.0f} + {back:.0f} ms" for forward, back in seconds]


def main() -> None:
    print("| tokens, out × in | dense | " + " | ".join(f"2^{size}" for size in SIZES) + " |")
    print("|---" * (2 + len(SIZES)) + "|")
    with kept_heap():
        for tokens, out, in_ in CASES:
            cells = " | ".join(times(tokens, out, in_))
            print(f"| {tokens}, {out} × {in_} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
