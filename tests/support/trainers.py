"""The same few steps, taken by Veneer's loop, by transformers' Trainer and by TRL's SFTTrainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

import veneer
from support.random_adapters import examples, tokenizer
from veneer.data.encode import UNLABELLED, Example
from veneer.data.packing import StepOrder
from veneer.training.events import Step

STEPS, LR, TOKENS = 5, 2e-2, 60
# Of three tokens alone, so that there is something to learn.
LENGTHS = [17, 5, 30, 12, 21, 24, 9, 14, 26, 11, 19, 8, 28, 13, 16, 22, 7, 18]
ROWS = examples(LENGTHS, vocabulary=6, seed=3)

Inputs = dict[str, Tensor]


def veneer_losses(model: Any, rows: Sequence[Example] = ROWS) -> list[float]:
    """Return the losses of the first steps of Veneer's own loop."""
    course = veneer.TrainConfig(steps=STEPS, lr=LR, warmup=0, tokens_per_step=TOKENS)
    events = veneer.train(model, rows, course)
    return [event.loss for event in events if isinstance(event, Step)]


def batches(rows: Sequence[Example] = ROWS) -> list[Inputs]:
    """Return what Veneer's loop sees in its steps, padded, as a Trainer takes it."""
    order = StepOrder([len(row.tokens) for row in rows], TOKENS, TOKENS, seed=0)
    steps = order.epoch(0)
    assert len(steps) >= STEPS
    assert all(len(step) == 1 for step in steps)
    assert max(len(step[0]) for step in steps) > 2
    return [padded([rows[i] for i in step[0]]) for step in steps]


def padded(rows: Sequence[Example]) -> Inputs:
    """Return rows side by side, filled up at their ends."""
    longest = max(len(row.tokens) for row in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full_like(tokens, UNLABELLED)
    for i, row in enumerate(rows):
        tokens[i, : len(row.tokens)] = torch.tensor(row.tokens)
        labels[i, : len(row.labels)] = torch.tensor(row.labels)
    mask = torch.tensor([[j < len(row.tokens) for j in range(longest)] for row in rows])
    return {"input_ids": tokens, "labels": labels, "attention_mask": mask.long()}


class Watched(Trainer):
    """A Trainer that keeps its losses unrounded, and the optimizer's parameters by name."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        result = super().compute_loss(model, inputs, *args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        self.losses.append(float(loss.detach()))
        return result

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.losses: list[float] = []
        result = super().train(*args, **kwargs)
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        self.optimized = {n for n, p in self.model.named_parameters() if id(p) in held}
        return result


def arguments(**options: Any) -> dict[str, Any]:
    """Return settings of a Trainer that walks as Veneer's loop does, quietly."""
    usual = {
        "output_dir": "trained",
        "max_steps": STEPS,
        "per_device_train_batch_size": 1,
        "train_sampling_strategy": "sequential",
        "learning_rate": LR,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0,
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "use_cpu": True,
        "seed": 0,
    }
    return usual | options


def trainer(
    model: Any,
    steps: Sequence[Inputs],
    *,
    callbacks: Sequence[TrainerCallback] = (),
    **options: Any,
) -> Watched:
    """Return a Trainer whose every batch is one of `steps`."""
    return Watched(
        model=model,
        args=TrainingArguments(**arguments(**options)),
        train_dataset=list(steps),  # type: ignore[arg-type]
        eval_dataset=list(steps),  # type: ignore[arg-type]
        data_collator=lambda items: dict(items[0]),
        callbacks=list(callbacks),
    )


def trainer_losses(model: Any, steps: Sequence[Inputs], **options: Any) -> list[float]:
    """Return the losses that transformers' Trainer has on `steps`."""
    watched = trainer(model, steps, **options)
    watched.train()
    trains = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert watched.optimized == trains
    model.eval()
    return watched.losses


def sft_losses(model: Any, rows: Sequence[Sequence[int]], **options: Any) -> list[float]:
    """Return the losses of TRL's SFTTrainer on rows of tokens, all of which are learnt.

    The first one, which nothing predicts, has no label: Trainer counts it where a model's class is
    not called ...ForCausalLM (GPT-2's), and its losses were smaller by that.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    class WatchedSFT(Watched, SFTTrainer):
        """TRL's trainer, watched."""

    watched = WatchedSFT(
        model=model,
        args=SFTConfig(**arguments(**{"remove_unused_columns": True, **options})),
        train_dataset=Dataset.from_dict(
            {
                "input_ids": [list(row) for row in rows],
                "labels": [[UNLABELLED, *row[1:]] for row in rows],
            }
        ),
        processing_class=tokenizer(),
    )
    watched.train()
    model.eval()
    return watched.losses
