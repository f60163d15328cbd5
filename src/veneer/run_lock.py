"""The lock of a run's directory: two runs that write into one would spoil each other's files.

It is a lock of the system on a file, and goes with the process that holds it, however that ends.
The file says whose it is.
"""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from veneer.errors import ConfigError
from veneer.files import disk_errors

LOCK = ".lock"


class RunLock:
    """A lock that is taken once and released once; releasing one that is not taken does nothing."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / LOCK
        self._file: IO[str] | None = None
        self._made: list[Path] = []

    def take(self) -> str:
        """Make the directory, if need be, and take its lock. Return what to say of a run that was
        killed there, or nothing.

        Raises ConfigError, which names the owner, where another process has it, and StorageError
        where the disk is full or fails.
        """
        with disk_errors(self.path):
            return self._take()

    def _take(self) -> str:
        above = self.path.parent.absolute()
        while not above.exists():
            self._made.append(above)
            above = above.parent
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = self.path.open("a+", encoding="utf-8")
            if not _lock(file):
                owner = _owner(file)
                file.close()
                raise ConfigError(
                    f"{self.path.parent} is being written by another run ({_named(owner)}). Wait "
                    "for its end, stop it, or name another place by --out. If that process is "
                    f"gone, and with it all that it started, remove {self.path}."
                )
            if _is_at(file, self.path):
                break
            file.close()  # its owner has just removed it
        killed = _owner(file)
        started = datetime.now().astimezone().isoformat(timespec="seconds")
        me = {"pid": os.getpid(), "host": socket.gethostname(), "started": started}
        try:
            file.truncate(0)
            file.write(json.dumps(me) + "\n")
            file.flush()
        except OSError:
            self.path.unlink(missing_ok=True)
            with suppress(OSError):
                file.close()  # which tries to write once more
            raise
        self._file = file
        return f"An earlier run there ended without a word ({_named(killed)})." if killed else ""

    def release(self) -> None:
        """Let others have the directory; one that is empty and was made for the lock goes too."""
        if self._file is None:
            return
        self.path.unlink(missing_ok=True)
        self._file.close()
        self._file = None
        with suppress(OSError):
            for directory in self._made:
                directory.rmdir()


def _lock(file: IO[Any]) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks, as some network ones
        return not _lives(_owner(file))
    return True


def _lives(owner: dict[str, Any]) -> bool:
    """Return whether the process that a lock's file names may be there still."""
    if not owner or owner.get("host") != socket.gethostname():
        return bool(owner)
    try:
        os.kill(int(owner["pid"]), 0)
    except (KeyError, TypeError, ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return int(owner["pid"]) != os.getpid()


def _is_at(file: IO[Any], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _owner(file: IO[str]) -> dict[str, Any]:
    """Return what a lock's file says of its owner, nothing where that is not known."""
    file.seek(0)
    try:
        owner = json.loads(file.read())
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _named(owner: dict[str, Any]) -> str:
    if not owner:
        return "which does not say who it is"
    return f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('started')}"
