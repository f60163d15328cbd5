"""A file's first rows as the model reads them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from veneer.adapter.new_tokens import find_new_tokens
from veneer.data.chat import prompt_text
from veneer.data.encode import UNLABELLED, Encoder, Example, encode_rows
from veneer.data.pairs import Pair, Preference, each_of, encode_preferences
from veneer.data.preview import preview
from veneer.data.problems import Located, Problem
from veneer.data.questions import Question
from veneer.data.rows import Conversation, Message, Row, texts_of
from veneer.errors import ConfigError, DataError
from veneer.rewards.template import is_name
from veneer.serve.engine.served import Served
from veneer.serve.jobs import uploads
from veneer.serve.jobs.service import Jobs
from veneer.serve.jobs.values import Kind

SHOWN, READ = 5, 200  # rows that are shown, and rows of which faults are looked for
NO_FIELDS = ("messages", "conversations", "prompt", "system", "tools")  # which no answer is like
MAX_LENGTH = 1024  # tokens of a row, as `tune` has it unless it is told otherwise


def first_rows(jobs: Jobs, served: Served, id: str) -> dict[str, Any]:
    """Return the first rows of a file in pieces, each with whether it is learnt, and the faults of
    those near the beginning: what the model's template does not take, or what is too long; what
    they ask and answer, how many tokens a row has in the mean, and which words have many tokens.
    A pair has the answer that is not wanted beside; prompts have `fields` that graders can read.

    Raises Missing.
    """
    file = jobs.file(id, param="file")
    path, kind = jobs.places.file(file), file.kind or "answers"
    rows, problems = uploads.first_rows(path, READ, kind)
    examples, more = ENCODED[kind](served, rows)
    asked = [_asked(row.value) for row in rows]
    texts = [text for row in asked if isinstance(row, Row) for text in texts_of(row)]
    fields = {key for row in rows if kind == "prompts" for key in _fields(row.value)}
    return {
        "kind": kind,
        "rows": [_in_pieces(example, served) for example in examples[:SHOWN]],
        "fields": sorted(fields.difference(NO_FIELDS)),
        "mean_tokens": sum(len(x.tokens) for x in examples) / max(1, len(rows)),
        "new_words": find_new_tokens(texts, served.tokenizer) if kind == "answers" else [],
        "asks": [ask for row in asked[:SHOWN] if (ask := _ask(row)) is not None],
        "faults": [
            uploads.without_directory(str(problem), path) for problem in [*problems, *more][:SHOWN]
        ],
    }


def _fields(prompt: Question) -> Iterator[str]:
    """Yield the keys of a prompt's row whose values a text can be compared with: a template names
    no others than these, and lists are no answers."""
    for key, value in prompt.item.items():
        if is_name(key) and value is not None and not isinstance(value, list | dict):
            yield key


def _in_pieces(example: Example, served: Served) -> dict[str, Any]:
    """Return an example in pieces; of a pair the second row in `rejected`."""
    tokens, labels, at = example.tokens, example.labels, example.second or len(example.tokens)
    own = [
        replace(example, tokens=some, labels=their_labels, second=0)
        for some, their_labels in ((tokens[:at], labels[:at]), (tokens[at:], labels[at:]))
    ]
    pieces = [preview(each, served.tokenizer) for each in own]
    return {
        "pieces": pieces[0],
        "rejected": pieces[1],
        "tokens": len(own[0].tokens),
        "learnt": sum(label != UNLABELLED for label in own[0].labels),
    }


Encoded = tuple[list[Example], list[Problem]]


def _answers(served: Served, rows: Sequence[Located[Row]]) -> Encoded:
    return encode_rows(Encoder(served.tokenizer, max_length=MAX_LENGTH), rows)


def _pairs(served: Served, rows: Sequence[Located[list[Preference]]]) -> Encoded:
    return encode_preferences(Encoder(served.tokenizer, max_length=MAX_LENGTH), each_of(rows))


def _prompts(served: Served, rows: Sequence[Located[Question]]) -> Encoded:
    """Return prompts as the model reads them; nothing of them is learnt."""
    examples, problems = [], []
    for row in rows:
        try:
            text = prompt_text(served.tokenizer, list(row.value.turns))
        except (ConfigError, DataError) as error:
            problems.append(Problem(row.place, str(error)))
            continue
        tokens = list(served.tokenizer(text, add_special_tokens=False)["input_ids"])
        examples.append(Example(tokens, [UNLABELLED] * len(tokens), str(row.place), 0))
    return examples, problems


ENCODED: Mapping[Kind, Callable[..., Encoded]] = {
    "answers": _answers,
    "pairs": _pairs,
    "prompts": _prompts,
}


def _asked(value: Row | list[Preference] | Question) -> Row | Question:
    """Return a row, of a pair that with the answer to give."""
    if isinstance(value, list):
        (pair,) = value
        assert isinstance(pair, Pair)
        return pair.chosen
    return value


def _ask(row: Row | Question) -> dict[str, Any] | None:
    """Return the turns before a row's first answer and its tools as a chat's body has them, and
    that answer, empty where there is none; None for a text."""
    if isinstance(row, Question):
        reference = next(iter(row.references), "")
        return {"messages": _messages(row.turns), "tools": [], "answer": reference}
    if not isinstance(row, Conversation):
        return None
    at = next(i for i, turn in enumerate(row.messages) if turn.role == "assistant" and turn.learn)
    turns = row.messages[:at]
    if not turns or turns[-1].role != "user":
        return None
    answer = row.messages[at]
    calls = [f"{name} {arguments}" for name, arguments in _calls(answer)]
    return {
        "messages": _messages(turns),
        "tools": [{"type": "function", "function": _described(tool)} for tool in row.tools],
        "answer": "\n".join([answer.content] * bool(answer.content) + calls),
    }


def _messages(turns: Sequence[Message]) -> list[dict[str, Any]]:
    """Return turns as a chat's body has them. Calls without an id, and results without that of
    their call, get one in their order."""
    messages, waiting, number = [], list[str](), 0
    for turn in turns:
        message: dict[str, Any] = {"role": turn.role, "content": turn.content}
        if turn.role == "tool":
            in_order = waiting.pop(0) if waiting else "call_0"
            message["tool_call_id"] = str(turn.fields.get("tool_call_id", in_order))
        if calls := _calls(turn):
            written = turn.fields["tool_calls"]
            assert isinstance(written, list)
            waiting = [str(call.get("id", f"call_{number + i}")) for i, call in enumerate(written)]
            number += len(calls)
            message["tool_calls"] = [
                {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
                for id, (name, arguments) in zip(waiting, calls, strict=True)
            ]
        messages.append(message)
    return messages


def _calls(turn: Message) -> list[tuple[str, str]]:
    """Return the calls of a turn: the function's name, and its arguments as JSON."""
    calls = turn.fields.get("tool_calls", ())
    assert isinstance(calls, Sequence)
    functions = [call.get("function", call) for call in calls]
    return [
        (function["name"], json.dumps(function["arguments"], ensure_ascii=False))
        for function in functions
    ]


def _described(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a chat's body says of a function."""
    function = tool.get("function", tool)
    return {key: function[key] for key in ("name", "description", "parameters") if key in function}
