"""The thread that lets jobs train, one at a time, each in a process of its own."""

from __future__ import annotations

import logging
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any

from veneer.files import size_of, write_json
from veneer.serve.jobs.log import End, read_on
from veneer.serve.jobs.pace import Pace
from veneer.serve.jobs.store import Store
from veneer.serve.jobs.values import UNENDED, Fault, Job, JobEvent, Places, WorkerFiles

log = logging.getLogger("veneer.serve")

WORKER = (sys.executable, "-m", "veneer.serve.jobs.worker")
LOOK_SECONDS = 0.2  # between looks at a worker's log, and at what is asked of it
PAUSE_SECONDS = 5.0  # after an error of the server's own
NOTE_SECONDS = 5.0  # between writings of how long it has trained, where nothing else happens
DISK_SECONDS = 10.0  # between looks at the size of its run
STOP_SECONDS = 120.0  # for the step that a worker is in, until it is ended by force
MOST_DEATHS = 3  # of a job's workers, until it is given up


@dataclass(frozen=True)
class Bounds:
    """What jobs may take.

    share: of the processors' time while answers are computed. hours: of one job. disk_bytes: of all
    files and runs together. upload_bytes: of one file. waiting: jobs that have not ended.
    """

    share: float = 0.1
    hours: float = 24.0
    disk_bytes: int = 50 * 10**9
    upload_bytes: int = 512 * 10**6
    waiting: int = 64


class Supervisor:
    """Starts workers, reads their logs into the store, and says what has become of their jobs.

    is_busy: whether answers are computed. publish: called with a job whose checkpoints are others,
    or that has a result; returns why that cannot be served, or nothing. keep_results: keeps the
    losses of a run as a file, and returns its id.
    """

    def __init__(
        self,
        store: Store,
        places: Places,
        bounds: Bounds,
        *,
        is_busy: Callable[[], bool],
        publish: Callable[..., str],
        keep_results: Callable[[Job], str],
        worker: Sequence[str] = WORKER,
    ) -> None:
        self.store, self.places, self.bounds = store, places, bounds
        self.is_busy, self.publish, self.keep_results = is_busy, publish, keep_results
        self.worker = tuple(worker)
        self.asked = Event()  # something may have changed
        self.is_ending = False
        self._thread = Thread(target=self._run, name="jobs", daemon=True)

    def start(self) -> None:
        """Begin, or go on with what the server before this one left."""
        self._thread.start()

    def end(self) -> None:
        """Let the worker stop after its step, with a checkpoint, and start no other."""
        self.is_ending = True
        self.asked.set()

    def close(self) -> None:
        """End, and wait for it."""
        self.end()
        if self._thread.ident is not None:  # it was started
            self._thread.join()

    def _run(self) -> None:
        while not self.is_ending:
            self.asked.clear()
            waiting: list[Job] = []
            try:
                waiting = self.store.jobs("running") or self.store.jobs("queued")
                if waiting:
                    self._train(waiting[0])
                else:
                    self.asked.wait(1.0)
            except Exception as error:
                log.exception("Training failed (%s).", waiting[0].id if waiting else "no job yet")
                with suppress(sqlite3.Error):  # the disk may be full, and that the very error
                    for job in waiting[:1]:
                        self._fail(job.id, Fault("server_error", f"The server failed: {error}"))
                self.asked.wait(PAUSE_SECONDS)

    def _train(self, job: Job) -> None:
        """Let one job train until its worker ends, and note what has become of it."""
        goes_on = job.attempt > 0
        text = "The fine-tuning job goes on." if goes_on else "Fine-tuning job started."
        begun = self.store.change(
            job.id,
            JobEvent(text),
            only=("queued", "running"),
            status="running",
            attempt=job.attempt + 1,
        )
        if begun is None:  # cancelled or paused meanwhile
            return
        files = WorkerFiles(self.places.run(begun))
        files.directory.mkdir(parents=True, exist_ok=True)
        if not files.settings.exists():
            write_json(files.settings, begun.settings)
        with files.output.open("ab") as output:
            process = subprocess.Popen(
                [*self.worker, str(files.run), str(begun.attempt), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,  # Ctrl-C in the server's terminal is the server's affair
            )
        watched = _Watched(self, begun, process)
        try:
            watched.until_it_ends()
        finally:
            watched.end_by_force()
        end = watched.read_log()
        self._settle(begun.id, begun.attempt, end, watched.limit, process.returncode)

    def _settle(
        self, id: str, attempt: int, end: End | None, limit: Fault | None, code: int
    ) -> None:
        """Note what has become of a job whose worker has ended."""
        job = self.store.job(id)
        assert job is not None
        if end is not None and end.how == "succeeded" and job.status != "cancelled":
            self._succeed(job)
        elif job.status != "running":  # cancelled or paused, as it was asked
            self.publish(job, result=False)
        elif limit is not None:
            self._fail(id, limit)
        elif end is not None and end.fault is not None:
            self._fail(id, end.fault)
        elif self.is_ending:
            return  # the next server goes on with it
        elif end is None and job.deaths + 1 >= MOST_DEATHS:
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            text = (
                f"Its process died {MOST_DEATHS} times ({how}), perhaps for want of memory. What "
                f"it printed is in {job.name}/.job/output.txt below --runs."
            )
            self._fail(id, Fault("worker_died", text))
        elif end is None:
            text = "The process that trains died; another one goes on."
            self.store.change(id, JobEvent(text, "warn"), deaths=job.deaths + 1)

    def _succeed(self, job: Job) -> None:
        result = self.keep_results(job)
        why = self.publish(job, result=True)
        text = f"New fine-tuned model created: {job.name}"
        self.store.change(
            job.id,
            JobEvent(f"It cannot be served: {why}", "warn") if why else JobEvent(text),
            JobEvent("The job has successfully completed."),
            only=UNENDED,  # it may have just been cancelled
            status="succeeded",
            finished=int(time.time()),
            result_files=(result,),
        )

    def _fail(self, id: str, fault: Fault) -> None:
        self.store.change(
            id,
            JobEvent(fault.message, "error"),
            only=UNENDED,
            status="failed",
            finished=int(time.time()),
            fault=fault,
        )


class _Watched:
    """A worker from its start to its end. limit: what it was stopped for, if it was."""

    def __init__(self, supervisor: Supervisor, job: Job, process: subprocess.Popen[bytes]) -> None:
        self.supervisor, self.process = supervisor, process
        self.id, self.attempt, self.read = job.id, job.attempt, job.read
        self.files = WorkerFiles(supervisor.places.run(job))
        self.limit: Fault | None = None
        self._before, self._began = job.seconds, time.monotonic()
        self._noted = 0.0  # when its time was last written down
        self._asked_at: float | None = None  # when it was asked to stop
        self._end: End | None = None

    @property
    def seconds(self) -> float:
        """How long the job has trained, in all its processes."""
        return self._before + time.monotonic() - self._began

    def until_it_ends(self) -> None:
        """Return when the process has ended, after reading its log again and again."""
        bounds, supervisor = self.supervisor.bounds, self.supervisor
        pace = Pace(self.process.pid, supervisor.is_busy, bounds.share)
        look = disk = 0.0
        while self.process.poll() is None:
            now = time.monotonic()
            if now >= look:
                look = now + LOOK_SECONDS
                self.read_log()
                if self._is_to_stop():
                    pace.free()
                    self._ask(now)
            if now >= disk:
                disk = now + DISK_SECONDS
                if size_of(supervisor.places.root) > bounds.disk_bytes:
                    most = f"{bounds.disk_bytes / 1e9:g} GB"
                    text = f"Files and runs take more than the {most} that they may."
                    self.limit = self.limit or Fault("disk_limit", text)
            if self._asked_at is None:
                pace.step()
            else:
                time.sleep(LOOK_SECONDS / 4)

    def end_by_force(self) -> None:
        """End the process where it has not ended."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def read_log(self) -> End | None:
        """Take what is new in the log into the store; return how the worker says that it ended."""
        store = self.supervisor.store
        while True:
            lines, read = read_on(self.files.log, self.read)
            if not lines and time.monotonic() < self._noted + NOTE_SECONDS:
                return self._end
            self._noted = time.monotonic()
            events = [line.content for line in lines if isinstance(line.content, JobEvent)]
            for line in lines:
                if isinstance(line.content, End) and line.attempt == self.attempt:
                    self._end = line.content
            job = store.change(
                self.id,
                *events,
                read=read,
                seconds=self.seconds,
                **_progress(events, store, self.id),
            )
            if job is not None and any("checkpoint" in (event.data or {}) for event in events):
                self.supervisor.publish(job, result=False)
            self.read = read
            if not lines:
                return self._end

    def _is_to_stop(self) -> bool:
        supervisor = self.supervisor
        job = supervisor.store.job(self.id)
        assert job is not None
        if self.seconds > 3600 * supervisor.bounds.hours and self.limit is None:
            text = f"It trained for the {supervisor.bounds.hours:g} hours that a job may take."
            self.limit = Fault("time_limit", text)
        return supervisor.is_ending or job.status != "running" or self.limit is not None

    def _ask(self, now: float) -> None:
        """Ask the process to stop; end it where it has been asked long ago."""
        if self._asked_at is None:
            self._asked_at = now
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGTERM)
        elif now - self._asked_at > STOP_SECONDS:
            self.process.kill()


def _progress(events: Sequence[JobEvent], store: Store, id: str) -> dict[str, Any]:
    """Return the values of a job that its events change."""
    values: dict[str, Any] = {}
    tokens = 0
    for event in events:
        data = event.data or {}
        if "total_steps" in data:
            values["steps"] = data["total_steps"]
        if "train_loss" in data:
            values["step"] = data["step"]
            tokens += data["tokens"]
    if tokens:
        job = store.job(id)
        assert job is not None
        values["tokens"] = job.tokens + tokens
    return values
