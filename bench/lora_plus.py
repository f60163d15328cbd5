"""Does LoRA+ reach LoRA's loss in fewer steps? The same rows in the same order, at several ratios.

python -m bench.lora_plus --data e2e/train.jsonl
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean

import veneer
from veneer.cli.console import quieten_libraries
from veneer.training.events import Step

SMOOTH = 10  # steps over which a loss is averaged


def losses(data: Path, ratio: float | None, asked: argparse.Namespace) -> list[float]:
    """Return the training loss of each step."""
    base = veneer.load_base("smollm2-135m", dtype="bf16")
    rows, _ = veneer.load_examples(data, base.tokenizer, limit=asked.rows)
    veneer.attach(base.model, veneer.LoRA(rank=8, targets="all"), seed=0)
    config = veneer.TrainConfig(
        steps=asked.steps,
        lr=asked.lr,
        lora_plus_ratio=ratio,
        schedule="constant",
        tokens_per_step=1024,
    )
    events = veneer.train(base.model, rows, config)
    return [event.loss for event in events if isinstance(event, Step)]


def smooth(curve: list[float]) -> list[float]:
    """Return the mean of each step's loss and of the steps before it."""
    return [mean(curve[max(0, i - SMOOTH + 1) : i + 1]) for i in range(len(curve))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=2e-4)
    asked = parser.parse_args()
    quieten_libraries()
    plain = smooth(losses(asked.data, None, asked))
    print("| ratio | loss at the end | steps to LoRA's loss at the end |")
    print("|---|---|---|")
    print(f"| LoRA | {plain[-1]:.4f} | {asked.steps} |", flush=True)
    for ratio in (4.0, 8.0, 16.0):
        curve = smooth(losses(asked.data, ratio, asked))
        reached = next((i for i, loss in enumerate(curve, 1) if loss <= plain[-1]), None)
        print(f"| {ratio:g} | {curve[-1]:.4f} | {reached or 'not reached'} |", flush=True)


if __name__ == "__main__":
    main()
