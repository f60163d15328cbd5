"""A short training whose memory is measured, for the scripts here that print it."""

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import veneer
from veneer.data.encode import Example
from veneer.fused.forward import choose_forward
from veneer.kernels import native
from veneer.kernels.heap import kept_heap
from veneer.training.memory import process_memory
from veneer.training.optimizer import FlatAdamW

LENGTH = 256  # tokens of a row


def measured_run(
    home: str, learn: Callable[..., None], *, rows: int, steps: int, mapped: bool, **options: Any
) -> dict[str, Any]:
    """Load a base by `options`, learn from random rows with a LoRA over all layers, and return the
    process's memory at its peak, in bytes.

    learn: makes a step, given model, forward, optimizer and examples. mapped: whether weights that
    are views of a mapped file count too.
    """
    native.load()
    libraries = process_memory("RssFile")
    model = veneer.load_base(home, dtype="bf16", **options).model
    veneer.attach(model, veneer.LoRA(targets="all"), seed=0)
    weights = {name: w for name, w in model.named_parameters() if w.requires_grad}
    optimizer = FlatAdamW(weights, lr=1e-3, weight_decay=0.0)
    torch.manual_seed(0)
    tokens = torch.randint(3, model.config.vocab_size, (rows, LENGTH)).tolist()
    examples = [Example(row, row, "random", 0) for row in tokens]
    gc.collect()
    done, own = threading.Event(), [process_memory("RssAnon")]

    def watch() -> None:
        while not done.wait(0.002):
            own.append(process_memory("RssAnon"))

    thread = threading.Thread(target=watch)
    thread.start()
    with kept_heap():
        forward, notices = choose_forward(model, examples)
        model.train()
        with forward.installed(model):
            for _ in range(steps):
                learn(model, forward, optimizer, examples)
    done.set()
    thread.join()
    # Other pages of files are resident only while nobody else needs the memory: those of a mapped
    # base, and those of experts that were read from a file apart and are in memory together.
    peak = libraries + max(own) + (weights_in_files(model) if mapped else 0)
    trained = sum(weight.numel() for weight in weights.values())
    return {"peak": peak, "anonymous": max(own), "trained": trained, "notices": notices}


def weights_in_files(model: torch.nn.Module) -> int:
    """Return the bytes of parameters that are views of a mapped file."""
    ranges = []
    for line in Path("/proc/self/maps").read_text(encoding="ascii").splitlines():
        if line.endswith(".safetensors"):
            first, _, last = line.split()[0].partition("-")
            ranges.append((int(first, 16), int(last, 16)))
    return sum(
        weight.nbytes
        for weight in model.parameters()
        if any(first <= weight.data_ptr() < last for first, last in ranges)
    )
