"""What clients ask of a server's files and jobs, without its HTTP and its training: rows are sent,
kept and removed, a job is created and cancelled, results are kept.

    python -m support.faulty_server RUNS
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from dataclasses import asdict
from io import BytesIO
from pathlib import Path

from support.server import BASE, scripted
from veneer.errors import VeneerError
from veneer.files import disk_errors
from veneer.serve.jobs import uploads
from veneer.serve.jobs.service import Jobs, Order
from veneer.serve.jobs.settings import TrainingBase
from veneer.serve.jobs.store import Store
from veneer.serve.jobs.values import Places

ROWS = "".join(json.dumps({"prompt": f"{n}?", "completion": f"{n}."}) + "\n" for n in range(9))
SENT, GONE, RESULTS, JOB = "rows.jsonl", "gone.jsonl", "losses.csv", "job"
KEPT = (SENT, RESULTS, JOB)
LOSSES = "step,loss\n1,2.0\n"


def ask(runs: Path) -> None:
    """Ask for what has not been done yet."""
    with disk_errors(runs):  # as the command line has it
        runs.mkdir(exist_ok=True)
        jobs = Jobs(runs, scripted(), TrainingBase(BASE))
    try:
        kept = {file.filename: file for file in jobs.files()}
        for name in (SENT, GONE):
            if name not in kept:
                kept[name] = jobs.upload(name, BytesIO(ROWS.encode()), len(ROWS))
        jobs.remove_file(kept[GONE].id)
        job = next(iter(jobs.store.jobs()), None) or jobs.create(Order(BASE, kept[SENT].id))
        if job.status != "cancelled":
            jobs.cancel(job.id)
        if RESULTS not in kept:
            uploads.keep_text(jobs.store, jobs.places, RESULTS, LOSSES, "fine-tune-results")
    finally:
        jobs.close()


def look(disk: Path) -> dict[str, dict[str, bytes] | None]:
    """Return what the store knows, by the names that clients gave, and how many directories there
    are of files."""
    units: dict[str, dict[str, bytes] | None] = dict.fromkeys(KEPT)
    with tempfile.TemporaryDirectory() as home:
        # What looks at a database may change it.
        runs = Path(home) / "runs"
        shutil.copytree(disk / "runs", runs) if (disk / "runs").exists() else runs.mkdir()
        places = Places(runs)
        if places.database.exists():
            store = Store(places.database)
            uploads.settle_unfinished(store, places)  # as the next server does
            for file in uploads.known(store, places):
                content, all_facts = places.file(file).read_bytes(), asdict(file)
                facts = {key: all_facts[key] for key in ("bytes", "rows", "kind", "purpose")}
                units[file.filename] = {"": content, "facts": json.dumps(facts).encode()}
            for job in store.jobs("cancelled"):
                units[JOB] = {"": f"{job.model} by {len(job.settings)} settings".encode()}
            store.close()
        units["directories"] = {"": str(len(list(places.files.glob("*")))).encode()}
    return units


if __name__ == "__main__":
    try:
        ask(Path(sys.argv[1]))
    except VeneerError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
