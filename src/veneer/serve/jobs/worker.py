"""The process that trains one job: `tune`, with a log for the server.

    python -m veneer.serve.jobs.worker RUN ATTEMPT SERVER

It stops after a step, with a checkpoint, on SIGTERM and when the server is gone: nothing of ours
outlives the server, and the next one goes on from there, to the bit.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from veneer.errors import ConfigError, DataError, VeneerError
from veneer.files import read_json
from veneer.run_directory import RunDirectory, checkpoint_steps
from veneer.serve.jobs.lock import take
from veneer.serve.jobs.log import End, WorkerLog, read_on
from veneer.serve.jobs.messages import event_of
from veneer.serve.jobs.settings import settled
from veneer.serve.jobs.uploads import without_directory
from veneer.serve.jobs.values import Fault, WorkerFiles
from veneer.training.events import Started, Stopped, Verdict

NICENESS = 10  # behind the server, wherever both want a processor
PR_SET_PDEATHSIG = 1


class Asked:
    """Whether this process is to stop: by SIGTERM, or because its server is gone."""

    def __init__(self, server: int | None) -> None:
        self.server = server
        self.signalled = self.training = False

    def __call__(self) -> bool:
        return self.signalled or (self.server is not None and os.getppid() != self.server)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Take a signal. Before the first step there is nothing to keep."""
        self.signalled = True
        if not self.training:
            raise SystemExit(0)


def work(run: Path, attempt: int, asked: Asked) -> None:
    """Train the job in `run`, or go on with it, and write what becomes of it into its log."""
    files = WorkerFiles(run)
    log = WorkerLog(files.log, attempt)
    settings = read_json(files.settings)
    sources = [Path(settings["data"]), Path(settings["rows"].get("eval_data") or settings["data"])]
    with alone(files.lock):
        if _has_succeeded(files.log):  # under the server before this one, while that was away
            log.end("succeeded")
            return
        try:
            log.end(*_train(run, settings, log, asked))
        except SystemExit:
            log.end("stopped")
        except Exception as error:
            if not isinstance(error, VeneerError | OSError):
                traceback.print_exception(error)
            fault = fault_of(error)
            message = without_directory(fault.message, *sources)
            log.end("failed", Fault(fault.code, message, fault.param))


def _train(run: Path, settings: dict[str, Any], log: WorkerLog, asked: Asked) -> tuple[Any, ...]:
    """Train, and return how it ended, with the fault if there is one."""
    # Here, for they import torch: a signal that comes meanwhile ends the process at once.
    from veneer.training.tune import tune

    resume = bool(checkpoint_steps(RunDirectory(run).checkpoints))
    recipe = settled(settings, resume=resume)
    steps, verdict = None, None
    for event in tune(recipe, resume=resume, should_stop=asked):
        if isinstance(event, Started):
            steps, asked.training = event.steps, True
        if isinstance(event, Verdict):
            verdict = event
        if (entry := event_of(event, steps)) is not None:
            log.add(entry)
        if isinstance(event, Stopped) and event.reason == "interrupted":
            return ("stopped",)
    if verdict is not None and verdict.kind == "diverged":
        return "failed", Fault("diverged", verdict.text)
    return ("succeeded",)


def fault_of(error: Exception) -> Fault:
    """Return what a client is told of the error that ended a job."""
    match error:
        case DataError():
            return Fault("invalid_training_file", str(error), "training_file")
        case ConfigError():
            return Fault("invalid_settings", str(error))
        case VeneerError():
            return Fault("training_failed", str(error))
        case OSError():
            return Fault("disk_failed", str(error))
    return Fault(
        "server_error", f"The worker failed ({type(error).__name__}); its output says why."
    )


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Hold a lock, once whoever holds it has let it go: the worker of a server that was killed is
    still about to stop."""
    with lock.open("a") as file:
        take(file, wait=True)
        yield


def _has_succeeded(log: Path) -> bool:
    lines, at = read_on(log, 0)
    while lines:
        if any(isinstance(x.content, End) and x.content.how == "succeeded" for x in lines):
            return True
        lines, at = read_on(log, at)
    return False


def wake_without(server: int) -> None:
    """Let the system wake this process when its server dies: it may be stopped at that moment, and
    would never learn of it. Only Linux can; elsewhere the server stops nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGCONT)


def main(run: str, attempt: str, server: str) -> None:
    """Do the work of a worker process."""
    asked = Asked(int(server))
    signal.signal(signal.SIGTERM, asked.on_signal)
    wake_without(int(server))
    os.nice(NICENESS)
    work(Path(run), int(attempt), asked)


if __name__ == "__main__":
    main(*sys.argv[1:])
