"""Files, jobs and their events in SQLite. One connection, for any thread of the server.

The worker never opens the database: it may be stopped at any moment, and would then hold a lock.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from threading import RLock
from typing import Any

from veneer.errors import VeneerError
from veneer.files import disk_errors, storage_error
from veneer.serve.jobs.values import UNENDED, Fault, Job, JobEvent, Status, StoredFile

VERSION = 1
TABLES = """
    CREATE TABLE files (number INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, body TEXT NOT NULL);
    CREATE TABLE jobs (
        number INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, status TEXT NOT NULL,
        body TEXT NOT NULL
    );
    CREATE TABLE events (
        number INTEGER PRIMARY KEY AUTOINCREMENT, job TEXT NOT NULL, created INTEGER NOT NULL,
        level TEXT NOT NULL, message TEXT NOT NULL, data TEXT
    );
    CREATE INDEX events_of_job ON events (job, number);
"""


class Store:
    """What outlives the server, in `path`. Each method is one transaction, and raises StorageError
    where the disk is full or fails."""

    def __init__(self, path: Path) -> None:
        """Open the database, or make it. Raises VeneerError for a file that is none of ours."""
        self.path, self._lock = path, RLock()
        try:
            self._connection = sqlite3.connect(path, check_same_thread=False)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            (version,) = self._connection.execute("PRAGMA user_version").fetchone()
            if version == 0:
                self._connection.executescript(
                    f"BEGIN; {TABLES} PRAGMA user_version={VERSION}; COMMIT;"
                )
        except sqlite3.Error as error:
            if explained := storage_error(error, path):
                raise explained from error
            raise VeneerError(f"The jobs in {path} cannot be read: {error}.") from error
        if version > VERSION:
            raise VeneerError(f"{path} was written by a later version of Veneer.")

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    # Files

    def add_file(self, file: StoredFile) -> None:
        self._write("INSERT INTO files (id, body) VALUES (?, ?)", file.id, _text(asdict(file)))

    def remove_file(self, id: str) -> None:
        self._write("DELETE FROM files WHERE id = ?", id)

    def file(self, id: str) -> StoredFile | None:
        rows = self._read("SELECT body FROM files WHERE id = ?", id)
        return StoredFile(**json.loads(rows[0][0])) if rows else None

    def files(self) -> list[StoredFile]:
        """Return all files, the oldest first."""
        rows = self._read("SELECT body FROM files ORDER BY number")
        return [StoredFile(**json.loads(body)) for (body,) in rows]

    # Jobs

    def add_job(self, job: Job, events: Sequence[JobEvent], *, most: int) -> bool:
        """Add a job, unless `most` jobs have not ended; return whether it was added."""
        with self._transaction():
            if len(self.jobs(*UNENDED)) >= most:
                return False
            self._connection.execute(
                "INSERT INTO jobs (id, status, body) VALUES (?, ?, ?)",
                (job.id, job.status, _text(asdict(job))),
            )
            self._add_events(job.id, events)
            return True

    def job(self, id: str) -> Job | None:
        rows = self._read("SELECT body FROM jobs WHERE id = ?", id)
        return _job(rows[0][0]) if rows else None

    def jobs(self, *statuses: Status) -> list[Job]:
        """Return the jobs of some statuses, or all, the oldest first."""
        marks = ", ".join("?" * len(statuses))
        which = f"WHERE status IN ({marks})" if statuses else ""
        rows = self._read(f"SELECT body FROM jobs {which} ORDER BY number", *statuses)  # noqa: S608
        return [_job(body) for (body,) in rows]

    def change(
        self,
        id: str,
        *events: JobEvent,
        only: Sequence[Status] | None = None,
        **fields: Any,
    ) -> Job | None:
        """Give a job other values, and add events. Return the job as it is then.

        only: the statuses in which that may be; in any other nothing changes, and None is returned.
        """
        with self._transaction():
            job = self.job(id)
            if job is None or (only is not None and job.status not in only):
                return None
            job = replace(job, **fields)
            self._connection.execute(
                "UPDATE jobs SET status = ?, body = ? WHERE id = ?",
                (job.status, _text(asdict(job)), id),
            )
            self._add_events(id, events)
            return job

    # Events

    def events(
        self, job: str, *, limit: int, before: int | None = None, kind: str | None = None
    ) -> list[JobEvent]:
        """Return a job's events, the newest first. before: an event's number, after which (in
        that order) to go on; kind: only those whose data have this key."""
        rows = self._read(
            "SELECT number, created, level, message, data FROM events WHERE job = ?"
            " AND number < ? AND (? IS NULL OR json_extract(data, '$.' || ?) IS NOT NULL)"
            " ORDER BY number DESC LIMIT ?",
            job,
            2**62 if before is None else before,
            kind,
            kind,
            limit,
        )
        return [
            JobEvent(message, level, None if data is None else json.loads(data), created, number)
            for number, created, level, message, data in rows
        ]

    def _add_events(self, job: str, events: Iterable[JobEvent]) -> None:
        self._connection.executemany(
            "INSERT INTO events (job, created, level, message, data) VALUES (?, ?, ?, ?, ?)",
            [
                (
                    job,
                    event.created or int(time.time()),
                    event.level,
                    event.message,
                    None if event.data is None else _text(event.data),
                )
                for event in events
            ],
        )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock, disk_errors(self.path), self._connection:
            yield

    def _read(self, query: str, *values: Any) -> list[Any]:
        with self._lock, disk_errors(self.path):
            return self._connection.execute(query, values).fetchall()

    def _write(self, query: str, *values: Any) -> None:
        with self._transaction():
            self._connection.execute(query, values)


def _job(body: str) -> Job:
    fields = json.loads(body)
    fault = fields["fault"]
    fields["fault"] = None if fault is None else Fault(**fault)
    return Job(**fields | {"result_files": tuple(fields["result_files"])})


def _text(value: Mapping[str, Any]) -> str:
    return json.dumps(value)
