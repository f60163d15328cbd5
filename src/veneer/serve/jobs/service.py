"""All that clients can ask of files and jobs; HTTP is in `api/`."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from veneer.data.rows import RowShape
from veneer.errors import Missing, QueueFull, RequestError, VeneerError
from veneer.files import size_of
from veneer.objectives.config import Objective, ObjectiveName
from veneer.run_directory import RunDirectory
from veneer.serve.engine.served import Served
from veneer.serve.jobs import uploads
from veneer.serve.jobs.lock import take
from veneer.serve.jobs.merges import MERGER, Merge, Merges, last_change
from veneer.serve.jobs.publisher import Publisher
from veneer.serve.jobs.settings import TrainingBase, settings_of
from veneer.serve.jobs.store import Store
from veneer.serve.jobs.supervisor import WORKER, Supervisor
from veneer.serve.jobs.values import (
    MOST_OF_NAME,
    UNENDED,
    Job,
    JobEvent,
    Kind,
    Places,
    Status,
    StoredFile,
    new_id,
)
from veneer.serve.jobs.watching import Bounds

OF_SAMPLES = ("reward", "kl", "entropy")  # what results have of a run on samples, beside losses
# What rows a file may hold for each shape that an objective reads.
KINDS_FOR: Mapping[RowShape, tuple[Kind, ...]] = {
    "answers": ("answers",),
    "pairs": ("pairs",),
    "judged": ("answers", "pairs"),
    "prompts": ("prompts", "answers"),  # of which the last one is a reference
}
NO_ANSWER = "a completion beside its prompt, or an assistant's turn at the end of its messages"
_STRANGE = re.compile(r"[^A-Za-z0-9]+")


@dataclass(frozen=True)
class Order:
    """What a client asks to be trained."""

    model: str
    training_file: str
    validation_file: str | None = None
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    suffix: str | None = None
    metadata: Mapping[str, str] | None = None
    grader: Mapping[str, Any] | None = None
    remarks: tuple[str, ...] = ()  # on what of the order does nothing here


class Jobs:
    """The files and jobs below a directory, of one server. For any thread."""

    def __init__(
        self,
        root: Path,
        served: Served,
        base: TrainingBase,
        bounds: Bounds | None = None,
        *,
        worker: Sequence[str] = WORKER,
        merger: Sequence[str] = MERGER,
    ) -> None:
        """Open what is below `root`. Raises VeneerError where another server trains there."""
        self.places, self.base, self.bounds = Places(root.resolve()), base, bounds or Bounds()
        self.served = served
        self._lock = _held(self.places.lock, root)
        self.store = Store(self.places.database)
        uploads.settle_unfinished(self.store, self.places)
        self.publisher = Publisher(served, self.places)
        self.supervisor = Supervisor(
            self.store,
            self.places,
            self.bounds,
            is_busy=self._is_busy,
            publish=self.publisher.publish,
            keep_results=self._keep_results,
            worker=worker,
        )
        self.merges = Merges(
            self.places.merged,
            base,
            is_busy=self._is_busy,
            share=self.bounds.share,
            worker=merger,
        )

    def start(self) -> None:
        """Serve what was trained before, and go on with what was not ended."""
        before = max((entry.version for entry in self.served.library.entries()), default=0)
        for job in self.store.jobs():
            self.publisher.publish(job, result=job.status == "succeeded", load=False)
        self.served.engine.refuse_unservable(since=before)
        self.supervisor.start()

    def end(self) -> None:
        """Let a training stop with a checkpoint; the next server goes on with it."""
        self.supervisor.end()

    def close(self) -> None:
        """End, and wait until nothing trains any more."""
        self.supervisor.close()
        self.merges.close()
        self.store.close()
        self._lock.close()

    # Files

    def upload(self, filename: str, source: BinaryIO, size: int) -> StoredFile:
        """Check and keep a file. Raises RequestError for faults, with their places."""
        self._check_disk(size)
        return uploads.keep(self.store, self.places, filename, source)

    def files(self) -> list[StoredFile]:
        """Return all files, the oldest first."""
        return uploads.known(self.store, self.places)

    def file(self, id: str, *, param: str = "file_id") -> StoredFile:
        """Return a file. Raises Missing."""
        file = self.store.file(id)
        if file is None or not self.places.file(file).is_file():
            raise Missing(f"There is no file {id[:80]!r}.", param=param)
        return file

    def remove_file(self, id: str) -> None:
        """Remove a file. Raises Missing, and RequestError where a job needs it."""
        uploads.remove(self.store, self.places, self.file(id))

    # Jobs

    def create(self, order: Order) -> Job:
        """Take a job into the queue. Raises RequestError, ConfigError or QueueFull."""
        adapter = self.served.adapter(order.model)
        training = self._rows(order.training_file, "training_file")
        valid = order.validation_file and self._rows(order.validation_file, "validation_file")
        objective = order.own.get("objective", "sft")
        _check_kind(training, objective, "training_file")
        if valid:
            _check_kind(valid, objective, "validation_file")
        self._check_disk(0)
        id = new_id("ftjob")
        called = _STRANGE.sub("-", order.suffix or order.model).strip("-")[:MOST_OF_NAME]
        name = f"ft-{called.strip('-') or 'model'}-{id[-8:]}"
        job = Job(
            id,
            order.model,
            name,
            int(time.time()),
            order.training_file,
            settings_of(
                self.base,
                data=self.places.file(training),
                valid=self.places.file(valid) if valid else None,
                out=self.places.root / name,
                start_from=self.served.library.info(adapter).directory if adapter else None,
                seed=order.seed,
                hyperparameters=order.hyperparameters,
                own=order.own,
                grader=order.grader,
            ),
            dict(order.hyperparameters),
            order.validation_file,
            order.seed,
            order.suffix,
            order.metadata,
        )
        events = [
            JobEvent(f"Created fine-tuning job: {id}"),
            *(JobEvent(text, "warn") for text in order.remarks),
            JobEvent(f"Validating training file: {training.id}"),
            JobEvent("Files validated, moving job to queued state"),
        ]
        most = self.bounds.waiting
        if not self.store.add_job(job, events, most=most):
            raise QueueFull(f"{most} jobs wait already; cancel some, or wait.")
        self.supervisor.asked.set()
        return job

    def job(self, id: str) -> Job:
        """Return a job. Raises Missing."""
        if (job := self.store.job(id)) is None:
            raise Missing(f"There is no job {id[:80]!r}.", param="fine_tuning_job_id")
        return job

    def losses(self, job: Job) -> list[dict[str, Any]]:
        """Return the losses of a job's run, a mapping for each step and each evaluation."""
        return RunDirectory(self.places.run(job)).read_metrics()

    def cancel(self, id: str) -> Job:
        """End a job for good; its checkpoints stay."""
        finished = int(time.time())
        return self._move(id, UNENDED, "cancelled", "The job was cancelled.", finished=finished)

    def pause(self, id: str) -> Job:
        """Let a job stop after its step, until it is resumed."""
        return self._move(id, ("queued", "running"), "paused", "The job is paused.")

    def resume(self, id: str) -> Job:
        """Let a job go on that was paused, or that failed."""
        job, fresh = self.job(id), {}
        if job.status == "failed":  # the limit of time begins anew
            fresh = {
                "fault": None,
                "finished": None,
                "seconds": 0.0,
                "since": job.step,
                "deaths": 0,
            }
        return self._move(id, ("paused", "failed"), "queued", "The job is to go on.", **fresh)

    # Merged models

    def merge(self, name: str) -> Merge:
        """Begin to merge an adapter that is served. Raises RequestError or QueueFull."""
        if self.served.adapter(name) is None:
            raise RequestError(f"{name} is the base, which has nothing to merge.", param="model")
        left = self._check_disk(0)
        return self.merges.start(name, self.served.library.info(name).directory, left)

    def merged(self, name: str) -> Merge | None:
        """Return what is merged of an adapter, on demand or by its job; None for nothing yet, and
        where the name means another adapter by now."""
        if (merge := self.merges.find(name)) is not None:
            return None if self._is_outdated(merge) else merge
        job = next((job for job in self.store.jobs("succeeded") if job.name == name), None)
        if job is None:
            return None
        run = RunDirectory(self.places.run(job))
        events = self.store.events(job.id, limit=1, kind="certificate")
        if not events or not run.merged().is_dir():
            return None
        certificate, size = (events[0].data or {})["certificate"], size_of(run.merged())
        return Merge(
            name,
            str(run.adapter()),
            str(run.merged()),
            state="done",
            doing="",
            certificate=certificate,
            bytes=size,
        )

    def _is_outdated(self, merge: Merge) -> bool:
        entry = self.served.library.find(merge.name)
        if merge.state == "running" or entry is None:
            return False
        now = (str(entry.directory), last_change(entry.directory))
        return (merge.adapter, merge.changed) != now

    def _move(
        self, id: str, only: Sequence[Status], status: Status, text: str, **fields: Any
    ) -> Job:
        job = self.job(id)
        moved = self.store.change(id, JobEvent(text), only=only, status=status, **fields)
        if moved is None:
            now = self.job(id).status
            raise RequestError(
                f"{job.id} is {now}; only a job that is {' or '.join(only)} can become {status}.",
                param="fine_tuning_job_id",
            )
        self.supervisor.asked.set()
        return moved

    def _rows(self, id: str, param: str) -> StoredFile:
        file = self.file(id, param=param)
        if file.purpose != "fine-tune":
            raise RequestError(f"{id} holds results, no rows to learn.", param=param)
        return file

    def _check_disk(self, more: int) -> int:
        """Return the bytes that are left. Raises RequestError where there are not as many more."""
        used, most = size_of(self.places.root), self.bounds.disk_bytes
        if used + more > most:
            raise RequestError(
                f"Files and runs take {used / 1e6:,.0f} of the {most / 1e6:,.0f} MB that they may; "
                "delete files, or runs below --runs."
            )
        return most - used

    def _is_busy(self) -> bool:
        stats = self.served.engine.stats
        return bool(stats.active or stats.waiting)

    def _keep_results(self, job: Job) -> str:
        """Keep a run's losses as a file, as OpenAI's jobs have it, and return its name."""
        name = f"{job.name}-metrics.csv"
        for file in self.files():
            if (file.filename, file.purpose) == (name, "fine-tune-results"):
                return file.id  # kept by a server that was killed right after
        measured = self.losses(job)
        names = {"train_loss": "loss", "valid_loss": "eval_loss"}
        names |= {"valid_reward": "eval_reward"} | {name: name for name in OF_SAMPLES}
        known = {"loss", "eval_loss"}.union(*measured)
        names = {name: key for name, key in names.items() if key in known}
        lines = [",".join(["step", *names])]
        lines += [
            ",".join(str(line.get(key, "")) for key in ("step", *names.values()))
            for line in measured
        ]
        text = "\n".join([*lines, ""])
        kept = uploads.keep_text(self.store, self.places, name, text, "fine-tune-results")
        return kept.id


def _check_kind(file: StoredFile, objective: ObjectiveName, param: str) -> None:
    """Raise RequestError where an objective cannot learn from what a file holds."""
    learns_from = KINDS_FOR[Objective(objective).shape]
    if file.kind is not None and file.kind not in learns_from:
        why = f", as no row has {NO_ANSWER}" if file.kind == "prompts" else ""
        needs = " or ".join(learns_from)
        raise RequestError(
            f"{file.id} holds {file.kind}{why}; {objective} learns from {needs}.", param=param
        )


def _held(path: Path, root: Path) -> TextIO:
    """Hold the lock of a directory. Raises VeneerError where another server does."""
    file = path.open("a")
    if not take(file, wait=False):
        file.close()
        raise VeneerError(f"Another server trains below {root}; name another --runs.")
    return file
