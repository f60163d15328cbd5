"""A control group of its own for a process: what it may hold in memory, page cache included."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


@contextmanager
def limited(limit: int, name: str = "") -> Iterator[tuple[Callable[[], None], Callable[[], int]]]:
    """Yield what a new process calls to come under a memory limit, and what reads its peak.

    name: tells several groups of one bench apart.
    """
    old = (CGROUPS / "memory").is_dir()  # version 1
    group = (CGROUPS / "memory" if old else CGROUPS) / f"veneer-bench-{os.getpid()}{name}"
    group.mkdir()
    try:
        most = "memory.limit_in_bytes" if old else "memory.max"
        peak = "memory.max_usage_in_bytes" if old else "memory.peak"
        (group / most).write_text(str(limit))
        swap = group / ("memory.memsw.limit_in_bytes" if old else "memory.swap.max")
        if swap.exists():
            swap.write_text(str(limit if old else 0))
        yield (
            lambda: (group / "cgroup.procs").write_text(str(os.getpid())) and None,
            lambda: int((group / peak).read_text()),
        )
    finally:
        group.rmdir()


def drop_caches() -> None:
    """Empty the page cache: what it holds already would not count against a limit."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")
