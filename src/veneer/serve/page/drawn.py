"""What a job on samples drew in its last step, for the page."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

from veneer.errors import shortened
from veneer.run_directory import RunDirectory
from veneer.serve.jobs.service import Jobs

MOST_BYTES = 2**20  # of the end of the file, in which the last step is looked for
MOST_GROUPS, MOST_ANSWERS = 4, 16  # that are shown
MOST_CHARACTERS = 2000  # of a prompt, and of an answer


def last_samples(jobs: Jobs, id: str) -> dict[str, Any]:
    """Return the last step of which samples are written, None where there is none, and its answers
    by their prompts, each with its reward. Raises Missing."""
    lines = _last_lines(RunDirectory(jobs.places.run(jobs.job(id))).samples)
    step = lines[-1]["step"] if lines else None
    groups = groupby((line for line in lines if line["step"] == step), key=lambda x: x["row"])
    by_prompt = [list(own) for _, own in groups][:MOST_GROUPS]
    return {
        "step": step,
        "groups": [
            {
                "prompt": shortened(own[0]["prompt"], MOST_CHARACTERS),
                "answers": [
                    {"answer": shortened(x["answer"], MOST_CHARACTERS), "reward": x["reward"]}
                    for x in own[:MOST_ANSWERS]
                ],
            }
            for own in by_prompt
        ],
    }


def _last_lines(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines at the end of a file, none where it is not there."""
    try:
        with path.open("rb") as file:
            start = max(0, file.seek(0, 2) - MOST_BYTES)
            file.seek(start)
            text = file.read()
    except OSError:
        return []
    lines = text[: text.rfind(b"\n") + 1].splitlines()[bool(start) :]
    return [json.loads(line) for line in lines]
