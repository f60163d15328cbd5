"""The turns of a conversation, from the keys under which people keep them; each fault is named."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from veneer.errors import closest, nearest


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `role` is system, user, assistant or tool.

    An assistant's turn with `learn` false is context only: it stands in a `prompt`, or has the
    weight 0 (OpenAI's mark for that). `fields` are what else the chat template gets of the turn:
    `tool_calls` and the like, by their keys.
    """

    role: str
    content: str
    learn: bool = True
    fields: Mapping[str, object] = field(default_factory=dict, hash=False)

    @property
    def calls(self) -> list[str]:
        """The names of the functions that the turn calls."""
        calls = self.fields.get("tool_calls", ())
        return [_function(call)["name"] for call in calls]  # type: ignore[attr-defined]


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

# Keys without which a row means something else, and what to do about each.
_OF_CHATS = "but belongs to a conversation; give the row as 'messages'"
_NOT_TEXT = "as a language model sees only text; take the key out, or leave out such rows"
_CHANGES_MEANING = {
    "system": _OF_CHATS,
    "tools": _OF_CHATS,
    "history": "but beside 'instruction' and 'output' is; write the rounds as messages",
    "input": "but likely belongs to the question; write it into that",
    "context": "but likely belongs to the question; write it into that",
    "functions": "being OpenAI's older form; rename it to 'tools'",
    "function_call": "being OpenAI's older form; give 'tool_calls'",
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _NOT_TEXT),
}
# What a message may hold beside role and content, and the chat template gets as it is.
_FIELDS = ("tool_calls", "tool_call_id", "name")


@dataclass(frozen=True, slots=True)
class Turns:
    """Turns, and the keys of messages that nothing reads."""

    messages: list[Message]
    unused: Sequence[str] = ()


def read_question(row: Mapping[str, object], key: str) -> Turns:
    """Return the user's turn that is the text under `key`."""
    return Turns([Message("user", text_value(row[key], repr(key)))])


def read_answer(row: Mapping[str, object], key: str) -> Turns:
    """Return the assistant's turn that is the text under `key`."""
    return Turns([Message("assistant", nonblank_text(row[key], repr(key)))])


def read_turns(
    row: Mapping[str, object], key: str, *, role_key: str = "role", text_key: str = "content"
) -> Turns:
    """Return the turns that stand as a list of objects under `key`."""
    items = row[key]
    if not isinstance(items, list):
        raise ValueError(f"{key!r} must be a list of messages, not {kind(items)}")
    turns = [
        _turn(item, f"{key!r}, message {number}", role_key=role_key, text_key=text_key)
        for number, item in enumerate(items, start=1)
    ]
    read = {role_key, text_key, "weight", *_FIELDS}
    keys = {k: None for item in items for k, value in item.items() if value is not None}
    return Turns(turns, [f"{key}[].{k}" for k in keys if k not in read])


def _turn(item: object, here: str, *, role_key: str, text_key: str) -> Message:
    if not isinstance(item, Mapping):
        raise ValueError(f"{here} must be an object, not {kind(item)}")
    fields = {
        key: _for_template(item[key], f"{here}: {key!r}")
        for key in _FIELDS
        if item.get(key) not in (None, [])
    }
    for key in (role_key, text_key):
        if key not in item and not (key == text_key and "tool_calls" in fields):
            raise ValueError(f"{here} has no {key!r}{_misspelt(key, item)}")
    read = (role_key, text_key)
    check_meaning({k: v for k, v in item.items() if k not in read and v is not None}, read)
    role = text_value(item[role_key], f"{here}: {role_key!r}")
    if role not in ROLES:
        raise ValueError(f"{here}: the role {role!r} is unknown{nearest(role.lower(), ROLES)}")
    content = item.get(text_key)
    if content is None and "tool_calls" in fields:
        content = ""
    content = _content(content, f"{here}: {text_key!r}")
    if "tool_calls" in fields:
        if ROLES[role] != "assistant":
            raise ValueError(f"{here}: only the assistant makes 'tool_calls'")
        fields["tool_calls"] = _tool_calls(fields["tool_calls"], f"{here}: 'tool_calls'")
    elif ROLES[role] == "assistant":
        _not_blank(content, f"{here}: {text_key!r}")
    weight = 1 if item.get("weight") is None else item["weight"]
    if isinstance(weight, bool) or weight not in (0, 1):
        raise ValueError(f"{here}: 'weight' must be 0 (not learnt) or 1 (learnt), not {weight!r}")
    return Message(ROLES[role], content, learn=weight == 1, fields=fields)


def _content(value: object, name: str) -> str:
    """Return a message's text: a string, or a list of parts that are all text."""
    if not isinstance(value, list):
        return text_value(value, name)
    texts = []
    for number, content_part in enumerate(value, start=1):
        here = f"{name}, part {number}"
        if not isinstance(content_part, Mapping):
            raise ValueError(f"{here} must be an object, not {kind(content_part)}")
        if content_part.get("type") != "text":
            raise ValueError(
                f"{here} is of the type {content_part.get('type')!r}; only 'text' can be read"
            )
        texts.append(text_value(content_part.get("text"), f"{here}: 'text'"))
    return "".join(texts)


def _tool_calls(calls: object, name: str) -> list[Mapping[str, object]]:
    """Return the calls as chat templates take them: with arguments as an object, not JSON text."""
    if not isinstance(calls, list):
        raise ValueError(f"{name} must be a list of calls, not {kind(calls)}")
    read: list[Mapping[str, object]] = []
    for number, call in enumerate(calls, start=1):
        here = f"{name}, call {number}"
        function = dict(_function(call))
        if not isinstance(function.get("name"), str):
            raise ValueError(f"{here} has no 'name' of a function")
        arguments = _decoded(function.get("arguments") or {}, f"{here}: 'arguments'")
        if not isinstance(arguments, Mapping):
            raise ValueError(f"{here}: 'arguments' must be an object, not {kind(arguments)}")
        function["arguments"] = arguments
        call = {**call, "function": function} if "function" in call else function
        read.append(_for_template(call, here))
    return read


def read_tools(row: Mapping[str, object]) -> tuple[Mapping[str, object], ...]:
    """Return the functions that a row's `tools` describes: a list, or that list as JSON text."""
    tools = _decoded(row.get("tools") or [], "'tools'")
    if not isinstance(tools, list):
        raise ValueError(f"'tools' must be a list of functions, not {kind(tools)}")
    for number, tool in enumerate(tools, start=1):
        if not isinstance(_function(tool).get("name"), str):
            raise ValueError(f"'tools', tool {number} has no 'name' of a function")
    return tuple(_for_template(tools, "'tools'"))


def _decoded(value: object, name: str) -> object:
    """Return `value`, decoded where it is JSON text. Raises ValueError, with its name."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else []
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is text, but not JSON: {error}") from error


def _function(tool: object) -> Mapping[str, Any]:
    """Return what a tool or a call says of its function: under `function`, or at once."""
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    return function if isinstance(function, Mapping) else {}


def _for_template(value: object, name: str) -> Any:
    """Return `value` for a chat template: without nulls, which a table puts wherever another row
    has a key. Raises ValueError, with its name, where a text in it cannot be tokenised."""
    try:
        return _without_nulls(value, name)
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply") from None


def _without_nulls(value: object, name: str) -> object:
    if isinstance(value, Mapping):
        items = {text_value(k, name): item for k, item in value.items() if item is not None}
        return {key: _without_nulls(item, name) for key, item in items.items()}
    if isinstance(value, list):
        return [_without_nulls(item, name) for item in value]
    return text_value(value, name) if isinstance(value, str) else value


def check_meaning(others: Mapping[str, object], keys: Sequence[str]) -> None:
    """Raise ValueError for a key that the row's shape does not read and that is no remark."""
    for key, item in others.items():
        empty = item == [] or item == {} or (isinstance(item, str) and not item.strip())
        if key in _CHANGES_MEANING and not empty:
            shape = " and ".join(map(repr, keys))
            raise ValueError(f"{key!r} beside {shape} is not read, {_CHANGES_MEANING[key]}")
        if key == "label" and "completion" in keys and item is False:
            raise ValueError("'label' is false: tune would learn an answer that is not wanted")


def _misspelt(key: str, item: Mapping[str, object]) -> str:
    """Return "; is 'contnt' it?" for the key of `item` nearest to `key`, or nothing."""
    close = closest(key, item, likeness=0.6)
    return f"; is {close!r} it?" if close else ""


def text_value(value: object, name: str) -> str:
    """Return `value` if it is text that a tokenizer can take."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, not {kind(value)}")
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
    return _not_blank(text_value(value, name), name)


def _not_blank(value: str, name: str) -> str:
    if not value.strip():
        raise ValueError(f"{name} is empty, so there is nothing to learn")
    return value


def kind(value: object) -> str:
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
