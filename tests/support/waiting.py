"""Waiting for the very thing that a test then reads, however busy the machine is."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

PATIENCE = 120.0  # seconds, after which what is waited for does not come
T = TypeVar("T")


def eventually(read: Callable[[], T], holds: Callable[[T], object] = bool) -> T:
    """Return what is read as soon as it holds, reading anew until then."""
    end = time.monotonic() + PATIENCE
    while not holds(value := read()):
        assert time.monotonic() < end, value
        time.sleep(0.01)
    return value
