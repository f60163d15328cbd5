"""One row of training data: a conversation or a text, from any of the shapes in common use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from veneer.errors import closest, nearest


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `role` is system, user, assistant or tool.

    An assistant's turn with `learn` false is context only: it stands in a `prompt`, or has the
    weight 0 (OpenAI's mark for that).
    """

    role: str
    content: str
    learn: bool = True


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in order, of which at least one is an answer to learn."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class PlainText:
    """Text that is no conversation, all of which is learnt."""

    text: str


Row = Conversation | PlainText

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
}


def parse_row(value: object) -> Row:
    """Return the conversation or text that `value`, a decoded JSON object, holds.

    Shapes, the first that is complete: `messages` (OpenAI), `conversations` (ShareGPT), `prompt`
    and `completion` (strings or lists of messages), `instruction`, `input` and `output` (Alpaca),
    `question` and `answer`, `text`. Other keys are ignored; a null counts as absent.
    Raises ValueError, saying what is wrong with the row.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"a row must be an object, not {_kind(value)}")
    row = {key: item for key, item in value.items() if item is not None}
    for keys, parse in _SHAPES:
        if all(key in row for key in keys):
            return parse(row)
    raise ValueError(_why_no_shape(row))


def _messages(row: Mapping[str, object]) -> Conversation:
    return _conversation(_turns(row, "messages"))


def _sharegpt(row: Mapping[str, object]) -> Conversation:
    return _conversation(_turns(row, "conversations", role_key="from", text_key="value"))


def _prompt_completion(row: Mapping[str, object]) -> Conversation:
    asked = _turns(row, "prompt") if isinstance(row["prompt"], list) else [_user(row, "prompt")]
    context = [replace(turn, learn=False) for turn in asked]
    if isinstance(row["completion"], list):
        return _conversation([*context, *_turns(row, "completion")])
    return _conversation([*context, _assistant(row, "completion")])


def _alpaca(row: Mapping[str, object]) -> Conversation:
    question = _user(row, "instruction")
    if "input" in row and (extra := _text_value(row["input"], "'input'")).strip():
        question = replace(question, content=f"{question.content}\n\n{extra}")
    return _conversation([question, _assistant(row, "output")])


def _question_answer(row: Mapping[str, object]) -> Conversation:
    return _conversation([_user(row, "question"), _assistant(row, "answer")])


def _plain_text(row: Mapping[str, object]) -> PlainText:
    return PlainText(nonblank_text(row["text"], "'text'"))


_SHAPES: tuple[tuple[tuple[str, ...], Callable[[Mapping[str, object]], Row]], ...] = (
    (("messages",), _messages),
    (("conversations",), _sharegpt),
    (("prompt", "completion"), _prompt_completion),
    (("instruction", "output"), _alpaca),
    (("question", "answer"), _question_answer),
    (("text",), _plain_text),
)
_KEYS = [key for keys, _ in _SHAPES for key in keys]


def _why_no_shape(row: Mapping[str, object]) -> str:
    """Say which keys the row has, and which it ought to have."""
    has = "the row has " + (", ".join(repr(key) for key in row) or "no keys")
    for key in row:
        if key not in _KEYS and (guess := nearest(key, _KEYS)):
            return f"{has}; {key!r} is unknown{guess}"
    for keys, _ in _SHAPES:
        missing = [key for key in keys if key not in row]
        if len(missing) < len(keys):
            return f"{has}, but not {missing[0]!r}"
    return f"{has}; it needs {_shapes()}"


def _misspelt(key: str, item: Mapping[str, object]) -> str:
    """Return "; is 'contnt' it?" for the key of `item` nearest to `key`, or nothing."""
    close = closest(key, item, likeness=0.6)
    return f"; is {close!r} it?" if close else ""


def _shapes() -> str:
    return ", or ".join(" and ".join(repr(key) for key in keys) for keys, _ in _SHAPES)


def _conversation(turns: list[Message]) -> Conversation:
    if not any(turn.role == "assistant" and turn.learn for turn in turns):
        raise ValueError("no turn is an answer of the assistant's, so there is nothing to learn")
    return Conversation(tuple(turns))


def _user(row: Mapping[str, object], key: str) -> Message:
    return Message("user", _text_value(row[key], repr(key)))


def _assistant(row: Mapping[str, object], key: str) -> Message:
    return Message("assistant", nonblank_text(row[key], repr(key)))


def _turns(
    row: Mapping[str, object], key: str, *, role_key: str = "role", text_key: str = "content"
) -> list[Message]:
    items = row[key]
    if not isinstance(items, list):
        raise ValueError(f"{key!r} must be a list of messages, not {_kind(items)}")
    return [
        _turn(item, f"{key!r}, message {number}", role_key=role_key, text_key=text_key)
        for number, item in enumerate(items, start=1)
    ]


def _turn(item: object, here: str, *, role_key: str, text_key: str) -> Message:
    if not isinstance(item, Mapping):
        raise ValueError(f"{here} must be an object, not {_kind(item)}")
    for key in (role_key, text_key):
        if key not in item:
            raise ValueError(f"{here} has no {key!r}{_misspelt(key, item)}")
    role = _text_value(item[role_key], f"{here}: {role_key!r}")
    if role not in ROLES:
        raise ValueError(f"{here}: the role {role!r} is unknown{nearest(role.lower(), ROLES)}")
    content = _text_value(item[text_key], f"{here}: {text_key!r}")
    if ROLES[role] == "assistant":
        _not_blank(content, f"{here}: {text_key!r}")
    return Message(ROLES[role], content, learn=item.get("weight") != 0)


def _text_value(value: object, name: str) -> str:
    """Return `value` if it is text that a tokenizer can take."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, not {_kind(value)}")
    if "\0" in value:
        raise ValueError(f"{name} holds a NUL character at position {value.index(chr(0)) + 1}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} holds the lone surrogate U+{ord(value[error.start]):04X}, half a character, "
            f"at position {error.start + 1}"
        ) from None
    return value


def nonblank_text(value: object, name: str) -> str:
    """Return `value` if it is text that is not blank. Raises ValueError, with its name."""
    return _not_blank(_text_value(value, name), name)


def _not_blank(value: str, name: str) -> str:
    if not value.strip():
        raise ValueError(f"{name} is empty, so there is nothing to learn")
    return value


def _kind(value: object) -> str:
    """Name a JSON type the way JSON does."""
    names: dict[type, str] = {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)


def texts_of(row: Row) -> list[str]:
    """Return every text of a row: its turns, or the row itself."""
    return [row.text] if isinstance(row, PlainText) else [turn.content for turn in row.messages]
