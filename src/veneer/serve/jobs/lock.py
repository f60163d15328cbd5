"""Locks on files, which go with the process that holds them, however it ends."""

from __future__ import annotations

from typing import IO, Any


def take(file: IO[Any], *, wait: bool) -> bool:
    """Return whether this process holds the lock of a file from now on, until that is closed.

    wait: until whoever holds it lets it go. Windows has no such locks: there two servers are not
    told apart.
    """
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True
