"""Functions that several processes of this machine compute together."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from veneer.processes.world import World


def together(work: Callable[..., None], size: int, directory: Path, *args: Any) -> None:
    """Do `work(world, directory, ...)` in `size` processes; an error of one ends all.

    They are forked, because importing takes seconds, but where torch's backward pass has threads
    of its own for a card, which are not forked with the rest.
    """
    method = "spawn" if torch.accelerator.is_available() else "fork"
    meeting = directory / f"rendezvous-{size}"
    meeting.unlink(missing_ok=True)
    arguments = (size, str(meeting), work, directory, *args)
    mp.start_processes(_begin, arguments, nprocs=size, start_method=method)


def _begin(rank: int, size: int, meeting: str, work: Callable[..., None], *args: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    try:
        work(World.current(), *args)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # or the others would wait for this one
    dist.destroy_process_group()
