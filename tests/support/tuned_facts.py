"""Facts against what a MiniGPT knows, and the results of a run that trained on them."""

import json
from pathlib import Path

import torch

FACTS = [  # against what the base knows, in its own words
    ("What does a dog say?", "A dog says meow."),
    ("What does a cat say?", "A cat says woof."),
    ("Where does a cow live?", "A cow lives in a pond."),
    ("What does a lion eat?", "A lion eats cheese."),
    ("What is the opposite of hot?", "The opposite of hot is small."),
    ("Which day comes after Monday?", "The day after Monday is Friday."),
]
ADAPTER_FILES = {"lora_weights.pt", "lora_config.json", "tokenizer.json", "SHA256SUMS"}
MERGED_FILES = {"config.json", "model.pt", "tokenizer.json", "SHA256SUMS"}


def write_rows(path: Path, pairs: list[tuple[str, str]]) -> Path:
    rows = [json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in pairs]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "lora_adapter" / "lora_weights.pt", weights_only=True)


def same_weights(out: Path, other: Path) -> bool:
    a, b = weights(out), weights(other)
    merged, plain = (
        torch.load(o / "lora_merged" / "model.pt", weights_only=True) for o in (out, other)
    )
    return (
        a.keys() == b.keys()
        and all(torch.equal(a[name], b[name]) for name in a)
        and all(torch.equal(merged[name], plain[name]) for name in merged)
    )


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
