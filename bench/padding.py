"""How many tokens of padding rows have that cannot be packed, by the passes that they are cut into.

    python -m bench.padding ROWS.jsonl

Counts words and signs as tokens, so that it needs no tokenizer. A batch's rows are sorted by length
(`StepOrder`) and cut into the runs whose padding, with so many tokens for each run, is least.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from veneer.data.packing import StepOrder

BUDGETS = ((512, 512), (1024, 1024), (2048, 2048), (4096, 4096), (4096, 2048), (8192, 2048))
COSTS = (64, 128, 256)


def lengths_in(path: Path) -> np.ndarray:
    """Return the length of each row's texts together."""
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return np.array([sum(len(str(text).split()) for text in row.values()) for row in rows])


def padded(lengths: np.ndarray, cost: float) -> tuple[int, int]:
    """Return the padded tokens and the runs of rows, longest first, whose tokens with `cost` for
    each run are fewest."""
    rows = len(lengths)
    least: list[tuple[float, int, int]] = [(0.0, 0, 0)]  # with costs, tokens, runs
    for end in range(1, rows + 1):
        before = (
            (total + (end - start) * lengths[start] + cost, tokens, runs, start)
            for start, (total, tokens, runs) in enumerate(least)
        )
        total, tokens, runs, start = min(before)
        least.append((total, tokens + (end - start) * int(lengths[start]), runs + 1))
    return least[-1][1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path)
    lengths = lengths_in(parser.parse_args().rows)
    print(
        f"{len(lengths)} rows, {lengths.mean():.1f} tokens in the mean, {lengths.max()} at most\n"
    )
    print("| tokens a step, a batch | one pass |" + "".join(f" C = {c} |" for c in COSTS))
    print("|---" * (2 + len(COSTS)) + "|")
    for step, batch in BUDGETS:
        steps = StepOrder(lengths, step, batch, seed=0).epoch(0)
        batches = [lengths[rows] for each in steps for rows in each]
        real = sum(int(each.sum()) for each in batches)
        whole = sum(len(each) * int(each[0]) for each in batches)
        cells = [f"{whole / real - 1:.1%}"]
        for cost in COSTS:
            counts = [padded(each, cost) for each in batches]
            tokens, runs = (sum(column) for column in zip(*counts, strict=True))
            cells.append(f"{tokens / real - 1:.1%} in {runs / len(batches):.2f} passes")
        print(f"| {step}, {batch} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
