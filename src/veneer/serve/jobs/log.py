"""The worker's log: lines that it appends, and that the server reads on from where it was."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from veneer.serve.jobs.values import Fault, JobEvent

How = Literal["succeeded", "stopped", "failed", "apart"]
MOST_BYTES = 2**20  # that are read at once


@dataclass(frozen=True)
class End:
    """How a worker's work ended; without one, it was killed. "apart": before it began, since it
    cannot train beside the jobs that do."""

    how: How
    fault: Fault | None = None


@dataclass(frozen=True)
class Line:
    """An event, or the end, of the worker of an attempt."""

    attempt: int
    content: JobEvent | End


class WorkerLog:
    """The log of one worker."""

    def __init__(self, path: Path, attempt: int) -> None:
        self.path, self.attempt = path, attempt

    def add(self, event: JobEvent) -> None:
        """Write an event."""
        self._write({"message": event.message, "level": event.level, "data": event.data})

    def end(self, how: How, fault: Fault | None = None) -> None:
        """Write how the work ended, to the disk."""
        self._write({"end": how, "fault": None if fault is None else asdict(fault)}, settle=True)

    def _write(self, content: Mapping[str, Any], *, settle: bool = False) -> None:
        text = json.dumps({"attempt": self.attempt, "created": int(time.time()), **content})
        with self.path.open("ab") as file:
            # Behind half a line, which a process that was killed may have left.
            if file.tell() and not _ends_whole(self.path):
                file.write(b"\n")
            file.write(text.encode() + b"\n")
            if settle:
                file.flush()
                os.fsync(file.fileno())


def read_on(path: Path, start: int) -> tuple[list[Line], int]:
    """Return the whole lines from a byte on, at most so many, and the byte after them."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            new = file.read(MOST_BYTES)
    except FileNotFoundError:
        return [], start
    whole = new.rfind(b"\n") + 1
    lines = [line for text in new[:whole].splitlines() if (line := _line(text)) is not None]
    return lines, start + whole


def _line(text: bytes) -> Line | None:
    try:
        value = json.loads(text)
        if "end" in value:
            fault = value["fault"]
            content: JobEvent | End = End(value["end"], None if fault is None else Fault(**fault))
        else:
            content = JobEvent(value["message"], value["level"], value["data"], value["created"])
        return Line(value["attempt"], content)
    except (ValueError, KeyError, TypeError):
        return None  # half a line


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
