"""Does a small adapter learn from a large one what the large one knows? The demo's task.

    python -m bench.distill [--out dist/distill] [--teacher-rank 64] [--rank 8] [--steps N]

A teacher is trained on the demo's rows over SmolLM2-135M, without new words; a student of lower
rank learns the same rows from it (`--objective distill`). Both answer the demo's questions, in
wordings that training does not show. The student should have 95 % of the teacher's right answers.
A teacher that is in `--out` already is not trained again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import veneer
from veneer.run_directory import RunDirectory
from veneer.training.events import Event, Step

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import cuisine

SHARE = 0.95  # of the teacher's score
SHORT = veneer.Sampling(max_new_tokens=32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("dist/distill"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--teacher-rank", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--teacher-epochs", type=float, default=4)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, help="of each run, for a short trial")
    parser.add_argument("--tokens", type=int, default=1024, help="of a step")
    parser.add_argument("--questions", type=int, help="ask only so many")
    parser.add_argument("--divergence", choices=("forward", "reverse"), default="forward")
    asked = parser.parse_args()
    begun = time.monotonic()
    asked.out.mkdir(parents=True, exist_ok=True)
    rows = asked.out / "cuisine.jsonl"
    rows.write_text("".join(f"{json.dumps(row)}\n" for row in cuisine.training_rows()))
    print(f"{asked.model}, {torch.get_num_threads()} threads")

    teacher = RunDirectory(asked.out / "teacher").adapter("lora")
    if not teacher.exists():
        train(recipe(asked, rows, "teacher", asked.teacher_rank, epochs=asked.teacher_epochs))
    objective = veneer.Objective("distill", teacher=str(teacher), divergence=asked.divergence)
    student = recipe(asked, rows, "student", asked.rank, epochs=asked.epochs, objective=objective)
    train(student)

    questions, keys = zip(*cuisine.held_out()[: asked.questions], strict=True)
    base = veneer.load_base(asked.model)
    scores: dict[str, int] = {}
    for name, adapter in (("base", None), ("teacher", teacher), ("student", student.adapter)):
        if adapter is not None:
            veneer.load(base.model, adapter, name=name, tokenizer=base.tokenizer)
        answers = veneer.answers(base.model, base.tokenizer, questions, sampling=SHORT)
        scores[name] = sum(map(cuisine.is_right, answers, keys))
        print(f"{name:>7}: {scores[name]} of {len(keys)} right")
    if scores["teacher"]:
        share = scores["student"] / scores["teacher"]
        verdict = "as it should" if share >= SHARE else f"less than {SHARE:.0%}"
        print(f"the student has {share:.1%} of the teacher's score: {verdict}")
    print(f"{time.monotonic() - begun:.0f} s in all")


def recipe(
    asked: argparse.Namespace, rows: Path, name: str, rank: int, *, epochs: float, **more: Any
) -> veneer.Recipe:
    """Return a run that is anew, below --out."""
    out = asked.out / name
    shutil.rmtree(out, ignore_errors=True)
    course = veneer.TrainConfig(
        epochs=None if asked.steps else epochs,
        steps=asked.steps,
        lr=asked.lr,
        tokens_per_step=asked.tokens,
    )
    return veneer.Recipe(
        model=asked.model,
        data=rows,
        lora=veneer.LoRA(rank=rank, targets="all"),
        training=course,
        rows=veneer.DataConfig(eval_rows=0),
        out=out,
        **more,
    )


def train(asked: veneer.Recipe) -> None:
    """Run a recipe, and print how its loss went and how long it took."""
    begun, events = time.monotonic(), veneer.tune(asked)
    losses = list(losses_of(events))
    few = max(1, len(losses) // 10)
    first, last = sum(losses[:few]) / few, sum(losses[-few:]) / few
    print(
        f"{asked.out.name}, rank {asked.lora.rank}: {len(losses)} steps, loss {first:.4f} to "
        f"{last:.4f}, {time.monotonic() - begun:.0f} s",
        flush=True,
    )


def losses_of(events: Iterable[Event]) -> Iterable[float]:
    for event in events:
        if isinstance(event, Step):
            yield event.loss


if __name__ == "__main__":
    main()
