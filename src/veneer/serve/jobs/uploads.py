"""Files that clients send: checked as they arrive, and kept as they came.

A file is there while the store knows it and its directory has its name. Where a disk fails as the
store commits, nobody knows what the next server will read of that; so what the store knows without
a directory counts for nothing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath
from threading import BoundedSemaphore
from typing import Any, BinaryIO

from veneer.data.pairs import Preference, is_pair, parse_pair
from veneer.data.problems import Located, Place, Problem, data_error
from veneer.data.questions import parse_prompt
from veneer.data.rows import Row, parse_row
from veneer.data.sources import entries_of, no_rows_in, parsed_values, read_values
from veneer.errors import (
    MOST_PROBLEMS,
    DataError,
    QueueFull,
    RequestError,
    StorageError,
    closest,
    listed,
)
from veneer.files import new_directory, rename
from veneer.serve.jobs.store import Store
from veneer.serve.jobs.values import UNENDED, Kind, Places, Purpose, StoredFile, new_id

# Plain text alone: a small file that unpacks to a large one would pass every limit of size.
KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".md")
DEFAULT_NAME = "rows.jsonl"
# Bytes that are read in a moment; more would keep answers waiting for the interpreter.
LARGE = 2**20
AT_A_TIME = 2  # large files that are read; each takes a core and much memory
READING_SECONDS = 300.0  # for one of them
LEAST_MEMORY = 2**30  # bytes that reading may take, whatever is free
# Begins the name of a file's directory before the store knows the file, and when it is to go.
UNFINISHED = "."
# How a row of each kind is read.
PARSERS: Mapping[Kind, Callable[[object], Any]] = {
    "answers": parse_row,
    "pairs": parse_pair,
    "prompts": parse_prompt,
}
_OF_ANSWERS = ("completion", "output", "answer")  # keys of rows
MISSPELT = 0.75  # as like one of these as a slip of the fingers; a solution is no completion
_READING = BoundedSemaphore(AT_A_TIME)
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
    # No half characters: it goes into JSON.
    shown = filename[:255].encode(errors="replace").decode()
    file = StoredFile(new_id("file"), shown or DEFAULT_NAME, name, "fine-tune", 0, int(time.time()))
    with _coming(places, file) as path:
        with path.open("wb") as target:
            shutil.copyfileobj(source, target, 2**20)
        is_large = path.stat().st_size > LARGE
        rows, kind = _elsewhere("check", path) if is_large else check_rows(path)
    return _take_in(store, places, replace(file, rows=rows, kind=kind))


def keep_text(store: Store, places: Places, name: str, text: str, purpose: Purpose) -> StoredFile:
    """Keep a text of ours as a file that clients can read."""
    file = StoredFile(new_id("file"), name, name, purpose, 0, int(time.time()))
    with _coming(places, file) as path:
        path.write_text(text, encoding="utf-8")
    return _take_in(store, places, file)


def known(store: Store, places: Places) -> list[StoredFile]:
    """Return the files that are there, the oldest first."""
    return [file for file in store.files() if places.file(file).is_file()]


@contextmanager
def _coming(places: Places, file: StoredFile) -> Iterator[Path]:
    """Yield the path at which to write a file that the store does not know yet."""
    coming = _unfinished(places, file)
    try:
        with new_directory(coming, marker=file.name) as directory:
            yield directory / file.name
    except BaseException:
        shutil.rmtree(coming, ignore_errors=True)  # it has this name where only its sync failed
        raise


def _unfinished(places: Places, file: StoredFile) -> Path:
    return places.files / f"{UNFINISHED}{file.id}"


def _take_in(store: Store, places: Places, file: StoredFile) -> StoredFile:
    """Let the store know a file that has been written, and give it its name. Where that is broken
    off in between, `settle_unfinished` does the rest."""
    coming, path = _unfinished(places, file), places.file(file)
    file = replace(file, bytes=(coming / file.name).stat().st_size)
    try:
        store.add_file(file)
        rename(coming, path.parent)
    except BaseException:
        _forget(store, file, coming, path.parent)
        raise
    return file


def remove(store: Store, places: Places, file: StoredFile) -> None:
    """Remove a file, also where the disk is so full that the store cannot note it. Raises
    RequestError where a job that has not ended needs it."""
    users = [
        job.id
        for job in store.jobs(*UNENDED)
        if file.id in (job.training_file, job.validation_file)
    ]
    if users:
        raise RequestError(
            f"{file.id} is needed by {listed(users)}; cancel that first.", param="file_id"
        )
    going, place = _unfinished(places, file), places.file(file).parent
    try:
        with suppress(FileNotFoundError):  # another request was faster
            rename(place, going)
    except BaseException:
        with suppress(FileNotFoundError):
            rename(going, place)
        raise
    _forget(store, file, going)


def _forget(store: Store, file: StoredFile, *directories: Path) -> None:
    """Remove the directories that a file may have, and what the store knows of it."""
    with suppress(StorageError):
        store.remove_file(file.id)
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)


def check_rows(path: Path) -> tuple[int, Kind]:
    """Return how many rows a file has, and what they are. Raises RequestError where any of them
    cannot be one.

    A row is checked for its shape here. Whether a base's template takes it, and whether its answer
    is not cut off, depends on a job, which says so itself.
    """
    rows = asked = count = 0
    kind: Kind | None = None
    problems: list[Problem] = []
    unanswered: list[Problem] = []  # prompts, which are faults among rows that have an answer
    try:
        for row in parsed_values(path, _row_of_any_kind):
            if isinstance(row, Problem):
                count += 1
                problems += [row] * (len(problems) < MOST_PROBLEMS)
            elif isinstance(row.value, str):
                asked += 1
                more = Problem(row.place, row.value)
                unanswered += [more] * (len(unanswered) < MOST_PROBLEMS)
            else:
                rows += 1
                kind = kind or ("pairs" if isinstance(row.value, list) else "answers")
        if rows:
            count, asked, problems = count + asked, 0, [*problems, *unanswered]
        if not rows + asked + count:
            raise no_rows_in(path)
        if count:
            heading = f"{count:,} of {rows + asked + count:,} rows cannot be used; mend them:"
            raise data_error(heading, problems, count)
    except DataError as error:
        # The server's disk fails; what is only damaged gives errors without a number.
        if getattr(error.__cause__, "errno", None) is not None:
            raise StorageError(str(error)) from error
        raise RequestError(without_directory(str(error), path), param="file") from error
    return rows + asked, kind or "prompts"


def _row_of_any_kind(value: object) -> Row | list[Preference] | str:
    """Return a row, a pair, or, of a prompt without an answer, why it is no row to learn."""
    if is_pair(value):
        return parse_pair(value)
    try:
        return parse_row(value)
    except ValueError as error:
        if not _is_prompt(value):
            raise
        return str(error)


def _is_prompt(value: object) -> bool:
    """Return whether a row asks something, and no key looks like an answer's, misspelt."""
    try:
        unused = parse_prompt(value).unused
    except ValueError:
        return False
    return not any(
        key not in _OF_ANSWERS and closest(key, _OF_ANSWERS, likeness=MISSPELT) for key in unused
    )


def first_rows(path: Path, limit: int, kind: Kind) -> tuple[list[Located[Any]], list[Problem]]:
    """Return the first `limit` good rows of a file, of a kind, as its parser makes them, and the
    problems before them."""
    if path.suffix.lower() != ".json" or path.stat().st_size <= LARGE:
        return read_values(path, PARSERS[kind], limit=limit)
    # Only this kind is read as a whole.
    rows: list[Located[Any]] = []
    problems: list[Problem] = []
    for number, is_line, value, what in _elsewhere("first", path, str(limit), kind):
        place = Place(str(path), number, is_line=is_line)
        if what is not None:
            problems.append(Problem(place, what))
        else:
            rows.append(Located(PARSERS[kind](value), place))
    return rows, problems


def _elsewhere(task: str, path: Path, *arguments: str) -> Any:
    """Return what a task of TASKS gives, in a process of its own, beside which answers go on as
    before. Raises RequestError, and QueueFull where others read already."""
    command = [sys.executable, "-m", "veneer.serve.jobs.uploads", task, str(path), *arguments]
    if not _READING.acquire(blocking=False):
        raise QueueFull(f"{AT_A_TIME} large files are being read already; come again later.")
    try:
        reading = subprocess.run(
            command, stdout=subprocess.PIPE, check=False, timeout=READING_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        why = f"{path.name} cannot be read in {READING_SECONDS:g} seconds."
        raise RequestError(why, param="file") from error
    finally:
        _READING.release()
    if reading.returncode:
        raise RequestError(f"{path.name} cannot be read in the memory that there is.", param="file")
    answer = json.loads(reading.stdout)
    if "problem" in answer:
        raise RequestError(answer["problem"], param="file")
    return answer["result"]


def settle_unfinished(store: Store, places: Places) -> None:
    """Give files their names that the store knows, and remove what else was coming, or going, when
    a server was killed."""
    for directory in places.files.glob(f"{UNFINISHED}*"):
        file = store.file(directory.name.removeprefix(UNFINISHED))
        if file is not None and not places.file(file).exists():
            rename(directory, places.file(file).parent)
        else:
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


def first_values(path: Path, limit: str, kind: Kind) -> list[tuple[int, bool, object, str | None]]:
    """Return the number of each of a file's first entries, whether it counts lines, its value, and
    what is wrong with it, up to the last of `limit` good rows."""
    first: list[tuple[int, bool, object, str | None]] = []
    good = 0
    for entry in entries_of(path):
        value, what = None, None
        if isinstance(entry, Problem):
            what = entry.what
        else:
            try:
                PARSERS[kind](entry.value)
                value, good = entry.value, good + 1
            except ValueError as error:
                what = str(error)
        first.append((entry.place.number, entry.place.is_line, value, what))
        if good == int(limit):
            break
    return first


TASKS: dict[str, Callable[..., object]] = {"check": check_rows, "first": first_values}


def main(task: str, path: str, *arguments: str) -> None:
    """Print what a task says of a file, as JSON. It may take half of the memory that is free."""
    with suppress(ImportError, ValueError, OSError):  # where a process has no such limit
        import resource

        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        most = max(free // 2, LEAST_MEMORY)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    try:
        print(json.dumps({"result": TASKS[task](Path(path), *arguments)}))
    except RequestError as error:
        print(json.dumps({"problem": str(error)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
