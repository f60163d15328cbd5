"""Two seconds of measurements: products in float32 and bfloat16, memory, the disk, the GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from veneer.kernels import native
from veneer.kernels.choice import device_of, slower_on
from veneer.kernels.transfer import has_queue
from veneer.machine import free_bytes
from veneer.models.device import (
    CPU,
    device_name,
    free_memory,
    resolve_device,
    synchronize,
)
from veneer.models.dtype import ROWS, WIDTH, fastest_dtype, product_seconds

ON_CARD = 8192, 4096  # rows and width of the products that a card is measured by
COPIED = 2**28  # bytes: larger than what caches hold
ON_DISK = 2**26  # bytes that are written and read
PIECE = 2**22
DISK_SECONDS = 0.4  # for either way


@dataclass(frozen=True)
class Speed:
    """Products in a second, in floating-point operations."""

    float32: float
    bf16: float


@dataclass(frozen=True)
class Card:
    """The GPU that `--device auto` takes; `slower` says what faster ways are not there."""

    name: str
    memory_free: int | None
    products: Speed
    sent: float
    slower: str


@dataclass(frozen=True)
class Figures:
    """What was measured; bytes a second where nothing else is said.

    dtype: what `--dtype auto` takes. native: why the kernels in C++ are not, or not wholly, used,
    "" where they are. copied: read and written. read, written: of the disk, None where it cannot be
    written to. cuda: whether this torch is built for NVIDIA's cards.
    """

    threads: int
    products: Speed
    dtype: str
    copied: float
    read: float | None
    written: float | None
    compiler: str
    native: str
    cuda: bool
    card: Card | None


def measure(place: Path) -> Figures:
    """Return the figures of this machine, and of the disk that a directory is on."""
    _, problem = native.load()
    threads = torch.get_num_threads()
    written, read = _disk(place)
    device = resolve_device()
    return Figures(
        threads=threads,
        products=_products(threads, rounds=10),
        dtype=str(fastest_dtype(device)).removeprefix("torch."),
        copied=_copied(),
        read=read,
        written=written,
        compiler=_compiler(),
        native=problem,
        cuda=torch.version.cuda is not None,
        card=None if device == CPU else _card(device),
    )


def _products(threads: int, *, rounds: int, device: torch.device = CPU) -> Speed:
    rows, width = (ROWS, WIDTH) if device == CPU else ON_CARD
    seconds = product_seconds(rows, width, threads=threads, rounds=rounds, device=device)
    work = 2 * rows * width**2
    return Speed(*(work / seconds[dtype] for dtype in (torch.float32, torch.bfloat16)))


def _copied() -> float:
    """Return the bytes that are read and written in a second where memory is copied."""
    free = free_bytes()
    size = COPIED if free is None else min(COPIED, free // 8)
    here = torch.ones(size // 4)
    there = torch.empty_like(here)
    return 2 * 4 * here.numel() / _best(lambda: there.copy_(here))


def _best(work: Callable[[], object], rounds: int = 4) -> float:
    """Return the fewest seconds that some work has taken."""
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def _card(device: torch.device) -> Card:
    host = torch.ones(ON_DISK // 4, pin_memory=has_queue(device))

    def send() -> None:
        host.to(device)
        synchronize(device)

    return Card(
        name=device_name(device),
        memory_free=free_memory(device),
        products=_products(1, rounds=5, device=device),
        sent=4 * host.numel() / _best(send),
        slower=slower_on(device_of(device)),
    )


def _disk(place: Path) -> tuple[float | None, float | None]:
    """Return the bytes that a new file takes and gives in a second; it goes again."""
    block = os.urandom(PIECE)  # which no file system makes smaller
    try:
        with tempfile.TemporaryFile(dir=place, buffering=0) as file:
            start = time.perf_counter()
            size = 0
            while size < ON_DISK and time.perf_counter() - start < DISK_SECONDS:
                size += file.write(block)
            os.fsync(file.fileno())
            written = size / (time.perf_counter() - start)
            if not hasattr(os, "posix_fadvise"):
                return written, None  # what was written is in memory still
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            start = time.perf_counter()
            size = 0
            while time.perf_counter() - start < DISK_SECONDS and (piece := file.read(PIECE)):
                size += len(piece)
            return written, size / (time.perf_counter() - start)
    except OSError:
        return None, None


def _compiler() -> str:
    """Return the first line by which the C++ compiler names itself, "" where there is none."""
    for name in (os.environ.get("CXX", ""), *native.COMPILERS):
        if path := shutil.which(name):
            with suppress(OSError, subprocess.SubprocessError):
                command = [path, "--version"]
                done = subprocess.run(command, capture_output=True, text=True, timeout=5)
                return (done.stdout.splitlines() or [name])[0]
    return ""
