"""Adapters of different rows: stacked under a mask, or each over its own rows? Which, by ranks."""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

from veneer.adapter import linear
from veneer.adapter.active import ActiveAdapters
from veneer.adapter.linear import LoRALinear
from veneer.lowrank.update import LowRankUpdate, RowUpdates

OUT, IN, ROUNDS, REPEATS = 1536, 576, 9, 20


def seconds(layer: LoRALinear, x: torch.Tensor, most: int) -> float:
    """Return the processor's time for a pass with stacks of `most` ranks."""
    linear.STACKED_RANKS = most
    start = time.process_time()
    for _ in range(REPEATS):
        layer(x)
    return (time.process_time() - start) / REPEATS


@torch.inference_mode()
def main() -> None:
    print("| rows | adapters | rank | stacked µs | own rows µs |\n|---:|---:|---:|---:|---:|")
    for rows, count, rank in [
        *((16, count, rank) for count in (4, 16) for rank in (8, 16, 32, 64)),
        *((64, count, rank) for count in (16, 64) for rank in (8, 16, 64)),
    ]:
        active_adapters = ActiveAdapters()
        layer = LoRALinear(nn.Linear(IN, OUT, bias=False, dtype=torch.bfloat16), active_adapters)
        updates = [
            {
                layer: LowRankUpdate(
                    torch.randn(rank, IN, dtype=torch.bfloat16),
                    torch.randn(OUT, rank, dtype=torch.bfloat16),
                    None,
                )
            }
            for _ in range(count)
        ]
        active_adapters.row_updates = RowUpdates(updates, tuple(row % count for row in range(rows)))
        x = torch.randn(rows, 1, IN, dtype=torch.bfloat16)
        times = [(seconds(layer, x, 10**9), seconds(layer, x, 0)) for _ in range(ROUNDS)]
        stacked, own = (statistics.median(each) * 1e6 for each in zip(*times, strict=True))
        print(f"| {rows} | {count} | {rank} | {stacked:.0f} | {own:.0f} |", flush=True)


if __name__ == "__main__":
    main()
