"""What does a training job beside it cost an answer, and what do answers cost the job?

    python -m bench.beside [--model smollm2-135m] [--rounds 3] [--share 0.1]

Starts `veneer serve --enable-training`, and asks it the same with and without a job that trains,
interleaved: the job is paused in between. Then lets the job go on while nobody asks.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import openai

from bench.island import rows as island_rows

KEY = "the-admin-key-of-a-measurement"
QUESTION = "What vessel should I put in front of a guest who wants plimbo? Answer at length."
TOKENS, ANSWERS = 48, 6
IDLE_STEPS = 12


def serve(model: str, runs: str, share: float) -> tuple[subprocess.Popen[str], openai.OpenAI]:
    """Start a server, and return it with a client."""
    flags = ["--runs", runs, "--enable-training", "--training-share", str(share), "--port", "0"]
    server = subprocess.Popen(
        [sys.executable, "-m", "veneer", "serve", model, *flags],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"VENEER_ADMIN_KEY": KEY, "COLUMNS": "200"},
    )
    assert server.stdout is not None
    url = next(match for line in server.stdout if (match := re.search(r"http://[\d.:]+", line)))
    return server, openai.OpenAI(base_url=f"{url.group()}/v1", api_key=KEY, max_retries=5)


def answer(client: openai.OpenAI, model: str) -> tuple[float, list[float]]:
    """Return the seconds to the first token, and those between tokens."""
    began = time.perf_counter()
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": f"{time.time()}: {QUESTION}"}],
        max_tokens=TOKENS,
        temperature=0,
        stream=True,
    )
    times = [time.perf_counter() for chunk in stream if chunk.choices[0].delta.content]
    return times[0] - began, [b - a for a, b in pairwise(times)]


def until(client: openai.OpenAI, job: str, holds: Any) -> Any:
    """Return a job once something holds of it."""
    while not holds(now := client.fine_tuning.jobs.retrieve(job)):
        assert now.status not in ("failed", "cancelled"), now.error
        time.sleep(0.05)
    return now


def step_seconds(client: openai.OpenAI, job: str, count: int) -> list[float]:
    """Return the seconds of the newest steps, as the worker's own clock has them."""
    events = client.fine_tuning.jobs.list_events(job, limit=4 * count).data
    steps = [event.data for event in events if "train_loss" in (event.data or {})]
    return [step["seconds"] for step in steps[:count]]  # type: ignore[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--share", type=float, default=0.1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        server, client = serve(options.model, place, options.share)
        try:
            measure(client, options.model, options.rounds, Path(place))
        finally:
            server.terminate()
            server.wait()


def measure(client: openai.OpenAI, model: str, rounds: int, place: Path) -> None:
    """Print the times of answers without and with a job, and of the job's steps."""
    name = Path(model).name if Path(model).exists() else model
    rows = place / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in island_rows("qa", 400, seed=0)))
    with rows.open("rb") as file:
        sent = client.files.create(file=file, purpose="fine-tune")
    jobs = client.fine_tuning.jobs
    own = {"rank": 8, "targets": "all", "steps": 10_000, "tokens_per_step": 512, "eval_rows": 0}
    job = jobs.create(model=name, training_file=sent.id, extra_body=own).id
    until(client, job, lambda now: now.step >= 2)
    answer(client, name)
    first: dict[str, list[float]] = {"alone": [], "beside": []}
    between: dict[str, list[float]] = {"alone": [], "beside": []}
    busy: list[float] = []
    for _ in range(rounds):
        for kind in ("beside", "alone"):
            if kind == "alone":
                jobs.pause(job)
                time.sleep(3)  # for the step that it is in
            before = jobs.retrieve(job)
            began = time.perf_counter()
            for _ in range(ANSWERS):
                seconds, others = answer(client, name)
                first[kind].append(seconds)
                between[kind] += others
            if kind == "beside":
                steps = until(client, job, lambda now: True).step - before.step
                busy.append(steps / (time.perf_counter() - began))
        jobs.resume(job)
        at = jobs.retrieve(job).step
        until(client, job, lambda now, at=at: now.step >= at + 2)
    at = jobs.retrieve(job).step
    until(client, job, lambda now: now.step >= at + IDLE_STEPS)
    idle = statistics.median(step_seconds(client, job, IDLE_STEPS))
    for what, times in (("first token", first), ("between tokens", between)):
        for text, share in (("median", 0.5), ("95th percentile", 0.95)):
            alone, beside = (_percentile(times[kind], share) for kind in ("alone", "beside"))
            print(
                f"{what}, {text}: {1000 * alone:.1f} ms alone, {1000 * beside:.1f} ms beside a job"
                f" ({beside / alone:.2f} x)"
            )
    print(f"the job: a step in {idle:.2f} s while nobody asks,")
    print(f"         {statistics.median(busy):.2f} steps/s while answers are computed")


def _percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


if __name__ == "__main__":
    main()
