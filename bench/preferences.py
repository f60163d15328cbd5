"""DPO beside TRL's DPOTrainer with PEFT: tokens in a second of processor time, and what is learnt.

    python -m bench.preferences [--data ../shared/data/e2e] [--pairs 240] [--steps 20] [--rounds 2]

The preference is made from E2E: of two references for one restaurant, the one with fewer sentences
is chosen. Both sides train rank 8 over SmolLM2-135M in bf16, on the same pairs in the same batches,
in turns of a few steps; the first turn warms up and does not count. Ours goes on to the end of its
steps and is then asked about pairs that it has not seen.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import veneer
from veneer.training.events import Evaluated, Event, Step

BATCH, RANK, LR = 4, 8, 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/e2e"))
    parser.add_argument("--pairs", type=int, default=240)
    parser.add_argument("--steps", type=int, default=20, help="of ours")
    parser.add_argument("--rounds", type=int, default=2)
    asked = parser.parse_args()
    rows = pairs(asked.data / "train.jsonl", asked.pairs)
    held_out = rows[: asked.pairs // 6]
    rows = rows[asked.pairs // 6 :]
    threads = torch.get_num_threads()
    print(f"{len(rows)} pairs to train on, {len(held_out)} held out; {threads} threads")
    ours, theirs = our_steps(rows, held_out, asked.steps), their_steps(rows)
    rates: dict[str, list[float]] = {"ours": [], "TRL": []}
    for number in range(asked.rounds + 1):
        for name, side in (("ours", ours), ("TRL", theirs)):
            begun, tokens = time.process_time(), sum(next(side) for _ in range(2))
            if number:
                rates[name].append(tokens / (time.process_time() - begun))
    for name, measured in rates.items():
        print(
            f"{name:>5}: {', '.join(f'{rate:.0f}' for rate in measured)} tokens/s of processor time"
        )
    means = {name: sum(measured) / len(measured) for name, measured in rates.items()}
    print(f"ratio {means['ours'] / means['TRL']:.2f}")
    for _ in ours:
        pass


def pairs(path: Path, count: int) -> list[dict[str, str]]:
    """Return pairs of references for one restaurant; the one with fewer sentences is chosen."""
    references: dict[str, list[str]] = defaultdict(list)
    for line in path.read_text().splitlines():
        row = json.loads(line)
        references[row["prompt"]].append(row["completion"])
    chosen_pairs = []
    for prompt, texts in references.items():
        by_sentences = sorted(texts, key=lambda text: (sentences(text), text))
        if sentences(by_sentences[0]) < sentences(by_sentences[-1]):
            chosen, rejected = by_sentences[0], by_sentences[-1]
            chosen_pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return chosen_pairs[:count]


def sentences(text: str) -> int:
    return len(re.findall(r"[.!?](?:\s|$)", text))


def our_steps(rows: list[Any], held_out: list[Any], steps: int) -> Iterator[int]:
    """Train, print what is measured, and yield the tokens of each step."""
    base = veneer.load_base("smollm2-135m", dtype="bf16")
    model = veneer.attach(base.model, veneer.LoRA(rank=RANK))
    objective = veneer.Objective("dpo")
    examples, _ = veneer.load_examples(rows, base.tokenizer, shape="pairs")
    judging, _ = veneer.load_examples(held_out, base.tokenizer, shape="pairs")
    step = BATCH * sum(len(each.tokens) for each in examples) // len(examples)
    course = veneer.TrainConfig(steps=steps, lr=LR, tokens_per_step=step, eval_every=steps)
    events: Iterator[Event] = veneer.train(
        model, examples, course, objective=objective, held_out=judging
    )
    for event in events:
        if isinstance(event, Evaluated):
            numbers = ", ".join(f"{name} {value:.3f}" for name, value in event.metrics.items())
            print(f"ours, step {event.step}: held-out loss {event.eval_loss:.4f}, {numbers}")
        elif isinstance(event, Step):
            yield event.tokens


def their_steps(rows: list[Any]) -> Iterator[int]:
    """Train by TRL, and yield the tokens of each step."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    base = veneer.load_base("smollm2-135m", dtype="bf16")
    chats = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            **{key: [{"role": "assistant", "content": row[key]}] for key in ("chosen", "rejected")},
        }
        for row in rows
    ]
    trainer: Any = DPOTrainer(
        model=base.model,
        args=DPOConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=BATCH,
            learning_rate=LR,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
        ),
        train_dataset=Dataset.from_list(chats),
        processing_class=base.tokenizer,
        peft_config=LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LR)
    trainer.model.train()
    while True:
        for batch in trainer.get_train_dataloader():
            loss = trainer.compute_loss(trainer.model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            yield int(batch["attention_mask"].sum())


if __name__ == "__main__":
    main()
