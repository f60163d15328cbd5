"""Questions with the answers that count as right: what a trained model is tried on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from veneer.data.problems import Problem
from veneer.data.rows import Message, PlainText, nonblank_text, parse_row
from veneer.data.sources import check, files_of, parsed_values


@dataclass(frozen=True, slots=True)
class Question:
    """The turns up to an answer, and every answer that is right."""

    turns: tuple[Message, ...]
    references: tuple[str, ...]


def read_questions(path: Path, *, limit: int | None = None) -> list[Question]:
    """Return the questions of a file, the first `limit` of them.

    A row is a `prompt` with its `references`, a list, or any conversation, whose last answer is
    the right one. Rows that ask the same are one question with the answers of all.
    Raises DataError with every problem of every row.
    """
    references: dict[tuple[Message, ...], dict[str, None]] = {}  # by turns, in order, each once
    problems = []
    for file in files_of(path, "test"):
        for row in parsed_values(file, _parse):
            if isinstance(row, Problem):
                problems.append(row)
            else:
                known = references.setdefault(row.value.turns, {})
                known.update(dict.fromkeys(row.value.references))
    questions = [Question(turns, tuple(texts)) for turns, texts in references.items()]
    return check(questions, problems, skip_bad_rows=False)[:limit]


def _parse(value: object) -> Question:
    """Return the question that one row asks. Raises ValueError, saying what is wrong with it."""
    references = value.get("references") if isinstance(value, Mapping) else None
    if isinstance(value, Mapping) and references is not None:
        if not isinstance(references, list) or not references:
            raise ValueError("'references' must be a list of texts")
        prompt = nonblank_text(value.get("prompt"), "'prompt'")
        texts = tuple(nonblank_text(text, "'references'") for text in references)
        return Question((Message("user", prompt),), texts)
    row = parse_row(value)
    if isinstance(row, PlainText):
        raise ValueError("a text asks nothing; give a prompt with its completion or references")
    if row.tools or any(turn.calls for turn in row.messages):
        raise ValueError("questions with tools cannot be asked yet; leave such rows out")
    last = max(i for i, turn in enumerate(row.messages) if turn.role == "assistant" and turn.learn)
    # Whether a turn would be learnt makes no difference here.
    turns = tuple(Message(turn.role, turn.content) for turn in row.messages[:last])
    return Question(turns, (row.messages[last].content,))
