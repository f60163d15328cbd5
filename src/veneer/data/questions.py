"""Questions with the answers that count as right: what a trained model is tried on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from veneer.data.readers import Fault
from veneer.data.rows import Message, Text, parse_row, said
from veneer.data.sources import check, files_of, values_of


@dataclass(frozen=True, slots=True)
class Question:
    """The turns up to an answer, and every answer that is right."""

    turns: tuple[Message, ...]
    references: tuple[str, ...]


def read_questions(path: Path, *, limit: int | None = None) -> list[Question]:
    """Return the questions of a file, the first `limit` of them.

    A row is a `prompt` with its `references`, a list, or any conversation, whose last answer is
    the right one. Rows that ask the same are one question with the answers of all.
    Raises DataError with every fault of every row.
    """
    found: dict[tuple[Message, ...], list[str]] = {}
    problems = []
    for file in files_of(path):
        for where, value in values_of(file):
            try:
                turns, references = _parse(value)
            except ValueError as error:
                problems.append(f"{where}: {error}")
            else:
                known = found.setdefault(turns, [])
                known += [text for text in references if text not in known]
    questions = [Question(turns, tuple(references)) for turns, references in found.items()]
    return check(questions, problems, skip_bad_rows=False)[:limit]


def _parse(value: object) -> tuple[tuple[Message, ...], list[str]]:
    if isinstance(value, Fault):
        raise ValueError(value.what)
    references = value.get("references") if isinstance(value, Mapping) else None
    if isinstance(value, Mapping) and references is not None:
        if not isinstance(references, list) or not references:
            raise ValueError("'references' must be a list of texts")
        prompt = said(value.get("prompt"), "'prompt'")
        return (Message("user", prompt),), [said(text, "'references'") for text in references]
    row = parse_row(value)
    if isinstance(row, Text):
        raise ValueError("a text asks nothing; give a prompt with its completion or references")
    last = max(i for i, turn in enumerate(row.messages) if turn.role == "assistant" and turn.learn)
    # Whether a turn would be learnt makes no difference here.
    turns = tuple(Message(turn.role, turn.content) for turn in row.messages[:last])
    return turns, [row.messages[last].content]
