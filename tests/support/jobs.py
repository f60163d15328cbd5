"""A server that trains with a pretended worker, or with the true one, and OpenAI's client of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

from support.recipes import environment
from support.server import ADMIN, call, running, scripted
from support.waiting import eventually
from veneer.serve.config import Keys, Limits
from veneer.serve.jobs.service import Jobs
from veneer.serve.jobs.settings import TrainingBase
from veneer.serve.jobs.watching import Bounds

MERGER = (sys.executable, str(Path(__file__).with_name("pretend_merger.py")))
PRETENDED = (sys.executable, str(Path(__file__).with_name("pretend_worker.py")))
ROWS = [{"prompt": "a b c d"[: 1 + i % 7], "completion": "efghijklm"[i % 5 :]} for i in range(24)]


def lines(rows: Sequence[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@contextmanager
def training(
    runs: Path,
    *,
    bounds: Bounds | None = None,
    worker: Sequence[str] = PRETENDED,
    adapters: dict[str, Path] | None = None,
    base: str = "tiny",
    **options: Any,
) -> Iterator[Any]:
    """Serve, and train below `runs`, one job at a time unless `bounds` says otherwise."""
    runs.mkdir(exist_ok=True)
    bounds = bounds or Bounds(together=1)
    processes: dict[str, Any] = {"worker": worker, "merger": MERGER}
    jobs = Jobs(runs, scripted(adapters), TrainingBase(base), bounds, **processes)
    limits = Limits(upload_bytes=jobs.bounds.upload_bytes)
    options |= {"keys": Keys(admin=ADMIN), "limits": limits, "runs": runs, "jobs": jobs}
    jobs.start()
    try:
        with running(jobs.served, **options) as server:
            server.jobs = jobs
            yield server
    finally:
        jobs.close()


def client_of(server: Any, key: str = ADMIN) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


def upload(client: openai.OpenAI, rows: Sequence[Any] = ROWS, name: str = "rows.jsonl") -> Any:
    return client.files.create(file=(name, lines(rows)), purpose="fine-tune")


def until(client: openai.OpenAI, id: str, *statuses: str) -> Any:
    """Return a job once it has one of some statuses."""
    return eventually(
        lambda: client.fine_tuning.jobs.retrieve(id), lambda job: job.status in statuses
    )


def until_step(client: openai.OpenAI, id: str, step: int) -> None:
    """Wait until a job has made a step."""
    eventually(lambda: client.fine_tuning.jobs.retrieve(id), lambda job: (job.step or 0) >= step)


@dataclass
class ServerProcess:
    """`veneer serve` with training, in a process of its own."""

    process: subprocess.Popen[str]
    url: str


def serving(base: Path, runs: Path) -> ServerProcess:
    """Start a server, which the caller ends, and return it once it is ready."""
    command = [sys.executable, "-m", "veneer", "serve", str(base), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--runs", str(runs), "--enable-training"],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(VENEER_ADMIN_KEY=ADMIN, COLUMNS="200"),
    )
    assert process.stdout is not None
    output = ""
    for line in process.stdout:
        output += line
        if url := re.search(r"http://127\.0\.0\.1:\d+", line):
            break
    assert url, output
    eventually(lambda: call(url.group(), "/ready")[0], lambda status: status == 200)
    return ServerProcess(process, url.group())
