"""How much of a full fine-tune does an adapter hold that is extracted from it?

Trains all weights as `veneer compare --methods full` does, writes the model, extracts adapters of
several ranks from the files, and evaluates each over the base.

python -m bench.extract --data e2e/train.jsonl
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import PreTrainedModel

import veneer
from veneer.adapter.targets import adaptable_layers
from veneer.algebra.extract import Extracted
from veneer.cli.console import quieten_libraries
from veneer.compare.labels import LABELS
from veneer.data.encode import Example
from veneer.data.packing import split_held_out
from veneer.formats.install import install
from veneer.fused.forward import choose_forward
from veneer.kernels.heap import kept_heap
from veneer.training.evaluate import evaluate
from veneer.training.events import Step

CURVE = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def loss_of(model: PreTrainedModel, rows: Sequence[Example]) -> float:
    with kept_heap():
        forward, _ = choose_forward(model, rows)
        return evaluate(model, rows, forward)


def tune_fully(model: PreTrainedModel, rows: Sequence[Example], steps: int) -> PreTrainedModel:
    """Train every weight, as a comparison does, and return the plain model."""
    full = LABELS["full"]
    veneer.attach(model, veneer.Method(**full.method), seed=0)
    config = veneer.TrainConfig(steps=steps, lr=2e-4, tokens_per_step=1024, seed=0)
    for event in veneer.train(model, list(rows), config):
        if isinstance(event, Step) and event.step % 20 == 0:
            print(f"  step {event.step}: loss {event.loss:.4f}", flush=True)
    return veneer.merge(model)


def with_linear_layers_of(tuned: PreTrainedModel, base: PreTrainedModel) -> PreTrainedModel:
    """Give the base the tuned weights of all linear layers, in place: what ranks approach."""
    theirs = {layer.path: layer.module for layer in adaptable_layers(tuned)}
    tied = base.get_input_embeddings().weight
    with torch.no_grad():
        for layer in adaptable_layers(base):
            if layer.is_linear and layer.module.weight is not tied:
                layer.module.weight.copy_(theirs[layer.path].weight)
    return base


def energy_curve(tuned: PreTrainedModel, base: PreTrainedModel) -> dict[int, float]:
    """Return the share of ‖ΔW‖² over all linear layers that each rank keeps."""
    theirs = {layer.path: layer.module for layer in adaptable_layers(tuned)}
    kept, whole = dict.fromkeys(CURVE, 0.0), 0.0
    for layer in adaptable_layers(base):
        if layer.is_linear and not layer.is_head:
            delta = theirs[layer.path].weight.float() - layer.module.weight.float()
            squares = torch.linalg.svdvals(delta.detach()).double().square()
            whole += float(squares.sum())
            for rank in CURVE:
                kept[rank] += float(squares[:rank].sum())
    return {rank: energy / whole for rank, energy in kept.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=123)
    parser.add_argument("--eval-rows", type=int, default=200)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--ranks", default="4,16,64")
    asked = parser.parse_args()
    quieten_libraries()
    base = veneer.load_base(asked.model)
    examples, _ = veneer.load_examples(asked.data, base.tokenizer, limit=asked.limit)
    trained, held_out = split_held_out(len(examples), eval_rows=asked.eval_rows, seed=0)
    rows, questions = [examples[i] for i in trained], [examples[i] for i in held_out]
    losses = {"base": loss_of(base.model, questions)}
    tuned = tune_fully(base.model, rows, asked.steps)
    losses["full"] = loss_of(tuned, questions)
    print(f"  base {losses['base']:.4f}, full {losses['full']:.4f}", flush=True)

    def fresh() -> PreTrainedModel:
        return veneer.load_base(asked.model, dtype=str(tuned.dtype).removeprefix("torch.")).model

    extracted: dict[str, Extracted] = {}
    with TemporaryDirectory() as place:
        veneer.write_model(tuned, base.tokenizer, Path(place) / "tuned")
        for rank, beside in product(map(int, asked.ranks.split(",")), (False, True)):
            name = f"rank {rank}{', embedding too' if beside else ''}"
            tuned_home = Path(place) / "tuned"
            extracted[name] = veneer.extract(asked.model, tuned_home, rank=rank, embeddings=beside)
            model = fresh()
            install(model, extracted[name].state, tokenizer=base.tokenizer)
            losses[name] = loss_of(model, questions)
            print(f"  {name}: {losses[name]:.4f}", flush=True)
    losses["linear layers, whole"] = loss_of(with_linear_layers_of(tuned, fresh()), questions)
    gain = losses["base"] - losses["full"]
    print("\n| over the base | evaluation loss | recovered | energy kept | parameters |")
    print("|---|---|---|---|---|")
    for name, loss in losses.items():
        share = f"{(losses['base'] - loss) / gain:.1%}"
        energy = f"{extracted[name].energy:.1%}" if name in extracted else ""
        size = ""
        if name in extracted:
            size = f"{sum(t.numel() for t in extracted[name].state.tensors.values()):,}"
        print(f"| {name} | {loss:.4f} | {share} | {energy} | {size} |")
    first = next(iter(extracted.values()))
    uncovered = f"{first.uncovered_share:.2%} of it uncovered:"
    print(f"\nAll weights changed by {first.relative:.2%}; {uncovered}")
    for weight in sorted(first.uncovered, key=lambda weight: -weight.norm)[:3]:
        print(f"{weight.name}, {weight.relative:.2%} of its size")
    curve = energy_curve(tuned, fresh())
    print("\n| rank | " + " | ".join(map(str, curve)) + " |")
    print("|---" * (len(curve) + 1) + "|")
    print("| energy kept | " + " | ".join(f"{share:.1%}" for share in curve.values()) + " |")


if __name__ == "__main__":
    main()
