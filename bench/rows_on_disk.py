"""How fast are rows encoded, and what does data larger than the memory allowed take?

python -m bench.rows_on_disk MODEL --rows 400000

Writes short questions and answers as JSON lines to --out, deleted afterwards with the cache, and
trains a few steps of MODEL, a small one, three times, each in a process of its own with a limit of
memory, page cache included: killed (kill -9) in the middle of encoding, going on, and once more.
A fourth, without the limit, holds the same rows as a list, which its losses are compared with.
Needs root on Linux, for a control group of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import veneer
from bench.limit import drop_caches, limited
from veneer.data import load
from veneer.training.events import DataReady, Encoding, Step
from veneer.training.memory import process_memory

WORDS = ["the", "cat", "water", "mountain", "river", "answer", "because", "people", "quickly"]
WORDS += ["world", "think", "small", "house", "number", "paper", "light", "story", "green", "music"]
WORDS += ["letter", "window", "garden", "often", "between", "nothing", "always", "question"]
STEPS = 8


def write_rows(path: Path, rows: int) -> None:
    draw = random.Random(0)
    with path.open("w") as file:
        for n in range(rows):
            question, answer = (" ".join(draw.choices(WORDS, k=k)) for k in (8, 14))
            row = {"prompt": f"What about {question}?", "completion": f"{answer}, {n}."}
            file.write(json.dumps(row) + "\n")


def train(asked: argparse.Namespace, began: float) -> None:
    """Train a few steps, and print what happens when, in seconds from the start of the process."""
    if asked.in_memory:
        load.SMALL = sys.maxsize
    recipe = veneer.Recipe(
        asked.model,
        asked.out / "rows.jsonl",
        training=veneer.TrainConfig(steps=STEPS, tokens_per_step=2048),
        out=asked.out / "run",
    )
    for event in veneer.tune(recipe, force=True):
        at = {"seconds": time.time() - began}
        if isinstance(event, Encoding):
            print(json.dumps(at | {"encoded": event.rows, "bytes": event.bytes}), flush=True)
        elif isinstance(event, DataReady):
            rows, tokens = event.summary.rows, event.summary.tokens
            print(json.dumps(at | {"rows": rows, "tokens": tokens}), flush=True)
        elif isinstance(event, Step):
            peak = process_memory("RssAnon")
            print(json.dumps(at | {"loss": event.loss, "anonymous": peak}), flush=True)


def apart(
    asked: argparse.Namespace,
    enter: Callable[[], None] | None = None,
    *,
    kill_at: int | None = None,
    in_memory: bool = False,
) -> list[dict[str, Any]]:
    """Return what `train` prints in a process of its own, killed once so many rows are encoded.

    enter: what the process does first, to be under the limit
    """
    drop_caches()
    command = [sys.executable, "-m", "bench.rows_on_disk", asked.model, "--out", str(asked.out)]
    command += ["--in-memory"] if in_memory else []
    environment = {**os.environ, "VENEER_CACHE": str(asked.out / "cache")}
    process = subprocess.Popen(
        [*command, "--began", str(time.time())],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=enter,
        env=environment,
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(json.loads(line))
        print(line, end="", file=sys.stderr, flush=True)
        if kill_at is not None and lines[-1].get("encoded", 0) >= kill_at:
            process.send_signal(signal.SIGKILL)
            break
    if process.wait() and kill_at is None:
        sys.exit(f"ended with {process.returncode}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--limit", type=float, default=2.0, help="GB, page cache included")
    parser.add_argument("--out", type=Path, default=Path("/var/tmp/veneer-rows-on-disk"))
    parser.add_argument("--began", type=float, help="train in this process")
    parser.add_argument("--in-memory", action="store_true", help="there, hold the rows as a list")
    asked = parser.parse_args()
    if asked.began:
        train(asked, asked.began)
        return
    asked.out.mkdir(parents=True, exist_ok=True)
    try:
        write_rows(asked.out / "rows.jsonl", asked.rows)
        size = (asked.out / "rows.jsonl").stat().st_size
        with limited(int(asked.limit * 1e9)) as (enter, peak):
            killed = apart(asked, enter, kill_at=asked.rows // 3)
            went_on = apart(asked, enter)
            again = apart(asked, enter)
            most = peak()
        listed = apart(asked, in_memory=True)
        kept = sum(f.stat().st_size for f in (asked.out / "cache").rglob("*") if f.is_file())
    finally:
        shutil.rmtree(asked.out, ignore_errors=True)
    encoded = [line for line in went_on if "encoded" in line]
    first, last = encoded[0], encoded[-1]
    speed = (last["encoded"] - first["encoded"]) / (last["seconds"] - first["seconds"])
    ready = next(line for line in went_on if "rows" in line)
    total = ready["rows"]
    runs = [[line for line in run if "loss" in line] for run in (went_on, again, listed)]
    losses = [[step["loss"] for step in steps] for steps in runs]
    same = losses[0] == losses[1] == losses[2] and len(losses[0]) == STEPS
    first_step = runs[1][0]
    print(
        f"{asked.rows:,} rows, {size / 1e9:.2f} GB, {ready['tokens'] / total:.0f} tokens each; "
        f"the cache has {kept / 1e9:.2f} GB.\n"
        f"Killed with {killed[-1]['encoded']:,} rows encoded; the next run began with "
        f"{first['encoded']:,} of them.\n"
        f"{speed:,.0f} rows/s are encoded on {len(os.sched_getaffinity(0))} cores.\n"
        f"From the command to the first step of a run with everything encoded: "
        f"{first_step['seconds']:.1f} s; the losses of {STEPS} steps are "
        f"{'the same' if same else 'NOT the same'} as those of a list in memory.\n"
        f"Memory of the group at most {most / 1e9:.2f} GB, cache included; "
        f"{first_step['anonymous'] / 1e9:.2f} GB of the process's own."
    )


if __name__ == "__main__":
    main()
