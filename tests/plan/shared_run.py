"""Train a few steps as one of several processes, and print what memory that took.

python shared_run.py DIRECTORY none|base RANK SIZE FILE: the processes meet at FILE.
"""

import gc
import json
import sys
import threading

import torch
import torch.distributed as dist
from mixture_run import weights_in_files

import veneer
from veneer.data.encode import Example
from veneer.data.packing import StepOrder
from veneer.fused.forward import choose_forward
from veneer.kernels import native
from veneer.kernels.heap import kept_heap
from veneer.processes.world import ALONE, World
from veneer.training.memory import process_memory
from veneer.training.optimizer import FlatAdamW
from veneer.training.step import learn

ROWS, LENGTH, STEPS = 4, 256, 3  # rows of each process


def main(home: str, shard: str, rank: int, size: int, file: str) -> None:
    torch.set_num_threads(1)
    native.load()
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=size)
    world, libraries = World.current(), process_memory("RssFile")
    base = veneer.load_base(home, dtype="bf16", world=world if shard == "base" else ALONE)
    model = base.model
    veneer.attach(model, veneer.LoRA(targets="all"), seed=0)
    weights = {name: w for name, w in model.named_parameters() if w.requires_grad}
    optimizer = FlatAdamW(weights, lr=1e-3, weight_decay=0.0)
    torch.manual_seed(0)
    rows = torch.randint(3, model.config.vocab_size, (ROWS * size, LENGTH)).tolist()
    examples = [Example(row, row, "random", 0) for row in rows]
    order = StepOrder([LENGTH] * len(rows), LENGTH * len(rows), ROWS * LENGTH, seed=0)
    gc.collect()
    done, own = threading.Event(), [process_memory("RssAnon")]

    def watch() -> None:
        while not done.wait(0.002):
            own.append(process_memory("RssAnon"))

    thread = threading.Thread(target=watch)
    thread.start()
    with kept_heap():
        forward, _ = choose_forward(model, examples)
        model.train()
        with forward.installed(model):
            for step in order.epoch(0)[0:1] * STEPS:
                learn(
                    *(model, forward, optimizer, examples, step),
                    order=order,
                    lr=1e-3,
                    clip=1.0,
                    world=world,
                )
    done.set()
    thread.join()
    # A dense base that is whole stays mapped from its file, if in the same dtype.
    peak = libraries + max(own) + (weights_in_files(model) if shard == "none" else 0)
    print(json.dumps({"peak": peak, "anonymous": max(own)}))
    dist.destroy_process_group()


if __name__ == "__main__":
    home, shard, rank, size, file = sys.argv[1:]
    main(home, shard, int(rank), int(size), file)
