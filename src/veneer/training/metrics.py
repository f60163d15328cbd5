"""metrics.jsonl: a line for each step and each evaluation, written as they happen."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from veneer.files import write_text
from veneer.training.events import Evaluated, Event, Started, Step


def record(events: Iterable[Event], path: Path) -> Iterator[Event]:
    """Pass events on, writing those with numbers to `path`.

    A run that goes on after step n keeps the lines up to n; what a lost piece of it had written
    beyond that happens again.
    """
    for event in events:
        if isinstance(event, Started):
            kept = [line for line in read(path) if line["step"] <= event.done]
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        elif isinstance(event, Step | Evaluated):
            line = asdict(event)
            line.pop("best", None)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        yield event


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file; a last one that was cut off in writing is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines
