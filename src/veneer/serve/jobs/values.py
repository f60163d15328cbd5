"""Files and jobs as values, and where they lie below --runs. Imports no torch."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Purpose = Literal["fine-tune", "fine-tune-results"]
# What the rows of a file are: answers to learn, pairs of a chosen and a rejected one, or prompts.
Kind = Literal["answers", "pairs", "prompts"]
Status = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
Level = Literal["info", "warn", "error"]
ENDED: tuple[Status, ...] = ("succeeded", "failed", "cancelled")
UNENDED: tuple[Status, ...] = ("queued", "running", "paused")
MOST_OF_NAME = 40  # characters of a suffix in a model's name, so that `.step-000000` fits behind it


@dataclass(frozen=True)
class StoredFile:
    """A file of rows, or of a job's results. `filename` is what the client calls it; `name` is what
    it is called on the disk. `created` is in seconds since 1970, as all times are. `kind` is that
    of its first row, None for no rows, and for a file that came before kinds were noted."""

    id: str
    filename: str
    name: str
    purpose: Purpose
    bytes: int
    created: int
    rows: int = 0
    kind: Kind | None = None


@dataclass(frozen=True)
class Fault:
    """Why a job failed; `param` names what the client gave, where that is at fault."""

    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True)
class Job:
    """A training that was asked for.

    model          the base or the adapter that the client named
    name           what the result is called, and its run's directory
    settings       what the worker makes a recipe of (`settings.py`)
    hyperparameters  as OpenAI has them, each a number or "auto"
    seconds        trained since the job was created or resumed after a failure, in all processes
    since          the step that it had come to then
    deaths         processes that ended without a word
    read           bytes of the worker's log that are in the database
    """

    id: str
    model: str
    name: str
    created: int
    training_file: str
    settings: Mapping[str, Any]
    hyperparameters: Mapping[str, Any]
    validation_file: str | None = None
    seed: int = 0
    suffix: str | None = None
    metadata: Mapping[str, str] | None = None
    status: Status = "queued"
    finished: int | None = None
    fault: Fault | None = None
    step: int = 0
    steps: int | None = None
    tokens: int = 0
    seconds: float = 0.0
    since: int = 0
    deaths: int = 0
    attempt: int = 0
    read: int = 0
    result_files: tuple[str, ...] = field(default=())

    @property
    def has_ended(self) -> bool:
        """Whether nothing will happen to it any more."""
        return self.status in ENDED


@dataclass(frozen=True)
class JobEvent:
    """Something that happened to a job; `data` are its numbers where it is a measurement."""

    message: str
    level: Level = "info"
    data: Mapping[str, Any] | None = None
    created: int = 0
    number: int = 0

    @property
    def id(self) -> str:
        """Return the name under which a client pages on."""
        return f"ftevent-{self.number:012d}"


def new_id(prefix: str) -> str:
    """Return an identifier that nobody guesses."""
    return f"{prefix}-{secrets.token_hex(12)}"


@dataclass(frozen=True)
class Places:
    """Where everything lies below the directory of runs, each of which is a plain run of tune."""

    root: Path

    @property
    def database(self) -> Path:
        return self.root / "jobs.sqlite"

    @property
    def lock(self) -> Path:
        """Held by the server that trains below this directory: there is one."""
        return self.root / ".jobs.lock"

    @property
    def files(self) -> Path:
        return self.root / "files"

    @property
    def merged(self) -> Path:
        """Models that were merged on demand; those of jobs are in their runs."""
        return self.root / "merged"

    def file(self, file: StoredFile) -> Path:
        return self.files / file.id / file.name

    def run(self, job: Job) -> Path:
        return self.root / job.name


@dataclass(frozen=True)
class WorkerFiles:
    """The files by which the server and a worker know of each other, inside a run's directory."""

    run: Path

    @property
    def directory(self) -> Path:
        return self.run / ".job"

    @property
    def settings(self) -> Path:
        """What is to be trained."""
        return self.directory / "settings.json"

    @property
    def grader(self) -> Path:
        """What judges the samples of a job that learns from them."""
        return self.directory / "grader.json"

    @property
    def log(self) -> Path:
        """A JSON line for each event, written as they happen."""
        return self.directory / "events.jsonl"

    def stop(self, attempt: int) -> Path:
        """Written where one of a worker's jobs is to stop, and the others go on."""
        return self.directory / f"stop-{attempt}"

    def joined(self, attempt: int) -> Path:
        """The runs that join the worker that this one began, each with its attempt on a line."""
        return self.directory / f"joined-{attempt}"

    def remove_earlier(self, attempt: int) -> None:
        """Remove what a server that was killed has left for attempts before this one."""
        for left in (*self.directory.glob("joined-*"), *self.directory.glob("stop-*")):
            if int(left.name.rpartition("-")[2]) < attempt:
                left.unlink(missing_ok=True)

    @property
    def output(self) -> Path:
        """What the process and its libraries print."""
        return self.directory / "output.txt"

    @property
    def lock(self) -> Path:
        """Held by the worker: one process trains in a directory."""
        return self.directory / "lock"
