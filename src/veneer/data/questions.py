"""Questions with the answers that count as right, and prompts whose answers are still to come."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from veneer.data.problems import Located, Problem, data_error
from veneer.data.rows import Conversation, Message, PlainText, nonblank_text, parse_row
from veneer.data.sources import Split, check, files_of, parsed_values
from veneer.errors import DataError

# The key of each shape's answer; and how the shapes that are lists of turns write one.
_ANSWERS = {"prompt": "completion", "instruction": "output", "question": "answer"}
_TURNS = {"messages": ("role", "content"), "conversations": ("from", "value")}
_TO_COME = "..."


@dataclass(frozen=True, slots=True)
class Question:
    """The turns up to an answer, and every answer that is right.

    `unused` are the keys of the row that nothing reads, and `item` is the whole row.
    """

    turns: tuple[Message, ...]
    references: tuple[str, ...]
    unused: tuple[str, ...] = field(default=(), compare=False)
    item: Mapping[str, Any] = field(default_factory=dict, compare=False)


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
    _refuse_tools(row)
    last = max(i for i, turn in enumerate(row.messages) if turn.role == "assistant" and turn.learn)
    # Whether a turn would be learnt makes no difference here.
    turns = tuple(Message(turn.role, turn.content) for turn in row.messages[:last])
    return Question(turns, (row.messages[last].content,))


def read_prompts(path: Path, *, split: Split = "test") -> list[Located[Question]]:
    """Return every prompt of a file, in order; `-` is standard input.

    A row is any that `tune` reads, or one without its answer. A last answer becomes the reference,
    and a text (each paragraph of a .txt file) is what a user asks. Standard input is JSON lines if
    it begins with a brace, and otherwise read as .txt is. Of a directory, the files for `split`
    are read. Raises DataError with every problem of every row.
    """
    rows = list(_prompts(path, split))
    problems = [row for row in rows if isinstance(row, Problem)]
    if problems:
        raise data_error(f"{len(problems)} of {len(rows)} prompts cannot be used:", problems)
    if not rows:
        raise DataError(f"{'standard input' if path == Path('-') else path} holds no prompts")
    return [row for row in rows if isinstance(row, Located)]


def behind(
    opening: Sequence[Message], prompts: Sequence[Located[Question]]
) -> list[Located[Question]]:
    """Return the prompts with `opening`, a system prompt or nothing, before all that have none."""
    return [
        prompt
        if prompt.value.turns[0].role == "system"
        else replace(prompt, value=replace(prompt.value, turns=(*opening, *prompt.value.turns)))
        for prompt in prompts
    ]


def _prompts(path: Path, split: Split) -> Iterator[Located[Question] | Problem]:
    if path != Path("-"):
        for file in files_of(path, split):
            yield from parsed_values(file, parse_prompt)
        return
    with TemporaryDirectory() as directory:
        raw = sys.stdin.buffer.read()
        file = Path(directory) / ("stdin.jsonl" if raw.lstrip()[:1] == b"{" else "stdin.txt")
        file.write_bytes(raw)
        for row in parsed_values(file, parse_prompt):
            yield replace(row, place=replace(row.place, file="stdin"))


def parse_prompt(value: object) -> Question:
    """Return what one row asks. Raises ValueError, saying what is wrong with it."""
    question = _parse_prompt(value)
    return replace(question, item=value) if isinstance(value, Mapping) else question


def _parse_prompt(value: object) -> Question:
    row = {k: v for k, v in value.items() if v is not None} if isinstance(value, Mapping) else {}
    if "references" in row:
        return _parse(value)
    # A row without its answer is read as one that has some answer.
    shape = next((key for key in (*_TURNS, *_ANSWERS) if key in row), "")
    items, answer = row.get(shape), row.get(_ANSWERS.get(shape, ""))
    unanswered = shape in _TURNS or (shape in _ANSWERS and not (answer and str(answer).strip()))
    if isinstance(items, list) and shape in _TURNS:
        role, text = _TURNS[shape]
        row[shape] = [*items, {role: "assistant", text: _TO_COME}]
    elif unanswered:
        row[_ANSWERS.get(shape, "")] = _TO_COME
    parsed = parse_row(row if isinstance(value, Mapping) else value, answered=False)
    if isinstance(parsed, PlainText):
        return Question((Message("user", parsed.text),), (), parsed.unused)
    turns = parsed.messages[:-1] if unanswered else parsed.messages
    _refuse_tools(parsed)
    references: tuple[str, ...] = ()
    if turns and turns[-1].role == "assistant":
        turns, references = turns[:-1], (turns[-1].content,)
    if not turns or not turns[-1].content.strip():
        raise ValueError("nothing is asked: the turn to be answered is empty")
    # Whether a turn would be learnt makes no difference here.
    turns = tuple(replace(turn, learn=True) for turn in turns)
    return Question(turns, references, parsed.unused)


def _refuse_tools(row: Conversation) -> None:
    if row.tools or any(turn.calls for turn in row.messages):
        raise ValueError("questions with tools cannot be asked yet; leave such rows out")
