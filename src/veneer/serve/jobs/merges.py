"""Merging an adapter into the base, in a process of its own, one at a time. Imports no torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any, Literal

from veneer.errors import AdapterError, QueueFull
from veneer.files import read_json, write_json
from veneer.serve.config import ADAPTER_NAME
from veneer.serve.jobs.pace import Pace
from veneer.serve.jobs.settings import TrainingBase

MERGER = (sys.executable, "-m", "veneer.serve.jobs.merge_worker")
STATE, MODEL, OUTPUT = "merge.json", "model", "output.txt"  # in the directory of a merge


@dataclass(frozen=True)
class Merge:
    """One merge: what is asked, and what has become of it.

    base: how the base is loaded. most_bytes: that the model may take. doing: what the process does
    now. why: it failed. certificate: how near the merged model is (`certificate.py`). model: where
    that goes. changed: when the adapter's files last did, as `last_change` has it.
    """

    name: str
    adapter: str
    model: str
    base: Mapping[str, Any] = field(default_factory=dict)
    most_bytes: int = 0
    state: Literal["running", "done", "failed"] = "running"
    doing: str = "starting"
    why: str = ""
    certificate: Mapping[str, Any] | None = None
    bytes: int = 0
    changed: int = 0


class Merges:
    """The merges below a directory, of one server. For any thread.

    is_busy: whether answers are computed, during which the process has `share` of the time.
    """

    def __init__(
        self,
        root: Path,
        base: TrainingBase,
        *,
        is_busy: Callable[[], bool],
        share: float,
        worker: Sequence[str] = MERGER,
    ) -> None:
        self.root, self.base, self.is_busy, self.share = root, base, is_busy, share
        self.worker = tuple(worker)
        self._lock, self._closing = Lock(), Event()
        self._thread: Thread | None = None
        self._last = ""  # the name that the thread's process merges
        for merge in self.all():
            if merge.state == "running":  # the server before this one was killed
                self._fail(merge, "The server ended meanwhile.")

    def start(self, name: str, adapter: Path, most_bytes: int) -> Merge:
        """Begin to merge an adapter, in place of what was merged of its name. Raises QueueFull."""
        with self._lock:
            if self._thread is not None and self._thread.is_alive():
                last = self.find(self._last)
                if last is None or last.state == "running":
                    raise QueueFull("Another adapter is merged now; come again when that is done.")
                self._thread.join()  # its process has written what it had to, and is ending
            base = asdict(self.base)
            model = str(self.root / name / MODEL)
            most, changed = max(0, most_bytes), last_change(adapter)
            merge = Merge(name, str(adapter), model, base, most, changed=changed)
            shutil.rmtree(self.root / name, ignore_errors=True)
            (self.root / name).mkdir(parents=True)
            write_json(self.root / name / STATE, asdict(merge))
            self._last = name
            self._thread = Thread(target=self._watch, args=(merge,), name="merge", daemon=True)
            self._thread.start()
        return merge

    def find(self, name: str) -> Merge | None:
        """Return what is merged of a name, or is being merged."""
        if not ADAPTER_NAME.fullmatch(name):  # it may lead out of the directory
            return None
        try:
            return Merge(**read_json(self.root / name / STATE))
        except (AdapterError, TypeError):
            return None

    def all(self) -> list[Merge]:
        """Return all merges."""
        merges = (self.find(place.parent.name) for place in sorted(self.root.glob(f"*/{STATE}")))
        return [merge for merge in merges if merge is not None]

    def close(self) -> None:
        """End a merge that goes on, and wait for it."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self, merge: Merge) -> None:
        """Let the process work until it ends. It is this thread's child, and ends with it."""
        directory = self.root / merge.name
        try:
            with (directory / OUTPUT).open("ab") as output:
                process = subprocess.Popen(
                    [*self.worker, str(directory), str(os.getpid())],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    process_group=0,
                )
        except OSError as error:
            self._fail(merge, f"Its process did not start ({error}).")
            return
        try:
            pace = Pace(process.pid, self.is_busy, self.share)
            while process.poll() is None and not self._closing.is_set():
                pace.step()
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            code = process.wait()
        now = self.find(merge.name)
        if now is None or now.state == "running":
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            why = f"Its process died ({how}), perhaps for want of memory."
            self._fail(merge, "The server ended meanwhile." if self._closing.is_set() else why)

    def _fail(self, merge: Merge, why: str) -> None:
        write_json(
            self.root / merge.name / STATE,
            asdict(replace(merge, state="failed", doing="", why=why)),
        )


def last_change(adapter: Path) -> int:
    """Return when the newest of an adapter's files changed, in nanoseconds; 0 for none."""
    changes = [0]
    for place in (adapter, *adapter.rglob("*")):
        with suppress(FileNotFoundError):  # it is just being replaced
            changes.append(place.stat().st_mtime_ns)
    return max(changes)
