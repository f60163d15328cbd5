"""A job such as a comparison hands out."""

from veneer.compare.job import Job
from veneer.compare.labels import LABELS


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
        "dtype": "float32",
        "split_seed": 0,
        "seed": 0,
        "steps": 3,
        "lr": 1e-3,
    }
    return Job(**(usual | settings))
