"""Train a mixture of experts for a few steps, and print what memory that took.

python mixture_run.py DIRECTORY BITS: 16, 4 for NF4 in memory, or 0 for a directory that
`veneer quantize` wrote, which stays mapped.
"""

import gc
import json
import sys
import threading
from pathlib import Path

import torch

import veneer
from veneer.data.encode import Example
from veneer.data.packing import pack
from veneer.fused.forward import choose_forward
from veneer.kernels import native
from veneer.kernels.heap import kept_heap
from veneer.training.memory import process_memory
from veneer.training.optimizer import FlatAdamW

ROWS, LENGTH, STEPS = 4, 256, 4


def main(home: str, bits: int) -> None:
    native.load()
    libraries = process_memory("RssFile")
    base = veneer.load_base(home, dtype="bf16", bits=bits or None)
    model = base.model
    veneer.attach(model, veneer.LoRA(targets="all"), seed=0)
    weights = {name: w for name, w in model.named_parameters() if w.requires_grad}
    optimizer = FlatAdamW(weights, lr=1e-3, weight_decay=0.0)
    torch.manual_seed(0)
    rows = torch.randint(3, model.config.vocab_size, (ROWS, LENGTH)).tolist()
    examples = [Example(row, row, "random", 0) for row in rows]
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
            for _ in range(STEPS):
                optimizer.begin()
                (forward(model, pack(examples, range(ROWS))) / (ROWS * LENGTH)).backward()
                optimizer.step(lr=1e-3, clip=1.0)
    done.set()
    thread.join()
    # Other pages of files are resident only while nobody else needs the memory: those of a mapped
    # base, and those of experts that were read from a file apart and are in memory together.
    peak = libraries + max(own) + (weights_in_files(model) if bits else 0)
    trained = sum(weight.numel() for weight in weights.values())
    print(json.dumps({"peak": peak, "trained": trained, "notices": notices}))


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


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
