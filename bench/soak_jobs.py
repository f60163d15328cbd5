"""A training job at a time beside a soak: sent, watched, paused or stopped, asked, removed."""

from __future__ import annotations

import json
import random
import threading
from typing import Any

from bench.island import rows as island_rows
from bench.soak_client import Client, Refused
from bench.soak_questions import QUESTIONS

JOBS = "/v1/fine_tuning/jobs"
PAUSE = 45.0  # seconds between two jobs
ENDED = ("succeeded", "failed", "cancelled")


def train_now_and_then(url: str, base: str, findings: Any, over: threading.Event) -> None:
    """Have small jobs trained until it is over."""
    client, draw, number = Client(url), random.Random(0), 0
    while not over.wait(min(PAUSE, 5.0 + number * 10)):
        number += 1
        try:
            _train(client, base, findings, over, draw, number)
        except (OSError, Refused) as error:
            findings.add("job", getattr(error, "status", 0), f"job: {error!r}")


def _train(
    client: Client,
    base: str,
    findings: Any,
    over: threading.Event,
    draw: random.Random,
    number: int,
) -> None:
    kind = draw.choice(("supervised", "dpo", "reinforcement"))
    rows, how = _rows_and_method(kind, number)
    file = client.upload(f"rows-{number}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    own = {"rank": 2, "max_length": 256, **how}
    body = {"model": base, "training_file": file["id"], "suffix": f"soak{number}", **own}
    job = client.admin("POST", JOBS, body)
    fate = draw.choice(("let", "let", "pause", "cancel"))
    while not over.wait(1.0) and job["status"] not in ENDED:
        job = client.admin("GET", f"{JOBS}/{job['id']}")
        client.admin("GET", f"{JOBS}/{job['id']}/events?limit=10")
        if fate != "let" and job["status"] == "running":
            _interfere(client, job["id"], fate, over)
            fate = "let"
    if over.is_set():
        return
    fault = f"job {job['id']} failed: {job['error']}" if job["status"] == "failed" else ""
    findings.add(f"{kind} job {job['status']}", 200, fault)
    if job["status"] == "succeeded":
        client.ask(QUESTIONS[0], job["fine_tuned_model"])
    client.admin("DELETE", f"/v1/files/{file['id']}")


def _rows_and_method(kind: str, number: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return rows for a method of OpenAI's, and what to ask for beside them."""
    rows = list(island_rows("qa", 40, seed=number))
    steps = {"steps": 12, "tokens_per_step": 512}
    if kind == "supervised":
        return rows, {**steps, "eval_rows": 0}
    if kind == "dpo":
        pairs = [
            {"prompt": row["prompt"], "chosen": row["completion"], "rejected": "I cannot say."}
            for row in rows
        ]
        return pairs, {**steps, "eval_rows": 0, "method": {"type": kind}}
    asks = [
        {
            "messages": [{"role": "user", "content": row["prompt"]}],
            "answer": row["completion"],
        }
        for row in rows
    ]
    grader = {
        "type": "text_similarity",
        "name": "near",
        "input": "{{ sample.output_text }}",
        "reference": "{{ item.answer }}",
        "evaluation_metric": "fuzzy_match",
    }
    method = {"type": kind, kind: {"grader": grader}}
    sizes = {"steps": 4, "group_size": 4, "prompts_per_step": 2, "max_new_tokens": 16}
    return asks, {**sizes, "method": method}


def _interfere(client: Client, job: str, fate: str, over: threading.Event) -> None:
    """Cancel a job, or pause it for a moment; it may have ended meanwhile."""
    try:
        client.admin("POST", f"{JOBS}/{job}/{fate}")
        if fate == "pause":
            over.wait(3.0)
            client.admin("POST", f"{JOBS}/{job}/resume")
    except Refused as refused:
        if refused.status != 400:
            raise
