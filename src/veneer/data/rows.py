"""One row of training data: a conversation or a text, from any of the shapes in common use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from veneer.data.messages import (
    ROLES,
    Message,
    Turns,
    check_meaning,
    kind,
    nonblank_text,
    read_answer,
    read_question,
    read_tools,
    read_turns,
    text_value,
)
from veneer.errors import nearest

__all__ = [
    "ROLES",
    "Conversation",
    "LongRows",
    "Message",
    "PlainText",
    "Row",
    "nonblank_text",
    "parse_row",
    "texts_of",
    "unused_keys",
]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in order, of which at least one is an answer to learn.

    `tools` are the functions that the model may call, as the chat template takes them; `unused`
    are the keys of the row that nothing reads.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, object], ...] = field(default=(), hash=False)
    unused: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class PlainText:
    """Text that is no conversation, learnt from a character on."""

    text: str
    unused: tuple[str, ...] = field(default=(), compare=False)
    learnt_from: int = 0


Row = Conversation | PlainText
RowShape = Literal["answers", "pairs", "judged", "prompts"]  # what a row of the data is
LongRows = Literal["cut", "split", "drop", "error"]  # what becomes of rows that are too long


def parse_row(value: object, *, answered: bool = True) -> Row:
    """Return the conversation or text that `value`, a decoded JSON object, holds.

    Shapes, the first that is complete: `messages` (OpenAI), `conversations` (ShareGPT), `prompt`
    and `completion` (strings or lists of messages), `instruction`, `input` and `output` (Alpaca),
    `question` and `answer`, `text`. Beside a conversation `system` and `tools` are read, beside
    Alpaca's keys `history` too. Other keys are listed in `unused`; a null counts as absent.
    answered: whether an error about missing keys asks for those of answers too.
    Raises ValueError, saying what is wrong with the row, or which other key would change what the
    row means.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"a row must be an object, not {kind(value)}")
    row = {key: item for key, item in value.items() if item is not None}
    for keys, more, parse in _SHAPES:
        if all(key in row for key in keys):
            others = [key for key in row if key not in keys and key not in more]
            check_meaning({key: row[key] for key in others}, keys)
            parsed = parse(row)
            return replace(parsed, unused=(*others, *parsed.unused))
    raise ValueError(_why_no_shape(row, answered=answered))


def _messages(row: Mapping[str, object]) -> Conversation:
    return _conversation(row, read_turns(row, "messages"))


def _sharegpt(row: Mapping[str, object]) -> Conversation:
    return _conversation(row, read_turns(row, "conversations", role_key="from", text_key="value"))


def _prompt_completion(row: Mapping[str, object]) -> Conversation:
    asked = (
        read_turns(row, "prompt")
        if isinstance(row["prompt"], list)
        else read_question(row, "prompt")
    )
    answer = (
        read_turns(row, "completion")
        if isinstance(row["completion"], list)
        else read_answer(row, "completion")
    )
    unused = [*asked.unused, *answer.unused]
    context = [replace(turn, learn=False) for turn in asked.messages]
    return _conversation(row, Turns([*context, *answer.messages], unused))


def _alpaca(row: Mapping[str, object]) -> Conversation:
    question = read_question(row, "instruction").messages[0]
    if "input" in row and (extra := text_value(row["input"], "'input'")).strip():
        question = replace(question, content=f"{question.content}\n\n{extra}")
    answer = read_answer(row, "output").messages
    return _conversation(row, Turns([*_history(row), question, *answer]))


def _history(row: Mapping[str, object]) -> list[Message]:
    """Return the earlier rounds of an Alpaca row, each a question with its answer."""
    rounds = row.get("history") or []
    if not isinstance(rounds, list):
        raise ValueError(f"'history' must be a list of rounds, not {kind(rounds)}")
    turns = []
    for number, pair in enumerate(rounds, start=1):
        here = f"'history', round {number}"
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"{here} must be a list of a question and its answer")
        turns.append(Message("user", text_value(pair[0], f"{here}: the question")))
        turns.append(Message("assistant", nonblank_text(pair[1], f"{here}: the answer")))
    return turns


def _question_answer(row: Mapping[str, object]) -> Conversation:
    question, answer = read_question(row, "question"), read_answer(row, "answer")
    return _conversation(row, Turns([*question.messages, *answer.messages]))


def _plain_text(row: Mapping[str, object]) -> PlainText:
    return PlainText(nonblank_text(row["text"], "'text'"))


def _conversation(row: Mapping[str, object], turns: Turns) -> Conversation:
    """Return the turns with the row's system prompt in front, and the row's tools."""
    messages = turns.messages
    if not any(turn.role == "assistant" and turn.learn for turn in messages):
        raise ValueError("no turn is an answer of the assistant's, so there is nothing to learn")
    system = text_value(row.get("system", ""), "'system'")
    if system.strip():
        if messages[0].role == "system" and messages[0].content != system:
            raise ValueError("'system' and the first message are two system prompts; keep one")
        if messages[0].role != "system":
            messages = [Message("system", system), *messages]
    return Conversation(tuple(messages), read_tools(row), tuple(turns.unused))


_CHAT = ("system", "tools")  # what every shape of a conversation takes beside its own keys
_Shape = tuple[tuple[str, ...], tuple[str, ...], Callable[[Mapping[str, object]], Row]]
_SHAPES: tuple[_Shape, ...] = (
    (("messages",), _CHAT, _messages),
    (("conversations",), _CHAT, _sharegpt),
    (("prompt", "completion"), _CHAT, _prompt_completion),
    (("instruction", "output"), ("input", "history", *_CHAT), _alpaca),
    (("question", "answer"), _CHAT, _question_answer),
    (("text",), (), _plain_text),
)
_KEYS = [key for keys, _, _ in _SHAPES for key in keys]


def _why_no_shape(row: Mapping[str, object], *, answered: bool) -> str:
    """Say which keys the row has, and which it ought to have."""
    if "chosen" in row and "rejected" in row:
        return "the row is a pair of answers; name what learns from pairs, as by --objective dpo"
    has = "the row has " + (", ".join(repr(key) for key in row) or "no keys")
    for key in row:
        if key not in _KEYS and (guess := nearest(key, _KEYS)):
            return f"{has}; {key!r} is unknown{guess}"
    for keys, _, _ in _SHAPES:
        missing = [key for key in keys if key not in row]
        if len(missing) < len(keys):
            return f"{has}, but not {missing[0]!r}"
    shapes = [keys if answered else keys[:1] for keys, _, _ in _SHAPES]
    needed = ", or ".join(" and ".join(map(repr, keys)) for keys in shapes)
    return f"{has}; it needs {needed}"


def texts_of(row: Row) -> list[str]:
    """Return every text of a row: its turns, or the row itself."""
    return [row.text] if isinstance(row, PlainText) else [turn.content for turn in row.messages]


def common_system_prompt(rows: Iterable[Row]) -> str | None:
    """Return the system prompt that all conversations begin with, or None if not all do."""
    firsts = {row.messages[0] for row in rows if isinstance(row, Conversation)}
    first = firsts.pop() if len(firsts) == 1 else None
    return first.content if first and first.role == "system" else None


def unused_keys(rows: Iterable[Row]) -> dict[str, int]:
    """Return the keys that rows have and nothing reads, each with the number of such rows."""
    return dict(Counter(key for row in rows for key in row.unused).most_common())
