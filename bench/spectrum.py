"""How many directions does a full fine-tune move a weight in?

Trains all weights of a base on the demo's rows, and takes the singular values of every linear
layer's change ΔW, beside those of the weight W itself and of a random matrix of its shape. Writes
the shares of the squared norm that each rank keeps, from which the site draws a figure.

python -m bench.spectrum --model minigpt --model smollm2-135m --out docs/explanation/spectrum.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import veneer
from bench.extract import tune_fully
from veneer.adapter.targets import adaptable_layers
from veneer.cli.console import quieten_libraries
from veneer.files import write_text

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import cuisine

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def kept(matrices: Iterable[Tensor]) -> dict[int, float]:
    """Return, for each rank, the share of the matrices' squared norm, all together, that their
    nearest ones of that rank have."""
    sums, whole, largest = dict.fromkeys(RANKS, 0.0), 0.0, 0
    for matrix in matrices:
        squares = torch.linalg.svdvals(matrix.float()).double().square()
        whole += float(squares.sum())
        largest = max(largest, len(squares))
        for rank in RANKS:
            sums[rank] += float(squares[:rank].sum())
    return {rank: sums[rank] / whole for rank in RANKS if rank <= largest}


def linear_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return a copy of the weight of each linear layer in the blocks, by its path."""
    return {
        layer.path: layer.module.weight.detach().clone()
        for layer in adaptable_layers(model)
        if layer.is_linear and not layer.is_head
    }


def measured(name: str, source: str | Path, steps: int) -> dict[str, Any]:
    """Train all weights of a base, and return what each rank keeps of change, weight and noise."""
    base = veneer.load_base(source)
    rows, _ = veneer.load_examples(cuisine.training_rows(), base.tokenizer)
    before = linear_weights(base.model)
    after = linear_weights(tune_fully(base.model, rows, steps))
    changes = [after[path].float() - before[path].float() for path in before]
    relative = (
        torch.stack([change.norm() for change in changes]).norm()
        / torch.stack([weight.float().norm() for weight in before.values()]).norm()
    )
    generator = torch.Generator().manual_seed(0)
    noise = (torch.randn(weight.shape, generator=generator) for weight in before.values())
    return {
        "model": name,
        "layers": len(changes),
        "steps": steps,
        "changed_by": float(relative),
        "change": kept(changes),
        "weight": kept(before.values()),
        "noise": kept(noise),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--pretraining-steps", type=int, default=250)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    quieten_libraries()
    results = []
    for name in asked.model:
        print(name, flush=True)
        with TemporaryDirectory() as place:
            source: str | Path = name
            if name == "minigpt":
                source = Path(place) / "minigpt"
                list(veneer.pretrain(source, steps=asked.pretraining_steps))
            result = measured(name, source, asked.steps)
        results.append(result)
        print(f"  all linear layers changed by {result['changed_by']:.2%} of their norm")
        print("\n| rank | " + " | ".join(map(str, result["change"])) + " |")
        print("|---" * (len(result["change"]) + 1) + "|")
        for what in ("change", "weight", "noise"):
            shares = " | ".join(f"{share:.1%}" for share in result[what].values())
            print(f"| {what} | {shares} |", flush=True)
    write_text(asked.out, json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
