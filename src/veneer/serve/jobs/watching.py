"""A worker from its start to its end, and the jobs that it trains: their logs are read into the
store, they are asked to stop, and others join them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from veneer.files import size_of, write_text
from veneer.serve.jobs.log import End, read_on
from veneer.serve.jobs.pace import Pace
from veneer.serve.jobs.store import Store
from veneer.serve.jobs.values import Fault, Job, JobEvent, Places, WorkerFiles

LOOK_SECONDS = 0.2  # between looks at a worker's logs, and at what is asked of it
NOTE_SECONDS = 5.0  # between writings of how long a job has trained, where nothing else happens
DISK_SECONDS = 10.0  # between looks at the size of all runs
STOP_SECONDS = 120.0  # for the step that a worker is in, until it is ended by force


@dataclass(frozen=True)
class Bounds:
    """What jobs may take.

    share: of the processors' time while answers are computed. hours: of one job. disk_bytes: of all
    files and runs together. upload_bytes: of one file. waiting: jobs that have not ended. together:
    jobs that train at the same time, in passes that they share.
    """

    share: float = 0.1
    hours: float = 24.0
    disk_bytes: int = 50 * 10**9
    upload_bytes: int = 512 * 10**6
    waiting: int = 64
    together: int = 4


class Watched:
    """A job of a worker. limit: what it was stopped for, if it was. end: how the worker says that
    it ended. is_heard: whether the worker has said anything of it. joins: whether its worker trains
    others already."""

    def __init__(self, job: Job, places: Places, *, joins: bool) -> None:
        self.id, self.attempt, self.joins = job.id, job.attempt, joins
        self.read, self.settings = job.read, job.settings
        self.files = WorkerFiles(places.run(job))
        self.limit: Fault | None = None
        self.end: End | None = None
        self.is_heard = False
        self.is_asked = False  # to stop
        self._before, self._began = job.seconds, time.monotonic()
        self._noted = 0.0  # when its time was last written down

    @property
    def seconds(self) -> float:
        """How long the job has trained, in all its processes."""
        return self._before + time.monotonic() - self._began

    def read_log(self, store: Store, publish: Callable[..., str]) -> None:
        """Take what is new in the log into the store."""
        while True:
            lines, read = read_on(self.files.log, self.read)
            if not lines and time.monotonic() < self._noted + NOTE_SECONDS:
                return
            self._noted = time.monotonic()
            events = [line.content for line in lines if isinstance(line.content, JobEvent)]
            for line in lines:
                if line.attempt == self.attempt:
                    self.is_heard = True
                    self.end = line.content if isinstance(line.content, End) else self.end
            job = store.change(
                self.id,
                *events,
                read=read,
                seconds=self.seconds,
                **_progress(events, store, self.id),
            )
            if job is not None and any("checkpoint" in (event.data or {}) for event in events):
                publish(job, result=False)
            self.read = read
            if not lines:
                return

    def is_to_stop(self, store: Store, bounds: Bounds) -> bool:
        """Return whether somebody, or a bound, wants the job to stop."""
        job = store.job(self.id)
        assert job is not None
        if self.seconds > 3600 * bounds.hours and self.limit is None:
            text = f"It trained for the {bounds.hours:g} hours that a job may take."
            self.limit = Fault("time_limit", text)
        return job.status != "running" or self.limit is not None


class WatchedWorker:
    """A worker and its jobs, of which the first began it.

    publish: as the supervisor has it. settle: called with a job that has ended, or whose worker
    has, and with the worker's exit code, None while it goes on. joining: called with the jobs that
    train, returns those that join them.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        first: Watched,
        store: Store,
        bounds: Callable[[], Bounds],
        *,
        publish: Callable[..., str],
        settle: Callable[[Watched, int | None], None],
        joining: Callable[[Sequence[Watched]], Sequence[Watched]],
    ) -> None:
        self.process, self.first, self.jobs = process, first, [first]
        self.store, self.bounds = store, bounds
        self.publish, self.settle, self.joining = publish, settle, joining
        self._joined: list[str] = []  # lines of the file that says who joins
        self._asked_at: float | None = None  # when the process was asked to stop

    def until_it_ends(
        self, places: Places, *, is_busy: Callable[[], bool], is_ending: Callable[[], bool]
    ) -> None:
        """Return when the process has ended, after reading its logs again and again.

        is_busy: whether answers are computed. is_ending: whether the server is.
        """
        pace = Pace(self.process.pid, is_busy, self.bounds().share)
        look = disk = 0.0
        stops = False  # a job, for which the process must run
        while self.process.poll() is None:
            now = time.monotonic()
            if now >= look:
                look = now + LOOK_SECONDS
                stops = self._look(now, is_ending=is_ending())
            if now >= disk:
                disk = now + DISK_SECONDS
                if size_of(places.root) > (most := self.bounds().disk_bytes):
                    text = f"Files and runs take more than the {most / 1e9:g} GB that they may."
                    for job in self.jobs:
                        job.limit = job.limit or Fault("disk_limit", text)
            if stops:
                pace.free()
                time.sleep(LOOK_SECONDS / 4)
            else:
                pace.step()

    def end(self) -> None:
        """End the process where it has not ended, and settle what is left of its jobs."""
        if self.process.poll() is None:
            self.process.kill()
        code = self.process.wait()
        self.first.files.joined(self.first.attempt).unlink(missing_ok=True)
        for job in self.jobs:
            job.read_log(self.store, self.publish)
            self.settle(job, code)
        self.jobs = []

    def _look(self, now: float, *, is_ending: bool) -> bool:
        """Take what the worker has written, settle jobs that have ended, tell it what is asked, and
        return whether a job is to stop."""
        for job in list(self.jobs):
            job.read_log(self.store, self.publish)
            # The last one's end is its worker's, which is about to come.
            if job.end is not None and len(self.jobs) > 1:
                self.jobs.remove(job)
                self.settle(job, None)
        stopping = [j for j in self.jobs if is_ending or j.is_to_stop(self.store, self.bounds())]
        if len(stopping) == len(self.jobs):
            self._ask(now)
            return True
        for job in stopping:
            if not job.is_asked:
                job.is_asked = True
                write_text(job.files.stop(job.attempt), "")
        if not stopping and any(job.end is None for job in self.jobs):
            self._join()
        return bool(stopping)

    def _join(self) -> None:
        new = self.joining(self.jobs)
        if new:
            self.jobs += new
            self._joined += [f"{job.files.run}\t{job.attempt}\n" for job in new]
            write_text(self.first.files.joined(self.first.attempt), "".join(self._joined))

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
