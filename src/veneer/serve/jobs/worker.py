"""The process that trains jobs: `tune`, with a log for the server; or several in passes that they
share, of which the first begins it and others join.

    python -m veneer.serve.jobs.worker RUN ATTEMPT SERVER

It stops after a step, with a checkpoint, on SIGTERM and when the server is gone: nothing of ours
outlives the server, and the next one goes on from there, to the bit where a job trains by itself. A
file beside a job's log stops that job alone.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import IO, Any

from veneer.errors import ConfigError, DataError, VeneerError
from veneer.files import read_json, write_json
from veneer.run_directory import RunDirectory, checkpoint_steps
from veneer.serve.jobs.lock import take
from veneer.serve.jobs.log import End, How, WorkerLog, read_on
from veneer.serve.jobs.messages import event_of
from veneer.serve.jobs.settings import settled, sharing_of
from veneer.serve.jobs.uploads import without_directory
from veneer.serve.jobs.values import Fault, JobEvent, WorkerFiles
from veneer.training.events import Ended, Event, Failed, Started, Stopped, Verdict
from veneer.training.recipe import Recipe

# What a client is told; which file it was, and why, is for the worker's output.
DISK_FAILED = "The disk of the server is full, or fails. The job can be resumed when there is room."

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


class Work:
    """One job in this process: its settings, its log, and how it ended, once it has."""

    def __init__(self, run: Path, attempt: int, asked: Asked) -> None:
        self.run, self.attempt, self.asked = run, attempt, asked
        self.files = WorkerFiles(run)
        self.log = WorkerLog(self.files.log, attempt)
        self.settings: dict[str, Any] = read_json(self.files.settings)
        self.has_ended = self.has_started = False
        self._steps: int | None = None
        self._verdict: Verdict | None = None

    def recipe(self) -> Recipe:
        """Return what is to be trained. Raises what `settled` raises."""
        if grader := self.settings.get("grader"):
            write_json(self.files.grader, grader)  # which the recipe names as its reward
        return settled(self.settings, resume=self.resumes)

    @property
    def resumes(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return bool(checkpoint_steps(RunDirectory(self.run).checkpoints))

    def is_to_stop(self) -> bool:
        return self.asked() or self.files.stop(self.attempt).exists()

    def take(self, event: Event) -> None:
        """Write an event into the log, and the end where the job ends by it."""
        match event:
            case Started():
                self._steps, self.has_started = event.steps, True
                self.asked.training = True
            case Verdict():
                self._verdict = event
            case Failed(error):
                self.fail(error)
            case Ended():
                self.end("succeeded")
        if (entry := event_of(event, self._steps)) is not None:
            self.log.add(entry)
        if isinstance(event, Stopped) and event.reason == "interrupted":
            self.end("stopped")

    def end(self, how: How, fault: Fault | None = None) -> None:
        """Write how the job ended, if it has not ended before."""
        if self.has_ended:
            return
        if how == "succeeded" and self._verdict is not None and self._verdict.kind == "diverged":
            how, fault = "failed", Fault("diverged", self._verdict.text)
        self.has_ended = True
        self.files.stop(self.attempt).unlink(missing_ok=True)
        self.log.end(how, fault)

    def fail(self, error: Exception) -> None:
        """Write by which error the job ended: its own, where one that names jobs is about that."""
        if isinstance(error, ConfigError) and isinstance(error.__cause__, VeneerError | OSError):
            error = error.__cause__
        if not isinstance(error, VeneerError):
            traceback.print_exception(error)
        elif isinstance(error, OSError):
            print(error, file=sys.stderr)
        fault = fault_of(error)
        rows = self.settings["rows"]
        sources = [
            Path(self.settings["data"]),
            Path(rows.get("eval_data") or self.settings["data"]),
        ]
        message = without_directory(fault.message, *sources)
        self.end("failed", Fault(fault.code, message, fault.param))

    def has_succeeded(self) -> bool:
        """Return whether the job succeeded under the server before this one, while that was
        away."""
        lines, at = read_on(self.files.log, 0)
        while lines:
            if any(isinstance(x.content, End) and x.content.how == "succeeded" for x in lines):
                return True
            lines, at = read_on(self.files.log, at)
        return False


def work(run: Path, attempt: int, asked: Asked) -> None:
    """Train the job in `run`, or go on with it, and those that join it, and write what becomes of
    each into its log."""
    first = Work(run, attempt, asked)
    with Together(first) as together:
        if first.has_succeeded():
            first.end("succeeded")
            return
        try:
            if sharing_of(first.settings) is None:
                _train_alone(first)
            else:
                together.train()
        except SystemExit:
            together.end_all("stopped")
        except Exception as error:
            together.fail_all(error)


def _train_alone(job: Work) -> None:
    # Here, for it imports torch: a signal that comes meanwhile ends the process at once.
    from veneer.training.tune import tune

    for event in tune(job.recipe(), resume=job.resumes, should_stop=job.is_to_stop):
        job.take(event)
        if job.has_ended:
            return
    job.take(Ended())


class Together:
    """Jobs that train in passes that they share, and those that join them."""

    def __init__(self, first: Work) -> None:
        self.asked, self.jobs = first.asked, {first.run.name: first}
        self._joined = first.files.joined(first.attempt)
        self._read = 0  # lines of that file
        self._waiting: list[Work] = []  # for the locks of their runs
        self._locks: dict[str, IO[str]] = {}  # held, by the names of runs that have not ended

    def __enter__(self) -> Together:
        for job in self.jobs.values():
            self._holds(job, wait=True)  # for a killed server's worker, which is about to stop
        return self

    def __exit__(self, *error: object) -> None:
        for lock in self._locks.values():
            lock.close()

    def train(self) -> None:
        """Train them all. Raises what the first one's recipe raises before it trains."""
        from veneer.training.many.tune import tune_many

        (first,) = self.jobs.values()
        events = tune_many(
            {first.run.name: first.recipe()},
            resume=True,
            joining=self._joining,
            should_stop=lambda name: self.jobs[name].is_to_stop(),
        )
        for name, event in events:
            for job in [self.jobs[name]] if name else list(self.jobs.values()):
                if isinstance(event, Failed) and not job.has_started and job is not first:
                    # By itself it may have the memory, or fail by its own fault.
                    job.end("apart")
                elif not job.has_ended:
                    job.take(event)
                self._let_go(job)

    def end_all(self, how: How) -> None:
        """End what has not ended."""
        for job in (*self.jobs.values(), *self._waiting):
            job.end(how)

    def fail_all(self, error: Exception) -> None:
        """End what has not ended by an error of all: a job alone fails, and each of several goes on
        by itself, where it may have the memory, or fail by its own fault."""
        jobs = [job for job in self.jobs.values() if not job.has_ended]
        if len(jobs) > 1:
            traceback.print_exception(error)
        for job in jobs:
            if len(jobs) > 1:
                job.end("apart")
            else:
                job.fail(error)
        for job in self._waiting:
            job.end("apart")

    def _joining(self) -> Mapping[str, Recipe]:
        """Return the recipes of jobs that join now."""
        self._waiting += self._new()
        recipes: dict[str, Recipe] = {}
        for job in list(self._waiting):
            if not self._holds(job, wait=False):
                continue
            self._waiting.remove(job)
            self.jobs[job.run.name] = job
            try:
                if job.has_succeeded():
                    job.end("succeeded")
                elif job.is_to_stop():
                    job.end("stopped")
                else:
                    recipes[job.run.name] = job.recipe()
                    job.log.add(JobEvent("It joins a process that trains other jobs."))
            except Exception as error:  # the others go on
                job.fail(error)
            self._let_go(job)
        return recipes

    def _holds(self, job: Work, *, wait: bool) -> bool:
        """Return whether this process has the lock of a job's run from now on."""
        file = job.files.lock.open("a")
        if not take(file, wait=wait):
            file.close()
            return False
        self._locks[job.run.name] = file
        return True

    def _let_go(self, job: Work) -> None:
        """Let others have the run of a job that has ended, this process again among them."""
        if job.has_ended and job.run.name in self._locks:
            self._locks.pop(job.run.name).close()

    def _new(self) -> list[Work]:
        """Return the jobs that the server has let join since the last look."""
        try:
            lines = self._joined.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []
        new, self._read = lines[self._read :], len(lines)
        runs = (line.rsplit("\t", 1) for line in new)
        return [Work(Path(run), int(attempt), self.asked) for run, attempt in runs]


def fault_of(error: Exception) -> Fault:
    """Return what a client is told of the error that ended a job."""
    match error:
        case DataError():
            return Fault("invalid_training_file", str(error), "training_file")
        case ConfigError():
            return Fault("invalid_settings", str(error))
        case OSError():  # a StorageError is one too
            return Fault("disk_failed", DISK_FAILED)
        case VeneerError():
            return Fault("training_failed", str(error))
    return Fault(
        "server_error", f"The worker failed ({type(error).__name__}); its output says why."
    )


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
