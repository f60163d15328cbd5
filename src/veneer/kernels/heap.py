"""Freed memory stays with the process while it trains."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Options of glibc's mallopt (malloc.h), and the values that glibc starts with.
TRIM_THRESHOLD, TRIM_DEFAULT = -1, 128 * 1024
MMAP_MAX, MMAP_DEFAULT = -4, 65536


@contextmanager
def kept_heap() -> Iterator[None]:
    """Keep what is freed for the next allocation, and give it back when the context ends.

    Otherwise glibc asks the system for the memory of every large tensor, whose pages are then
    cleared and mapped one by one: a tenth of a training step's time and more. Without glibc this
    does nothing.
    """
    libc: Any = ctypes.CDLL(None) if os.name == "posix" else None
    if not (hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")):
        yield
        return
    libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(MMAP_MAX, 0)
    try:
        yield
    finally:
        libc.mallopt(TRIM_THRESHOLD, TRIM_DEFAULT)
        libc.mallopt(MMAP_MAX, MMAP_DEFAULT)
        libc.malloc_trim(0)
