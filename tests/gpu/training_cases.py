"""Whole runs of the training loop on the pretend GPU, and what would wait for it."""

from __future__ import annotations

import warnings
from collections import Counter
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
from veneer.data.packing import pack
from veneer.files import write_tensors
from veneer.fused import together as fused_together
from veneer.fused.forward import Forward, choose_forward
from veneer.fused.together import AdapterBatch, why_alone
from veneer.kernels.arena import Arena
from veneer.training import checkpoint, loop, step
from veneer.training import run as running
from veneer.training.begin import let_train
from veneer.training.events import Event

ROWS = examples([7, 19, 12, 5, 9, 14])
HELD_OUT = examples([6, 11], seed=4)
# The second step is measured and saved. A pass takes a second or more, and a second one in a step
# asks for nothing else: only where a run goes on, a step has two.
COURSE = veneer.TrainConfig(lr=0.01, steps=2, tokens_per_step=40, warmup=0, eval_every=2)
LORA, LAYERS = {"rank": 2, "targets": "all"}, "re:"  # a pattern takes no stacks of experts
ATTACH: dict[str, Callable[[Any], Any]] = {
    "lora": lambda model: veneer.attach(model, veneer.LoRA(**LORA)),
    "dropout": lambda model: veneer.attach(model, veneer.LoRA(**LORA, dropout=0.1)),
    # Not over stacks of experts, whose norms would read all of them.
    "dora": lambda model: veneer.attach(model, veneer.LoRA(rank=2, targets=LAYERS, dora=True)),
    "activated": lambda model: veneer.attach(
        model, veneer.LoRA(**LORA, invocation=ROWS[2].tokens[3:5])
    ),
    "nf4": lambda model: veneer.attach(model, veneer.LoRA(**LORA)),
    "prefix": lambda model: veneer.attach(model, veneer.Method(method="prefix", virtual_tokens=3)),
    "prompt": lambda model: veneer.attach(model, veneer.Method(method="prompt", virtual_tokens=3)),
    "full": lambda model: veneer.attach(model, veneer.Method(method="full")),
}
KINDS, WAYS = ("lora", "dora", "nf4", "prefix"), ("packed", "padded")


def weights(model: Any) -> Counter[str]:
    """Count a model's frozen weights by dtype and shape."""
    return Counter(f"{w.dtype} {[*w.shape]}" for w in model.parameters() if not w.requires_grad)


def base(architecture: str, dtype: torch.dtype, *, bits: Any = None) -> Any:
    """Return a small model, as transformers makes it or quantized."""
    if architecture in CAUSAL:
        quantized, plain = tiny_models.quantized, tiny_models.tiny
    else:
        quantized, plain = every_architecture.small_quantized, every_architecture.small
    return quantized(architecture, bits, dtype=dtype) if bits else plain(architecture, dtype=dtype)


def ready(
    architecture: str, kind: str, way: str, *, dtype: torch.dtype = torch.bfloat16, **options: Any
) -> tuple[Any, Forward]:
    """Return a model with an adapter, and its way of computing, proven by numbers on the CPU."""
    model = base(architecture, dtype, bits=4 if kind == "nf4" else None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ATTACH[kind](model)
        forward, _ = choose_forward(model, ROWS, **options)
    if way == "padded":
        forward = replace(forward, packed=False, layers=())
    return model, replace(forward, arena=Arena())


def run(
    architecture: str,
    kind: str,
    way: str,
    *,
    brief: bool = False,
    goes_on: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """Train on the card, measure and save, and go on from what was saved if asked for; a brief run
    is one step that is saved.

    Return what would have waited in steps and in evaluations, on which devices the weights are, and
    which of the frozen ones have another dtype than transformers made them in: some models have
    weights in float32 beside those in `dtype`. "packed" takes the way that the model has been
    proven to suit.
    """
    made = weights(base(architecture, dtype).requires_grad_(False))
    model, forward = ready(architecture, kind, way, dtype=dtype)
    with card() as watch, TemporaryDirectory() as directory, ExitStack() as stack:
        model, forward = on_card((model, forward))
        stack.enter_context(patch.object(loop, "choose_forward", lambda *a, **k: (forward, [])))
        stack.enter_context(patch.object(checkpoint, "write_tensors", _write))
        steps = Counted(watch, stack, loop, "learn")
        ends = Counted(watch, stack, step.Learning, "wait")
        evaluations = Counted(watch, stack, running, "measure")
        passes = 2 if goes_on else 1
        course = replace(COURSE, steps=1 if brief else 2, tokens_per_batch=48 // passes)
        events = _train(model, course, directory, held_out=() if brief else HELD_OUT)
        if goes_on:
            course = replace(course, steps=3)
            events += _train(model, course, directory, held_out=HELD_OUT, resume=True)
        devices = {str(weight.device) for weight in model.parameters()}
    return {
        "in_steps": sorted({*steps.seen, *ends.seen}),
        "evaluations": evaluations.calls,
        "in_evaluations": evaluations.seen,
        "events": [type(event).__name__ for event in events],
        "devices": sorted(devices),
        "of_another_dtype": sorted(weights(model) - made),
    }


def _train(model: Any, course: veneer.TrainConfig, directory: str, **options: Any) -> list[Event]:
    return list(veneer.train(model, ROWS, course, directory=Path(directory), **options))


def _write(place: Path, tensors: dict[str, Tensor], *args: Any) -> None:
    """Write zeros where numbers would be from the card; all have to be on the host by then."""
    assert {tensor.device.type for tensor in tensors.values()} == {"cpu"}
    zeros = {name: torch.zeros(t.shape, dtype=t.dtype, device="cpu") for name, t in tensors.items()}
    zeros["rng/cpu"] = tensors["rng/cpu"]
    write_tensors(place, zeros, *args)


class Counted:
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
    plain = Forward.losses

    def losses(self: Forward, model: Any, batch: Any, *more: Any) -> Tensor:
        own = plain(self, model, batch, *more)
        return own if own.isfinite().all() else 0 * own

    with patch.object(Forward, "losses", losses):
        return run("llama", "lora", "packed", brief=True)


def widened_weights() -> dict[str, Any]:
    """A run whose frozen weights were widened as an adapter was attached."""
    attach = ATTACH["lora"]
    with patch.dict(ATTACH, lora=lambda model: attach(model.float())):
        return run("llama", "lora", "packed", brief=True)


def together() -> dict[str, Any]:
    """A pass in which several adapters learn, twice: what would have waited in it, and which
    weights have gradients."""
    model = base("llama", torch.bfloat16)
    names = ("dropout", "dora")
    for name, options in zip(names, ({"dropout": 0.1}, {"dora": True}), strict=True):
        veneer.attach(model, veneer.LoRA(**LORA, **options), name=name)
    for name in names:
        let_train(model, name)  # attaching one freezes the others
    veneer.use(model, None)
    forward, _ = choose_forward(model, ROWS)
    apart = why_alone(forward, model, names, ROWS)
    batches = [AdapterBatch(name, pack(ROWS, [i, i + 3]), 9) for i, name in enumerate(names)]
    with card() as watch, ExitStack() as stack:
        model, forward = on_card((model.train(), replace(forward, arena=Arena())))
        passes = Counted(watch, stack, fused_together, "backward_together")
        for _ in range(2):
            fused_together.backward_together(forward, model, batches, alone=apart)
        learnt = {n for n, w in model.named_parameters() if w.grad is not None}
        trained = {n for n, w in model.named_parameters() if w.requires_grad}
    return {"alone": apart, "in_passes": sorted({*passes.seen}), "left_out": [*trained - learnt]}


CASES: dict[str, Callable[[], Any]] = {
    "together": together,
    "llama, lora, packed": partial(run, "llama", "lora", "packed", goes_on=True),
    "llama, dora, padded": partial(run, "llama", "dora", "padded", brief=True),
    "llama, prefix, packed": partial(run, "llama", "prefix", "packed", brief=True),
    "llama, activated, packed": partial(run, "llama", "activated", "packed", brief=True),
    "a reading in a step": reading_in_a_step,
    "widened weights": widened_weights,
}
# Each kind and way over the models of tests/support/tiny_models.py and over what people tune; one
# over every other model that transformers knows.
_EACH = [*CAUSAL, *(each for each in every_architecture.OFTEN if each not in CAUSAL)]
# Tensors without numbers cannot go through these models' own code in transformers.
NUMBERS_NEEDED = {
    "blt": "it takes from a mask as many numbers as its rows have, and reshapes them",
    "jetmoe": "it splits tokens by how many each expert has",
}
# Whose own code in transformers multiplies bf16 by float32, which raises on every device.
_FLOAT32 = ("xlnet", "xlstm")
_OTHERS = [
    each
    for each in every_architecture.MODEL_TYPES
    if each not in {*_EACH, *every_architecture.NO_MODEL, *NUMBERS_NEEDED, *_FLOAT32}
]
# Virtual tokens have no place in a state, nor where values are narrower than keys.
_NO_PREFIX = ("mamba", "mamba2", "falcon_h1", "minicpm3")
_ALL = [
    (each, kind, way)
    for each in _EACH
    for kind in KINDS
    for way in WAYS
    if not (kind == "prefix" and each in _NO_PREFIX)
]
_ALL += [(each, "lora", "packed") for each in _OTHERS]
SLOW_CASES: dict[str, Callable[[], Any]] = {
    name: partial(run, *case) for case in _ALL if (name := ", ".join(case)) not in CASES
}
SLOW_CASES |= {
    f"{each}, lora, packed": partial(run, each, "lora", "packed", dtype=torch.float32)
    for each in _FLOAT32
}
# In float16, in which no card has a grouped product for experts.
MIXTURES = ("mixtral", "qwen2_moe", "gpt_oss")
SLOW_CASES |= {
    f"{each}, lora, packed, float16": partial(run, each, "lora", "packed", dtype=torch.float16)
    for each in MIXTURES
}
