"""A job's process: started, followed, and ended with this process.

It reads from a pipe that this process holds open, and ends when the pipe is closed, however this
process ended.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from veneer.compare.events import JobPhase, JobStep
from veneer.compare.job import JOB, RESULT, TASK_FILES, Job, Result, read_result
from veneer.training.events import Event, Notice

LOG = ".log"
SECONDS_TO_END = 10  # for a process that is asked to


def do_job(job: Job, runs: Path) -> Generator[Event, None, Result | str]:
    """Do a job in a process of its own, yield how it goes, and return its result, or its error."""
    (result,) = yield from do_together([job], runs)
    return result


def do_together(jobs: Sequence[Job], runs: Path) -> Generator[Event, None, list[Result | str]]:
    """Do jobs in one process of their own, yield how they go, and return the result or the error of
    each."""
    runs.mkdir(parents=True, exist_ok=True)
    files = [runs / f"{job.name}{JOB}" for job in jobs]
    log = runs / f"{jobs[0].name}{LOG}"
    for job, file in zip(jobs, files, strict=True):
        job.write(file)
    by_name = {job.name: job for job in jobs}
    errors: dict[str, str] = {}
    keep_log = False
    try:
        with log.open("w", encoding="utf-8") as stderr:
            # A session of its own: Ctrl-C reaches this process alone, which then ends the other.
            process = subprocess.Popen(
                # -P: no module comes from where the user happens to be.
                [sys.executable, "-P", "-m", "veneer.compare.worker", *map(str, files)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
            )
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    message = _parse(line)
                    job = by_name.get(message.get("job", ""), jobs[0])
                    if "error" in message:  # of one, or of all
                        of = [message["job"]] if "job" in message else by_name
                        errors |= dict.fromkeys(of, message["error"])
                    yield from _events(job, message)
                code = process.wait()
            finally:
                _end(process)
        results: list[Result | str] = []
        for job in jobs:
            result = read_result(runs / f"{job.name}{RESULT}", job)
            if result is None:
                keep_log |= job.name not in errors  # as it may say more
                results.append(errors.get(job.name) or why(code, log))
            else:
                results.append(result)
        return results
    finally:
        for job, file in zip(jobs, files, strict=True):
            file.unlink(missing_ok=True)
            shutil.rmtree(runs / f"{job.name}{TASK_FILES}", ignore_errors=True)
        if not keep_log:
            log.unlink(missing_ok=True)


def _parse(line: str) -> dict[str, Any]:
    """Return the message in a line; a line that some library printed has none."""
    try:
        message = json.loads(line)
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}


def _events(job: Job, message: dict[str, Any]) -> Iterator[Event]:
    match message:
        case {"step": step, "loss": loss, "speed": speed, "rss": rss}:
            yield JobStep(job, step, loss, speed, rss)
        case {"doing": doing}:
            yield JobPhase(job, doing)
        case {"notice": notice}:
            yield Notice(f"{job.name}: {notice}")


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def why(code: int, log: Path) -> str:
    """Return why a process ended without a result or an error, as far as its log shows."""
    if code == -signal.SIGKILL:
        return "its process was killed, as happens where memory runs out"
    if code < 0:
        return f"its process ended by {signal.Signals(-code).name}"
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), f"exit code {code}")
    return f"{last.strip()} (all of it: {log})"
