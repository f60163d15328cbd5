"""A process among those that torchrun or `launch` started: it joins them, and learns their end."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from veneer.processes.outcome import is_final, note_outcome
from veneer.processes.world import World

# One process may read data or write a model for long while others wait; that another has died is
# noticed at once, since its connections close.
LONGEST_WAIT = timedelta(hours=12)
ENDED = "veneer/ended"  # how many processes have said how the run ends
OTHERS_END = 5.0  # seconds in which processes that fail together have all said so


@dataclass(frozen=True)
class Company:
    """A process and those that were started with it.

    store: what they all can read and write. by_torchrun: whether torchrun started them, and not
    `launch`.
    """

    world: World
    store: Store | None = None
    by_torchrun: bool = True

    def end(self, code: int) -> bool:
        """Say that the run ends with an exit code. Return whether no process did so before."""
        if self.store is None:
            return True
        first = self.store.add(ENDED, 1) == 1
        if first:
            self.store.set(f"{ENDED}/code", str(code))
        if not self.by_torchrun or is_final(code):
            note_outcome(code)
        return first

    def leave(self, code: int) -> None:
        """Return when all processes have said that the run ends; or end this one, where others wait
        for it in the middle of a pass and never would.

        Only the end of a process closes all its connections: `destroy_process_group` waits for
        exchanges that have begun, and leaves a group open that the frames of an error refer to.
        """
        if self.store is None:
            return
        last = time.monotonic() + OTHERS_END
        while self.store.add(ENDED, 0) < self.world.size:
            if time.monotonic() > last:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
            time.sleep(0.05)

    def ended(self) -> int | None:
        """Return the exit code with which another process ended the run, None where none did."""
        if self.store is None or not self.store.check([f"{ENDED}/code"]):
            return None
        return int(self.store.get(f"{ENDED}/code"))


@contextmanager
def joined(files: Path | None = None, *, accelerators: bool = True) -> Iterator[Company]:
    """Join the processes that the environment names, as torchrun sets it, until the context ends.

    files: a directory of this machine by which they find each other, instead of an address.
    accelerators: whether each takes one of this machine's, where there are any. A process on its
    own, and one whose caller has set up torch.distributed, joins nobody.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if dist.is_initialized() or size == 1:
        yield Company(World.current())
        return
    store: Store
    rank = int(os.environ["RANK"])
    if files is None:
        store, rank, size = next(iter(rendezvous("env://", timeout=LONGEST_WAIT)))
    else:
        store = dist.FileStore(str(files / f"workers-{restarts()}"), size)  # type: ignore[attr-defined]
    backend = "gloo"
    if accelerators and (device := torch.accelerator.current_accelerator(check_available=True)):
        number = int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count()
        torch.accelerator.set_device_index(number)
        backend = f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
    dist.init_process_group(
        backend,
        store=PrefixStore("veneer", store),
        rank=rank,
        world_size=size,
        timeout=LONGEST_WAIT,
    )
    try:
        yield Company(World.current(), store, by_torchrun=files is None)
    finally:
        dist.destroy_process_group()


def restarts() -> int:
    """Return how many times the elastic agent has started the processes again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def launch_id() -> str | None:
    """Return what tells one launch of processes from another, and outlives their restarts; None for
    a process that no elastic agent has started."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    # torchrun's own name for a launch that was given none is "none", but then its agent is one.
    run_id = os.environ["TORCHELASTIC_RUN_ID"]
    return f"agent {os.getppid()}" if run_id == "none" else run_id
