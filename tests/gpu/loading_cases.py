"""Bases that are loaded to the pretend GPU, and adapters that start there."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from unittest.mock import patch

import torch

import veneer
from support import fake_card, tiny_models
from support.published_bases import published
from support.random_adapters import ids, tokenizer
from veneer.formats.merged import write_model
from veneer.formats.quantized import write_quantized
from veneer.models import load
from veneer.models.load import open_base
from veneer.quant.stack import quantized_modules, quantized_weights


@cache
def dense(architecture: str) -> Path:
    place = Path(mkdtemp()) / "base"
    write_model(tiny_models.tiny(architecture), tokenizer(), place)
    return place


@cache
def stored(architecture: str) -> Path:
    place = Path(mkdtemp()) / "nf4"
    source, own_tokenizer, _ = open_base(dense(architecture))
    list(write_quantized(source, own_tokenizer, place, bits=4, name=architecture))
    return place


PLACES: dict[str, tuple[Callable[[], Path], int | None]] = {
    "in 4 bits": (partial(dense, "llama"), 4),
    "in 8 bits": (partial(dense, "gpt2"), 8),
    "experts in 4 bits": (partial(dense, "qwen3_moe"), 4),
    "stored in 4 bits": (partial(stored, "llama"), None),
    "published in fp8": (lambda: published("qwen2", "fp8")[0], None),
}


def loaded(name: str, **lora: Any) -> dict[str, Any]:
    """Load a base to the card, attach an adapter, and compute a row there."""
    make, bits = PLACES[name]
    place = make()
    with fake_card.card():
        with (
            patch.object(load, "resolve_device", lambda name: fake_card.CARD),
            patch.object(load, "use_device", lambda device: None),
            patch.object(load, "dtype_of", lambda *asked: torch.bfloat16),
        ):
            base = veneer.load_base(place, dtype="bf16", bits=bits)  # type: ignore[arg-type]
        with warnings.catch_warnings(action="ignore"):
            veneer.attach(base.model, veneer.LoRA(rank=2, targets="attention", **lora))
        logits = base.model(ids().to(fake_card.CARD), use_cache=False).logits
        weights = [
            tensor
            for weight in quantized_weights(base.model).values()
            for name, tensor in weight.tensors().items()
            if "quant_state" not in name  # a text
        ]
        buffers = [b for b in base.model.buffers() if b is not None]
        tensors = [*base.model.parameters(), *weights, *buffers]
        ahead = [m for m in quantized_modules(base.model).values() if _reads_ahead(m)]
        return {
            "devices": sorted({str(tensor.device) for tensor in (*tensors, logits)}),
            "quantized": len(weights) > 0,
            "reads_ahead": len(ahead),
            "dtype": str(logits.dtype),
        }


def _reads_ahead(module: Any) -> bool:
    weight = getattr(module, "quantized_weight", module)
    hooks = (getattr(weight, name, None) for name in ("before_use", "before_routed"))
    return any(hook is not None for hook in hooks)


ALL = {name: partial(loaded, name) for name in PLACES} | {
    f"starts by {init}": partial(loaded, "in 4 bits", init=init)
    for init in ("pissa", "olora", "loftq", "gaussian")
}
FAST = ("stored in 4 bits", "starts by loftq")
CASES = {name: ALL[name] for name in FAST}
SLOW_CASES = {name: case for name, case in ALL.items() if name not in FAST}
