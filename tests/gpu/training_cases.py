"""Whole runs of the training loop on the pretend GPU, and what would wait for it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import veneer
from support import every_architecture, tiny_models
from support.fake_card import Watch, card, on_card
from support.random_adapters import examples
from support.tiny_models import CAUSAL
from veneer.files import write_tensors
from veneer.fused.forward import Forward, choose_forward
from veneer.kernels.arena import Arena
from veneer.training import checkpoint, loop, step
from veneer.training.events import Event, Step

ROWS = examples([7, 19, 12, 5, 9, 14])
HELD_OUT = examples([6, 11], seed=4)
# Steps of two passes each; the last is measured and saved.
COURSE = veneer.TrainConfig(
    lr=0.01, steps=3, tokens_per_step=40, tokens_per_batch=24, warmup=0, eval_every=3
)
LORA = {"rank": 2, "targets": "all"}
KINDS: dict[str, Callable[[Any], Any]] = {
    "lora": lambda model: veneer.attach(model, veneer.LoRA(**LORA)),
    "dropout": lambda model: veneer.attach(model, veneer.LoRA(**LORA, dropout=0.1)),
    "dora": lambda model: veneer.attach(model, veneer.LoRA(**LORA, dora=True)),
    "nf4": lambda model: veneer.attach(model, veneer.LoRA(**LORA)),
    "prefix": lambda model: veneer.attach(model, veneer.Method(method="prefix", virtual_tokens=3)),
    "prompt": lambda model: veneer.attach(model, veneer.Method(method="prompt", virtual_tokens=3)),
    "full": lambda model: veneer.attach(model, veneer.Method(method="full")),
}
WAYS = ("packed", "padded")


def ready(
    architecture: str, kind: str, way: str, *, dtype: torch.dtype = torch.bfloat16, **options: Any
) -> tuple[Any, Forward]:
    """Return a model with an adapter, and its way of computing, proven by numbers on the CPU."""
    bits = 4 if kind == "nf4" else None
    if architecture in CAUSAL:
        quantized, plain = tiny_models.quantized, tiny_models.tiny
    else:
        quantized, plain = every_architecture.small_quantized, every_architecture.small
    model = quantized(architecture, bits, dtype=dtype) if bits else plain(architecture, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = KINDS[kind](model)
        forward, _ = choose_forward(model, ROWS, **options)
    if way == "padded":
        forward = replace(forward, packed=False, layers=())
    return model, replace(forward, arena=Arena())


def run(architecture: str, kind: str, way: str, **options: Any) -> dict[str, Any]:
    """Train on the card, measure, save, and go on from what was saved. Return what would have
    waited in steps, in evaluations and elsewhere, and on which devices what trains is."""
    model, forward = ready(architecture, kind, way, **options)
    if way == "packed" and not forward.packed:
        return {"is_not_packed": True}
    with card() as watch, TemporaryDirectory() as directory, ExitStack() as stack:
        model, forward = on_card((model, forward))
        stack.enter_context(patch.object(loop, "choose_forward", lambda *a, **k: (forward, [])))
        stack.enter_context(patch.object(checkpoint, "write_tensors", _write))
        steps = counted(watch, stack, loop, "learn")
        ends = counted(watch, stack, step.Learning, "wait")
        evaluations = counted(watch, stack, loop, "evaluate")
        events = list(_train(model, COURSE, directory))
        events += _train(model, replace(COURSE, steps=5), directory, resume=True)
        trained = {str(w.device) for w in model.parameters()}
        dtypes = {str(w.dtype) for w in model.parameters() if not w.requires_grad}
    return {
        "packed": forward.packed,
        "fused": len(forward.layers),
        "in_steps": sorted({*steps.seen, *ends.seen}),
        "in_evaluations": sorted(set(evaluations.seen)),
        "readings_of_evaluations": len(evaluations.seen) / max(evaluations.calls, 1),
        "steps": [event.step for event in events if isinstance(event, Step)],
        "events": [type(event).__name__ for event in events],
        "devices": sorted(trained),
        "dtypes": sorted(dtypes),
    }


def _train(model: Any, course: veneer.TrainConfig, directory: str, **options: Any) -> list[Event]:
    given = {"held_out": HELD_OUT, "directory": Path(directory), **options}
    return list(veneer.train(model, ROWS, course, **given))


def _write(place: Path, tensors: dict[str, Tensor], *args: Any) -> None:
    """Write zeros where numbers would be from the card; all have to be on the host by then."""
    assert {tensor.device.type for tensor in tensors.values()} == {"cpu"}
    zeros = {name: torch.zeros(t.shape, dtype=t.dtype, device="cpu") for name, t in tensors.items()}
    zeros["rng/cpu"] = tensors["rng/cpu"]
    write_tensors(place, zeros, *args)


class counted:
    """Counts what waits while a function of a module or a class runs, and its calls."""

    def __init__(self, watch: Watch, stack: ExitStack, owner: Any, name: str) -> None:
        self.watch, self.function = watch, getattr(owner, name)
        self.seen: list[str] = []
        self.calls = 0
        call = self
        stack.enter_context(patch.object(owner, name, lambda *a, **k: call(*a, **k)))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        with self.watch.counting() as seen:
            try:
                return self.function(*args, **kwargs)
            finally:
                self.seen += seen


def reading_in_a_step() -> dict[str, Any]:
    """A run whose loss reads whether it is finite, as one did that waited for the card."""
    plain = Forward.__call__

    def forward(self: Forward, model: Any, batch: Any) -> Tensor:
        loss = plain(self, model, batch)
        return loss if loss.isfinite() else 0 * loss

    with patch.object(Forward, "__call__", forward):
        return run("llama", "lora", "packed")


# The fast ones: every kind and way over one base, and what layers differ in.
FAST = [("llama", kind, way) for kind in KINDS for way in WAYS]
FAST += [(each, "lora", "packed") for each in ("gemma2", "gpt2", "phi3", "qwen3")]
CASES: dict[str, Callable[[], Any]] = {", ".join(case): partial(run, *case) for case in FAST} | {
    "a reading in a step": reading_in_a_step
}
SLOW_CASES: dict[str, Callable[[], Any]] = {
    ", ".join(case): partial(run, *case)
    for architecture in dict.fromkeys([*CAUSAL, *every_architecture.MODEL_TYPES])
    for kind in ("lora", "dora", "nf4", "prefix")
    for way in WAYS
    if architecture not in every_architecture.NO_MODEL
    if (case := (architecture, kind, way)) not in FAST
}
