"""A job's process: started, listened to, and ended with whoever asked for it.

It holds the other end of a pipe to its standard input, and ends where that is closed, however this
process ended.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

from veneer.compare.events import JobPhase, JobStep
from veneer.compare.job import JOB, KEPT, RESULT, Job, Result, kept_result
from veneer.training.events import Event, Notice

LOG = ".log"
PATIENCE = 10  # seconds that a process has to end when it is asked to


def do_job(job: Job, runs: Path) -> Generator[Event, None, Result | str]:
    """Do a job in a process of its own, yield how it goes, and return its result, or its error."""
    runs.mkdir(parents=True, exist_ok=True)
    order, log = runs / f"{job.name}{JOB}", runs / f"{job.name}{LOG}"
    job.write(order)
    error: str | None = None
    told = True
    try:
        with log.open("w", encoding="utf-8") as complaints:
            # A session of its own: Ctrl-C reaches this process alone, which then ends the other.
            process = subprocess.Popen(
                # -P: no module comes from where the user happens to be.
                [sys.executable, "-P", "-m", "veneer.compare.worker", str(order)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=complaints,
                text=True,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
            )
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    said = _parse(line)
                    error = said.get("error", error)
                    yield from _events(job, said)
                code = process.wait()
            finally:
                _end(process)
        if code == 0:
            result = kept_result(runs / f"{job.name}{RESULT}", job)
            assert result is not None
            return result
        told = error is not None
        return error if error is not None else why(code, log)
    finally:
        order.unlink(missing_ok=True)
        shutil.rmtree(runs / f"{job.name}{KEPT}", ignore_errors=True)
        if told:
            log.unlink(missing_ok=True)


def _parse(line: str) -> dict[str, Any]:
    """Return what a line says; a library's own, which says nothing to us, is empty."""
    try:
        said = json.loads(line)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _events(job: Job, said: dict[str, Any]) -> Generator[Event, None, None]:
    if "step" in said:
        yield JobStep(job, said["step"], said["loss"], said["speed"], said["rss"])
    elif "doing" in said:
        yield JobPhase(job, said["doing"])
    elif "notice" in said:
        yield Notice(f"{job.name}: {said['notice']}")


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def why(code: int, log: Path) -> str:
    """Return why a process ended with nothing said, as far as can be told."""
    if code == -signal.SIGKILL:
        return "its process was killed, as happens where memory runs out"
    if code < 0:
        return f"its process ended by {signal.Signals(-code).name}"
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), f"exit code {code}")
    return f"{last.strip()} (all of it: {log})"
