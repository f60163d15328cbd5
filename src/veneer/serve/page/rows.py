"""A file's first rows as the model reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from veneer.adapter.new_tokens import find_new_tokens
from veneer.data.encode import UNLABELLED, Encoder, encode_rows
from veneer.data.preview import preview
from veneer.data.rows import Conversation, Message, Row, texts_of
from veneer.serve.engine.served import Served
from veneer.serve.jobs import uploads
from veneer.serve.jobs.service import Jobs

SHOWN, READ = 5, 200  # rows that are shown, and rows of which faults are looked for
MAX_LENGTH = 1024  # tokens of a row, as `tune` has it unless it is told otherwise


def first_rows(jobs: Jobs, served: Served, id: str) -> dict[str, Any]:
    """Return the first rows of a file in pieces, each with whether it is learnt, and the faults of
    those near the beginning: what the model's template does not take, or what is too long; what
    they ask and answer, how many tokens a row has in the mean, and which words have many tokens.

    Raises Missing.
    """
    path = jobs.places.file(jobs.file(id, param="file"))
    rows, problems = uploads.first_rows(path, READ)
    encoder = Encoder(served.tokenizer, max_length=MAX_LENGTH)
    examples, more = encode_rows(encoder, rows)
    texts = [text for row in rows for text in texts_of(row.value)]
    return {
        "rows": [
            {
                "pieces": preview(example, served.tokenizer),
                "tokens": len(example.tokens),
                "learnt": sum(label != UNLABELLED for label in example.labels),
            }
            for example in examples[:SHOWN]
        ],
        "mean_tokens": sum(len(x.tokens) for x in examples) / max(1, len(rows)),
        "new_words": find_new_tokens(texts, served.tokenizer),
        "asks": [ask for row in rows[:SHOWN] if (ask := _ask(row.value)) is not None],
        "faults": [
            uploads.without_directory(str(problem), path) for problem in [*problems, *more][:SHOWN]
        ],
    }


def _ask(row: Row) -> dict[str, Any] | None:
    """Return the turns before a row's first answer and its tools as a chat's body has them, and
    that answer; None for a text."""
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
