"""What would 8-bit products gain? Rates of the frozen products in bfloat16 and in int8.

python -m bench.int8
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

TOKENS, REPEATS = 2048, 15
SHAPES = ((576, 576), (192, 576), (1536, 576), (576, 1536))  # (out, in) of SmolLM2-135M
COUNTS = (2, 2, 2, 1)  # of each, in a layer


def seconds(work: Callable[[], object]) -> float:
    """Return the median time of `work`, warm."""
    work(), work()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x in int8 with one scale a row."""
    scale = x.abs().amax(1, keepdim=True).float() / 127
    return (x / scale).round_().to(torch.int8), scale


def main() -> None:
    print("| product | bf16 | int8 to int32 | int8 to bf16, scaled |")
    print("|---|---|---|---|")
    total = {"bf16": 0.0, "int8": 0.0, "scaled": 0.0}
    for (out, in_), count in zip(SHAPES, COUNTS, strict=True):
        x = torch.randn(TOKENS, in_).to(torch.bfloat16)
        weight = torch.randn(out, in_).to(torch.bfloat16)
        small_weight, weight_scale = quantised(weight)
        small_x, _ = quantised(x)
        prepacked = torch.ops.onednn.qlinear_prepack(small_weight.T.contiguous().T, None)
        unsigned = (small_x.to(torch.int16) + 128).to(torch.uint8)

        weight_scale = weight_scale.flatten()

        def scaled(u=unsigned, p=prepacked, w=weight_scale):
            zeros = torch.zeros(len(w), dtype=torch.int32)
            return torch.ops.onednn.qlinear_pointwise(
                u, 1.0, 128, p, w, zeros, None, 1.0, 0, torch.bfloat16, "none", [], ""
            )

        times = {
            "bf16": seconds(lambda x=x, w=weight: x @ w.T),
            "int8": seconds(lambda x=small_x, w=small_weight: torch._int_mm(x, w.T)),
            "scaled": seconds(scaled),
        }
        for key, value in times.items():
            total[key] += count * value
        cells = " | ".join(f"{1e3 * value:.2f} ms" for value in times.values())
        print(f"| {TOKENS} × {in_} → {out} | {cells} |")
    print("| all of a layer | " + " | ".join(f"{1e3 * v:.2f} ms" for v in total.values()) + " |")


if __name__ == "__main__":
    main()
