"""Trainings by transformers' Trainer and TRL's SFTTrainer, as `accelerate launch` starts them: the
same rows a step, in one process or in several.

    accelerate launch ... tests/support/launched.py RESULTS CASE ...
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import Trainer, TrainingArguments

import veneer
from support.kinds import KINDS, Kind
from support.random_adapters import tokenizer
from support.trainers import arguments, padded
from veneer.data.encode import UNLABELLED
from veneer.formats.adapters import read

STEPS, SAVED, ROWS = 4, 2, 4  # rows of a step, whatever the number of processes
LENGTHS = [17, 5, 30, 12, 21, 24, 9, 14, 26, 11, 19, 8, 28, 13, 16, 22]


@dataclass(frozen=True)
class Case:
    """A training of one kind of adapter; `resumes`: also from its own checkpoint."""

    kind: str
    format: str = "native"
    sft: bool = False
    resumes: bool = False


CASES = {
    "lora": Case("lora, llama", resumes=True),
    "dora": Case("dora, llama", format="peft", resumes=True),
    "nf4": Case("lora, llama, 4 bits", resumes=True),
    "pissa": Case("pissa, mistral", resumes=True),
    "experts": Case("experts, all, qwen3_moe", resumes=True),
    "new tokens": Case("new tokens, llama", resumes=True),
    "tokens": Case("tokens, tied, llama", format="peft"),
    "tokens, resumed": Case("tokens, tied, llama", format="peft", resumes=True),
    "modules to save": Case("saved norms and an mlp, llama", format="peft", resumes=True),
    "tied module to save": Case("saved as one, llama"),
    "prefix": Case("prefix, llama"),
    "sft": Case("lora, llama", sft=True),
}


def train(case: Case, place: Path, *, wide: bool = False, **options: Any) -> list[float]:
    """Train a fresh adapter for a few steps, in as many processes as there are, and return the
    losses of the steps. wide: in float64."""
    AcceleratorState._reset_state()
    kind = next(kind for kind in KINDS if str(kind) == case.kind)
    model = kind.fresh()
    settings = arguments(
        output_dir=str(place),
        max_steps=STEPS,
        per_device_train_batch_size=ROWS // int(os.environ.get("WORLD_SIZE", "1")),
        logging_strategy="steps",
        logging_steps=1,
        save_strategy="steps",
        save_steps=SAVED,
        # Above the rounding of a gradient, which Adam would otherwise make as large as any other.
        adam_epsilon=1e-3,
        ddp_find_unused_parameters=False,
    )
    start = _sft if case.sft else _trainer
    adapter = veneer.SaveAdapter(format=case.format)
    run = start(model.double() if wide else model, kind, settings, adapter)
    run.train(**options)
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def _trainer(model: Any, kind: Kind, settings: dict[str, Any], callback: Any) -> Trainer:
    return Trainer(
        model=model,
        args=TrainingArguments(**settings),
        train_dataset=kind.rows(LENGTHS),
        data_collator=padded,
        callbacks=[callback],
    )


def _sft(model: Any, kind: Kind, settings: dict[str, Any], callback: Any) -> Trainer:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [row.tokens for row in kind.rows(LENGTHS)]
    labels = [[UNLABELLED, *row[1:]] for row in rows]
    return SFTTrainer(
        model=model,
        args=SFTConfig(**settings | {"remove_unused_columns": True, "bf16": False}),
        train_dataset=Dataset.from_dict({"input_ids": rows, "labels": labels}),
        processing_class=tokenizer(),
        callbacks=[callback],
    )


def adapter_tensors(place: Path) -> dict[str, Tensor]:
    """Return all that a saved adapter has trained, by names."""
    state = read(place)
    tokens = {path: tokens.rows for path, tokens in state.trained_tokens.items()}
    new = state.new_tokens
    rows = {} if new is None else {"new": new.embedding, "new head": new.head}
    everything = {**state.tensors, **state.modules_to_save, **tokens, **rows}
    return {name: tensor for name, tensor in everything.items() if tensor is not None}


def take_cpus_for_accelerators() -> None:
    """Let accelerate shard on CPUs, where it otherwise leaves FSDP out."""
    start = PartialState.__init__

    def started(state: PartialState, *args: Any, **kwargs: Any) -> None:
        start(state, *args, **kwargs)
        if state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = started


def main(results: str, *names: str) -> None:
    """Run cases in this process of several, and leave the losses of each beside its files."""
    torch.set_num_threads(1)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        take_cpus_for_accelerators()
    for name in names:
        case, place = CASES[name], Path(results, name)
        losses = train(case, place / "whole")
        if case.resumes:
            checkpoint = place / "whole" / f"checkpoint-{SAVED}"
            train(case, place / "resumed", resume_from_checkpoint=str(checkpoint))
        if os.environ["RANK"] == "0":
            (place / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(*sys.argv[1:])
