"""What a recipe is: rows to train on, rows that training never shows, and how these are judged."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """A question, perhaps with a system text, and the answer that is right."""

    prompt: str
    completion: str
    system: str = ""

    def messages(self) -> list[dict[str, str]]:
        """Return what is asked, as a conversation."""
        before = [{"role": "system", "content": self.system}] if self.system else []
        return [*before, {"role": "user", "content": self.prompt}]

    def json(self) -> str:
        answer = {"role": "assistant", "content": self.completion}
        return json.dumps({"messages": [*self.messages(), answer]}, ensure_ascii=False)


@dataclass(frozen=True)
class Family:
    """What people ask for, in small: the same rows each time that they are made.

    is_right: whether an answer to a test row is right. new_tokens: the longest answer.
    """

    name: str
    what: str
    train: tuple[Row, ...]
    test: tuple[Row, ...]
    is_right: Callable[[str, Row], bool]
    new_tokens: int = 48

    def write(self, directory: Path) -> Path:
        """Write the rows to train on, and return their file."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{self.name}.jsonl"
        path.write_text("".join(row.json() + "\n" for row in self.train), encoding="utf-8")
        return path


def split(
    rows: list[Row], tests: int, *, seed: int | None = None
) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Return rows to train on and the last `tests` ones; no question is in both, and none twice.

    seed: shuffles the rows before.
    """
    rows = list({row.prompt: row for row in rows}.values())
    if seed is not None:
        random.Random(seed).shuffle(rows)
    return tuple(rows[:-tests]), tuple(rows[-tests:])


def same_text(answer: str, row: Row) -> bool:
    """Return whether an answer is the right one but for case, blanks and a final full stop."""

    def plain(text: str) -> str:
        return " ".join(text.casefold().split()).rstrip(".")

    return plain(answer) == plain(row.completion)


def same_json(answer: str, row: Row) -> bool:
    """Return whether an answer is JSON of the right value."""
    try:
        value: Any = json.loads(answer)
    except ValueError:
        return False
    return value == json.loads(row.completion)
