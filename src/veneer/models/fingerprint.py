"""What tells one base from another of the same shape: its structure, weights and vocabulary."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

SAMPLES = 16  # values read of each weight, evenly spread
# Settings that change what the same weights compute.
SETTINGS = ("model_type", "num_attention_heads", "num_key_value_heads", "rope_parameters")


def fingerprint(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None
) -> dict[str, str]:
    """Return {"config", "weights", "tokenizer"}, each a short hash of that part of the base.

    The same for the base alone and with adapters on it, and in float32 as in bfloat16: weights are
    sampled, and samples are compared in bfloat16. The tokenizer is hashed as it was before words
    were added to it.
    """
    weights = base_parameters(model)
    shapes = [f"{path}{tuple(weight.shape)}" for path, weight in weights.items()]
    config = getattr(model, "config", None)
    settings = [f"{key}={getattr(config, key, None)}" for key in SETTINGS]
    marks = {"config": _hash(shapes + settings), "weights": _hash(map(_sample, weights.values()))}
    if tokenizer is not None:
        size = tokenizer.vocab_size
        vocabulary = sorted((i, word) for word, i in tokenizer.get_vocab().items() if i < size)
        marks["tokenizer"] = _hash(f"{i} {word}" for i, word in vocabulary)
    return marks


def base_parameters(model: nn.Module, *, every_name: bool = False) -> dict[str, Tensor]:
    """Return the base's own parameters under the base's own paths, whatever lies over them.

    A tied weight stands there under its first path, or with `every_name` under each.
    """
    found = {}
    for path, parameter in model.named_parameters(remove_duplicate=not every_name):
        parts = path.split(".")
        if "adapters" in parts or parts[-1] == "rows":
            continue
        found[".".join(part for part in parts if part != "original")] = parameter
    return dict(sorted(found.items()))


def _sample(weight: Tensor) -> str:
    flat = weight.detach().reshape(-1)
    step = max(1, flat.numel() // SAMPLES)
    values = flat[::step][:SAMPLES].to(torch.bfloat16).view(torch.int16)
    return ",".join(map(str, values.tolist()))


def _hash(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
