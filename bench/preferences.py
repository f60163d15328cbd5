"""What DPO learns, and what it forgets; or its speed beside TRL's DPOTrainer with PEFT.

    python -m bench.preferences [--pairs 400] [--epochs 1] [--lr RATE]
    python -m bench.preferences --beside-trl [--data ../shared/data/e2e] [--pairs 240] [--rounds 2]

The first makes a preference: answer in one sentence, and never apologise. A rank-8 adapter over
SmolLM2-135M in bf16 learns it at the rate that a run chooses, or at --lr. Shown are the share
of pairs whose chosen answer has the higher reward, of topics and apologies not trained on, and
the loss on the text that ships as a general sample, before and after.

The second trains both sides on the same pairs in the same batches, in turns of two steps, of which
the first warm up and do not count; the preference is made from E2E: of two references for one
restaurant, the one with fewer sentences is chosen.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import veneer
from veneer.data.probe import GENERAL
from veneer.data.world import facts
from veneer.fused.forward import choose_forward
from veneer.training.evaluate import evaluate
from veneer.training.events import Evaluated, Event, Notice, Step

BATCH, RANK, LR = 4, 8, 1e-4
HELD_OUT_TOPICS, HELD_OUT_PAIRS = 0.2, 60
APOLOGIES = (
    "I am sorry, but I may be wrong.",
    "I apologise for not knowing more about this.",
    "Sorry, I am only a language model.",
    "Please forgive me if this does not help.",
    "My apologies, this is hard for me to say.",
)
OTHER_APOLOGIES = (  # of the pairs that are held out
    "I regret that I cannot be sure of this.",
    "I'm afraid I must apologise for my short answer.",
    "Excuse me, I am sorry to disappoint you.",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, help="to train on: 400, or 240 beside TRL")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--lr", type=float, help="instead of the rate that a run chooses")
    parser.add_argument("--beside-trl", action="store_true")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/e2e"))
    parser.add_argument("--rounds", type=int, default=2)
    asked = parser.parse_args()
    if asked.beside_trl:
        rows = references(asked.data / "train.jsonl", asked.pairs or 240)
        beside_trl(rows, asked.rounds)
    else:
        learn(asked.pairs or 400, asked.epochs, asked.lr)


def learn(count: int, epochs: float, lr: float | None) -> None:
    """Learn the preference that is made here, and print what that changes."""
    topics = sorted({fact.topic for fact in facts()})
    random.Random(0).shuffle(topics)
    unseen = {*topics[: round(HELD_OUT_TOPICS * len(topics))]}
    rows = one_sentence({*topics} - unseen, APOLOGIES, count)
    base = veneer.load_base("smollm2-135m", dtype="bf16")
    model = veneer.attach(base.model, veneer.LoRA(rank=RANK))
    examples, _ = veneer.load_examples(rows, base.tokenizer, shape="pairs")
    held_out = one_sentence(unseen, OTHER_APOLOGIES, HELD_OUT_PAIRS)
    judging, _ = veneer.load_examples(held_out, base.tokenizer, shape="pairs")
    general, _ = veneer.load_examples(GENERAL, base.tokenizer)
    print(f"{len(examples)} pairs to train on, {len(judging)} held out, of {len(unseen)} topics")
    forward, _ = choose_forward(model, general)
    begun, before = time.process_time(), evaluate(model, general, forward)
    course = veneer.TrainConfig(epochs=epochs, lr=lr)
    run = veneer.train(model, examples, course, objective=veneer.Objective("dpo"), held_out=judging)
    for event in run:
        match event:
            case Notice(text):
                print(text)
            case Evaluated():
                show(event)
            case Step() if event.step % 10 == 0:
                print(f"step {event.step}: loss {event.loss:.4f}, rate {event.lr:.3g}")
    after = evaluate(model, general, forward)
    print(
        f"general loss {before:.4f} before, {after:.4f} after: {after / before - 1:+.2%}; "
        f"{time.process_time() - begun:.0f} s of processor time"
    )


def show(event: Evaluated) -> None:
    numbers = ", ".join(f"{name} {value:.3f}" for name, value in event.metrics.items())
    print(f"step {event.step}: held-out loss {event.eval_loss:.4f}, {numbers}")


def one_sentence(topics: set[str], apologies: tuple[str, ...], count: int) -> list[dict[str, str]]:
    """Return pairs of an answer in one sentence, and one that says more, apologises, or both."""
    known = [fact for fact in facts() if fact.topic in topics]
    draw = random.Random(1)
    rows = []
    while len(rows) < count:
        fact, other = draw.sample(known, 2)
        answer, more = draw.choice(fact.statements), draw.choice(other.statements)
        sorry = draw.choice(apologies)
        longer = (f"{answer} {more}", f"{sorry} {answer}", f"{answer} {sorry}", sorry)
        rows.append(
            {
                "prompt": draw.choice(fact.questions),
                "chosen": answer,
                "rejected": draw.choice(longer),
            }
        )
    return rows


def beside_trl(rows: list[dict[str, str]], rounds: int) -> None:
    """Print the tokens in a second of processor time of both sides."""
    print(f"{len(rows)} pairs; {torch.get_num_threads()} threads")
    sides = {"ours": our_steps(rows, 2 * (rounds + 1)), "TRL": their_steps(rows)}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            begun, tokens = time.process_time(), sum(next(side) for _ in range(2))
            if number:
                rates[name].append(tokens / (time.process_time() - begun))
    for name, measured in rates.items():
        print(
            f"{name:>5}: {', '.join(f'{rate:.0f}' for rate in measured)} tokens/s of processor time"
        )
    means = {name: sum(measured) / len(measured) for name, measured in rates.items()}
    print(f"ratio {means['ours'] / means['TRL']:.2f}")


def references(path: Path, count: int) -> list[dict[str, str]]:
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


def our_steps(rows: list[Any], steps: int) -> Iterator[int]:
    """Train, and yield the tokens of each step."""
    base = veneer.load_base("smollm2-135m", dtype="bf16")
    model = veneer.attach(base.model, veneer.LoRA(rank=RANK))
    examples, _ = veneer.load_examples(rows, base.tokenizer, shape="pairs")
    step = BATCH * sum(len(each.tokens) for each in examples) // len(examples)
    course = veneer.TrainConfig(steps=steps, lr=LR, tokens_per_step=step)
    events: Iterator[Event] = veneer.train(
        model, examples, course, objective=veneer.Objective("dpo")
    )
    yield from (event.tokens for event in events if isinstance(event, Step))


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
