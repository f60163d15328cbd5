"""One long row dealt over processes: memory and processor's time of each, and bytes exchanged.

    python -m bench.context_parallel --processes 1 2 --length 8192 --layers 6

SmolLM2-135M's shape with random weights, bfloat16, rank 8 on all linear layers; forward and
backward of one row, the second of two passes. Each process has one thread, whose time on the
processor is shown. Needs Linux.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import AutoModelForCausalLM

import veneer
from bench.engines import ALPHA, RANK
from bench.long_rows import CONTEXT, peak_memory
from bench.workloads import random_rows
from veneer.data.packing import pack
from veneer.fused.forward import choose_forward
from veneer.kernels.heap import kept_heap
from veneer.models.load import load_config_and_tokenizer
from veneer.processes.context import ContextGroup
from veneer.processes.world import World
from veneer.training.memory import process_memory


def _measure(rank: int, size: int, directory: str, asked: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{directory}/{size}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=size)
    world = World.current()
    config, _ = load_config_and_tokenizer("smollm2-135m")
    config.max_position_embeddings = CONTEXT
    config.num_hidden_layers = asked.layers
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).requires_grad_(False)
    veneer.attach(model, veneer.LoRA(rank=RANK, alpha=ALPHA, targets="all"), seed=0)
    model.train()
    rows = random_rows(1, asked.length, config.vocab_size)
    group = ContextGroup.of(world, size)
    forward, _ = choose_forward(model, rows, recompute=asked.recompute, context=group)
    loaded = process_memory("RssAnon")
    with kept_heap(), forward.installed(model), peak_memory() as peak:
        for _ in range(2):
            world.sent.bytes_of.clear()
            world.any(False)  # so that all begin at once
            world.sent.bytes_of.clear()
            begin = time.process_time()
            loss = forward(model, pack(rows, [0]))
            loss.backward()
            seconds = time.process_time() - begin
    total = loss.detach()
    made: dict[str, Any] = {"sent": dict(world.sent.bytes_of)}
    world.add_up(total)
    figures = world.gather(torch.tensor([peak[0] - loaded, seconds], dtype=torch.float64))
    made |= {"bytes": figures[:, 0].max().item(), "seconds": figures[:, 1].max().item()}
    if world.writes:
        torch.save(made | {"loss": float(total)}, f"{directory}/{size}.pt")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--processes", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--recompute", default="none", choices=["none", "selective", "full"])
    asked = parser.parse_args()
    columns = "processes", "memory of each above the weights", "its time", "it exchanges", "loss"
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for size in asked.processes:
        with TemporaryDirectory() as directory:
            mp.spawn(_measure, (size, directory, asked), nprocs=size)
            made = torch.load(Path(directory) / f"{size}.pt", weights_only=True)
        sent = ", ".join(f"{n / 1e6:.1f} MB of {kind}" for kind, n in made["sent"].items())
        print(
            f"| {size} | {made['bytes'] / 1e9:.2f} GB | {made['seconds']:.1f} s | "
            f"{sent or 'nothing'} | {made['loss']:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
