"""A job such as a comparison hands out, and rows to compare on."""

import json
from collections.abc import Sequence
from pathlib import Path

from veneer.compare.job import Job
from veneer.compare.labels import LABELS
from veneer.data.world import facts

ROWS = [(question, fact.answer) for fact in facts()[::5] for question in fact.questions]


def write_rows(path: Path, pairs: Sequence[tuple[str, str]]) -> Path:
    rows = [json.dumps({"prompt": question, "completion": answer}) for question, answer in pairs]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def job(**settings) -> Job:
    usual = {
        "name": "lora-seed0",
        "kind": "run",
        "label": LABELS["lora"],
        "model": "m",
        "data": "d.jsonl",
        "test": None,
        "general": None,
        "files": {"data": "0f"},
        "test_rows": None,
        "max_new_tokens": 8,
        "eval_rows": None,
        "limit": None,
        "max_length": 64,
        "tokens_per_step": 128,
        "device": "auto",
        "dtype": "float32",
        "split_seed": 0,
        "seed": 0,
        "steps": 3,
        "lr": 1e-3,
    }
    return Job(**(usual | settings))
