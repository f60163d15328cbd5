"""Train a few steps as one of several processes, and print what memory that took.

python shared_run.py DIRECTORY none|base RANK SIZE FILE: the processes meet at FILE.
"""

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from measured_run import LENGTH, measured_run

from veneer.data.packing import StepOrder
from veneer.processes.world import ALONE, World
from veneer.training.step import StepToLearn, learn

ROWS, STEPS = 4, 3  # rows of each process


def main(home: str, shard: str, rank: int, size: int, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=size)
    world, rows = World.current(), ROWS * size
    order = StepOrder([LENGTH] * rows, LENGTH * rows, ROWS * LENGTH, seed=0)

    def step(*run: Any) -> None:
        model, forward, optimizer, examples = run
        asked = StepToLearn(examples, order.epoch(0)[0], optimizer, order, lr=1e-3, clip=1.0)
        learn(model, forward, asked, world=world)

    measured = measured_run(
        home,
        step,
        rows=rows,
        steps=STEPS,
        # A dense base that is whole stays mapped from its file, if in the same dtype.
        mapped=shard == "none",
        world=world if shard == "base" else ALONE,
    )
    print(json.dumps(measured))
    dist.destroy_process_group()


if __name__ == "__main__":
    home, shard, rank, size, file = sys.argv[1:]
    main(home, shard, int(rank), int(size), file)
