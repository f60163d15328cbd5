"""The thread that lets jobs train, in a process beside the server: several at a time where they can
share passes, and else one after another."""

from __future__ import annotations

import logging
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Event, Thread

from veneer.errors import StorageError
from veneer.files import write_json
from veneer.serve.jobs.settings import sharing_of
from veneer.serve.jobs.store import Store
from veneer.serve.jobs.values import UNENDED, Fault, Job, JobEvent, Places, WorkerFiles
from veneer.serve.jobs.watching import Bounds, Watched, WatchedWorker

log = logging.getLogger("veneer.serve")

WORKER = (sys.executable, "-m", "veneer.serve.jobs.worker")
PAUSE_SECONDS = 5.0  # after an error of the server's own
MOST_DEATHS = 3  # of a job's workers, until it is given up


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
        self._alone: set[str] = set()  # jobs that could not train beside others
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
                # The disk may be full, and that the very error.
                with suppress(sqlite3.Error, StorageError):
                    for job in waiting[:1]:
                        self._fail(job.id, Fault("server_error", f"The server failed: {error}"))
                self.asked.wait(PAUSE_SECONDS)

    def _train(self, job: Job) -> None:
        """Let a job train, with those that join it, until their worker ends, and note what has
        become of them."""
        if (first := self._begun(job, joins=False)) is None:
            return
        with first.files.output.open("ab") as output:
            process = subprocess.Popen(
                [*self.worker, str(first.files.run), str(first.attempt), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,  # Ctrl-C in the server's terminal is the server's affair
            )
        watched = WatchedWorker(
            process,
            first,
            self.store,
            lambda: self.bounds,
            publish=self.publish,
            settle=self._settle,
            joining=self._joining,
        )
        try:
            watched.until_it_ends(
                self.places, is_busy=self.is_busy, is_ending=lambda: self.is_ending
            )
        finally:
            watched.end()

    def _begun(self, job: Job, *, joins: bool) -> Watched | None:
        """Note that a job trains, and leave its settings to the worker; None for one that was
        cancelled or paused meanwhile."""
        goes_on = job.attempt > 0
        text = "The fine-tuning job goes on." if goes_on else "Fine-tuning job started."
        begun = self.store.change(
            job.id,
            JobEvent(text),
            only=("queued", "running"),
            status="running",
            attempt=job.attempt + 1,
        )
        if begun is None:
            return None
        files = WorkerFiles(self.places.run(begun))
        files.directory.mkdir(parents=True, exist_ok=True)
        files.remove_earlier(begun.attempt)
        if not files.settings.exists():
            write_json(files.settings, begun.settings)
        return Watched(begun, self.places, joins=joins)

    def _joining(self, training: Sequence[Watched]) -> list[Watched]:
        """Return jobs that begin now beside those that train. None passes one that has waited
        longer and cannot."""
        new: list[Watched] = []
        sharing = sharing_of(training[0].settings)
        if sharing is None:
            return new
        ids = {job.id for job in training}
        jobs = [*self.store.jobs("running"), *self.store.jobs("queued")]
        # What has died may have died for want of memory.
        alone = self._alone | {job.id for job in jobs if job.deaths}
        for job in jobs if alone.isdisjoint(ids) else ():
            if job.id in ids:
                continue
            is_full = len(training) + len(new) >= self.bounds.together
            if is_full or job.id in alone or sharing_of(job.settings) != sharing:
                break
            if (begun := self._begun(job, joins=True)) is not None:
                new.append(begun)
        return new

    def _settle(self, watched: Watched, code: int | None) -> None:
        """Note what has become of a job that has ended, or whose worker has. code: the worker's."""
        job, end = self.store.job(watched.id), watched.end
        assert job is not None
        if end is not None and end.how == "succeeded" and job.status != "cancelled":
            try:
                self._succeed(job)
            except (OSError, StorageError) as error:  # such as a full disk; the others go on
                log.exception("The end of %s could not be noted.", job.id)
                self._fail(job.id, Fault("server_error", f"The server failed: {error}"))
        elif job.status != "running":  # cancelled or paused, as it was asked
            self.publish(job, result=False)
        elif watched.limit is not None:
            self._fail(job.id, watched.limit)
        elif end is not None and end.fault is not None:
            self._fail(job.id, end.fault)
        elif end is not None and end.how == "apart":
            self._alone.add(job.id)
            text = "It cannot train beside the other jobs, and waits to train by itself."
            self.store.change(job.id, JobEvent(text), only=("running",), status="queued")
        elif self.is_ending:
            return  # the next server goes on with it
        elif end is None and not watched.is_heard and watched.joins:
            # The worker had ended before it looked.
            self.store.change(job.id, only=("running",), status="queued")
        elif end is None and job.deaths + 1 >= MOST_DEATHS:
            assert code is not None
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            text = (
                f"Its process died {MOST_DEATHS} times ({how}), perhaps for want of memory. What "
                f"it printed is in {job.name}/.job/output.txt below --runs."
            )
            self._fail(job.id, Fault("worker_died", text))
        elif end is None:
            text = "The process that trains died; another one goes on."
            self.store.change(job.id, JobEvent(text, "warn"), deaths=job.deaths + 1)

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
