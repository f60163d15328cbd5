"""Files that clients send: checked as they arrive, and kept as they came."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from veneer.data.problems import Problem, data_error
from veneer.data.rows import parse_row
from veneer.data.sources import no_rows_in, parsed_values
from veneer.errors import MOST_PROBLEMS, DataError, RequestError, listed
from veneer.serve.jobs.store import Store
from veneer.serve.jobs.values import UNENDED, Places, Purpose, StoredFile, new_id

# Plain text alone: a small file that unpacks to a large one would pass every limit of size.
KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".md")
DEFAULT_NAME = "rows.jsonl"
LARGE = (
    2**20
)  # bytes that are read in a moment; more would keep answers waiting for the interpreter
_STRANGE = re.compile(r"[^A-Za-z0-9._-]+")


def keep(store: Store, places: Places, filename: str, source: BinaryIO) -> StoredFile:
    """Check a file of rows, keep it, and return what it is.

    Raises RequestError, with `file:line` of each fault, for rows that cannot be learnt.
    """
    name = name_on_disk(filename)
    if not name.lower().endswith(KINDS):
        raise RequestError(
            f"{name} is of a kind that is not trained on here; it may be {listed(KINDS, most=9)}.",
            param="file",
        )
    shown = (
        filename[:255].encode(errors="replace").decode()
    )  # no half characters: it goes into JSON
    file = StoredFile(new_id("file"), shown or DEFAULT_NAME, name, "fine-tune", 0, int(time.time()))
    path = places.file(file)
    path.parent.mkdir(parents=True)
    try:
        with path.open("wb") as target:
            shutil.copyfileobj(source, target, 2**20)
            target.flush()
            os.fsync(target.fileno())
        is_large = path.stat().st_size > LARGE
        rows = _count_elsewhere(path) if is_large else count_rows(path)
        return _add(store, file, path, rows)
    except BaseException:
        shutil.rmtree(path.parent, ignore_errors=True)
        raise


def keep_text(store: Store, places: Places, name: str, text: str, purpose: Purpose) -> StoredFile:
    """Keep a text of ours as a file that clients can read."""
    file = StoredFile(new_id("file"), name, name, purpose, 0, int(time.time()))
    path = places.file(file)
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")
    return _add(store, file, path, 0)


def _add(store: Store, file: StoredFile, path: Path, rows: int) -> StoredFile:
    sized = StoredFile(
        file.id, file.filename, file.name, file.purpose, path.stat().st_size, file.created, rows
    )
    store.add_file(sized)
    return sized


def remove(store: Store, places: Places, file: StoredFile) -> None:
    """Remove a file. Raises RequestError where a job that has not ended needs it."""
    users = [
        job.id
        for job in store.jobs(*UNENDED)
        if file.id in (job.training_file, job.validation_file)
    ]
    if users:
        raise RequestError(
            f"{file.id} is needed by {listed(users)}; cancel that first.", param="file_id"
        )
    store.remove_file(file.id)
    shutil.rmtree(places.file(file).parent, ignore_errors=True)


def count_rows(path: Path) -> int:
    """Return how many rows a file has. Raises RequestError where any of them cannot be one.

    A row is checked for its shape here. Whether a base's template takes it, and whether its answer
    is not cut off, depends on a job, which says so itself.
    """
    rows = count = 0
    problems: list[Problem] = []
    try:
        for row in parsed_values(path, parse_row):
            if isinstance(row, Problem):
                count += 1
                problems += [row] * (len(problems) < MOST_PROBLEMS)
            else:
                rows += 1
        if not rows + count:
            raise no_rows_in(path)
        if count:
            heading = f"{count:,} of {rows + count:,} rows cannot be used; mend them:"
            raise data_error(heading, problems, count)
    except DataError as error:
        raise RequestError(without_directory(str(error), path), param="file") from error
    return rows


def _count_elsewhere(path: Path) -> int:
    """Do what `count_rows` does in a process of its own, beside which answers go on as before."""
    command = [sys.executable, "-m", "veneer.serve.jobs.uploads", str(path)]
    counting = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if counting.returncode:
        raise RequestError(f"{path.name} cannot be read in the memory that there is.", param="file")
    counted = json.loads(counting.stdout)
    if "problem" in counted:
        raise RequestError(counted["problem"], param="file")
    return int(counted["rows"])


def remove_unknown(store: Store, places: Places) -> None:
    """Remove what a server that was killed left of files that it had not taken in yet."""
    known = {file.id for file in store.files()}
    for directory in places.files.glob("file-*"):
        if directory.name not in known:
            shutil.rmtree(directory, ignore_errors=True)


def without_directory(text: str, *paths: Path) -> str:
    """Return a message with the names of files as the client knows them."""
    for path in paths:
        text = text.replace(f"{path.parent}/", "")
    return text


def name_on_disk(filename: str) -> str:
    """Return a name that is safe on any disk, as like a client's as can be."""
    name = PurePosixPath(filename.replace("\\", "/")).name
    stem, dot, ending = _STRANGE.sub("_", name).strip("._").rpartition(".")
    if not dot:
        return f"{ending[:80]}.jsonl" if ending else DEFAULT_NAME
    return f"{stem[:80] or 'rows'}.{ending[:16]}"


def main(path: str) -> None:
    """Print what `count_rows` says of a file, as JSON."""
    try:
        print(json.dumps({"rows": count_rows(Path(path))}))
    except RequestError as error:
        print(json.dumps({"problem": str(error)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
