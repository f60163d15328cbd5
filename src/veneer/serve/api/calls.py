"""How a model writes calls of functions: found by its own chat template, and read as text comes.

A template is shown a conversation with a call that is known. What stands around the function's name
and its arguments is the form, whichever model it is:

    <tool_call>\\n{"name": "NAME", "arguments": ARGUMENTS}\\n</tool_call>     Hermes, Qwen
    {"name": "NAME", "parameters": ARGUMENTS}                              Llama 3
    [TOOL_CALLS][{"name": "NAME", "arguments": ARGUMENTS, "id": "ID"}]     Mistral
    [TOOL_CALLS]NAME[ARGS]ARGUMENTS                                        Mistral, later
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal
from uuid import uuid4

from transformers import PreTrainedTokenizerBase

from veneer.data.chat import Chat
from veneer.data.rows import Message
from veneer.errors import DataError, RequestError

PROBE, NUMBER, ID = "veneer_probe", "veneer_number", "v3n33rpr0"
ARGUMENTS = re.compile(rf'\{{\s*"{NUMBER}"\s*:\s*\d\s*\}}')
NAME = re.compile(r"\s*([a-zA-Z0-9_-]{1,64})\s*")
BETWEEN = " \n\r\t;,"  # what may stand between calls
MOST_CALLS = 16  # in one answer
DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Call:
    """A call of a function. arguments: a JSON object, as text."""

    name: str
    arguments: str
    id: str

    @classmethod
    def of(cls, name: str, arguments: Any) -> Call:
        # Nine letters and digits: what Mistral's templates take back.
        text = json.dumps(arguments, ensure_ascii=False)
        return cls(name, text, uuid4().hex[:9])


@dataclass(frozen=True)
class CallForm:
    """How calls stand in an answer: before, NAME, middle, ARGUMENTS, after; and between two calls,
    from the first one's arguments to the second one's name, None where a template takes only one.

    opening, closing: what stands around a call; nothing where only its JSON tells it. named:
    whether the name stands outside of any JSON.
    """

    before: str
    middle: str
    after: str
    between: str | None
    opening: str
    closing: str
    named: bool

    @property
    def marks(self) -> str:
        """Return all of its texts, to look for special tokens in."""
        return "".join((self.before, self.middle, self.after, self.between or ""))


def call_form(tokenizer: PreTrainedTokenizerBase) -> CallForm:
    """Return how a model's chat template writes calls.

    Raises RequestError where it writes none, or in a form that is no JSON.
    """
    chat = Chat(tokenizer)
    try:
        one = _answer_of(chat, 1)
    except (DataError, TypeError, ValueError):
        one = ""
    if PROBE not in one:
        raise RequestError(
            "tools cannot be followed: the model's chat template writes no calls of functions.",
            param="tools",
        )
    arguments = ARGUMENTS.search(one, one.index(PROBE))
    if arguments is None:
        raise RequestError(
            "tools cannot be followed: the model's chat template writes the arguments of a call in "
            "a form that is not JSON.",
            param="tools",
        )
    try:
        two = _answer_of(chat, 2)
    except DataError:  # one call at a time
        two = ""
    return _form(one, two, arguments)


def _form(one: str, two: str, arguments: re.Match[str]) -> CallForm:
    name = one.index(PROBE)
    between = None
    if two.count(PROBE) == 2 and (first := ARGUMENTS.search(two)) is not None:
        between = two[first.end() : two.index(PROBE, first.end())]
    value, end = _json_around(one, name)
    head = one[:value]
    if between is not None and not one[value:end].startswith("["):
        to_second = between if value == name else between[: -(name - value)]
        head = head[len(head) - _shared(head[::-1], to_second[::-1]) :]
    return CallForm(
        before=one[:name],
        middle=one[name + len(PROBE) : arguments.start()],
        after=one[arguments.end() :],
        between=between,
        opening=head.strip(),
        closing=one[max(end, arguments.end()) :].strip(),
        named=value == name,
    )


def _answer_of(chat: Chat, calls: int) -> str:
    """Return how a template writes an answer of some calls, without what ends the turn."""
    tool = {
        "type": "function",
        "function": {
            "name": PROBE,
            "description": "-",
            "parameters": {
                "type": "object",
                "properties": {NUMBER: {"type": "integer", "description": "-"}},
            },
        },
    }
    made = [
        {"id": ID, "type": "function", "function": {"name": PROBE, "arguments": {NUMBER: i}}}
        for i in range(calls)
    ]
    user = Message("user", "-")
    prompt = chat.render([user], [tool], prompt=True)
    text = chat.render([user, Message("assistant", "", fields={"tool_calls": made})], [tool])
    answer = text[_shared(text, prompt) :]  # the prompt may have opened a thought
    plain = chat.render([user, Message("assistant", PROBE)]).partition(PROBE)[2]
    return answer.removesuffix(plain) if plain else answer


def _shared(text: str, other: str) -> int:
    """Return how many of their first characters two texts share."""
    pairs = zip(text, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(text), len(other)))


def _json_around(text: str, at: int) -> tuple[int, int]:
    """Return where the largest JSON value around a place begins and ends, or the place itself."""
    for start in (match.start() for match in re.finditer(r"[\[{]", text[:at])):
        try:
            _, end = DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        if end > at:
            return start, end
    return at, at


class CallReader:
    """Text of an answer as it comes, divided into content and calls. Nothing of it is lost: what
    begins like a call and is none of `names` is content."""

    def __init__(self, form: CallForm, names: Collection[str]) -> None:
        self.form, self.names = form, names
        self.calls = 0
        self._text = ""  # of which nothing is decided yet
        self._state: Literal["content", "call", "behind a call"] = "content"
        self._only_content = False  # where JSON alone tells a call, and the answer is none

    def feed(self, text: str) -> tuple[str, list[Call]]:
        """Return what is sure with some more text: content, and whole calls."""
        self._text += text
        content: list[str] = []
        calls: list[Call] = []
        steps = {
            "content": lambda: self._in_content(content),
            "call": lambda: self._in_call(content, calls),
            "behind a call": self._behind_a_call,
        }
        while steps[self._state]():
            pass
        self.calls += len(calls)
        return "".join(content), calls

    def end(self) -> str:
        """Return what is left of the content, as no more text comes."""
        rest, self._text = self._text, ""
        if self._state == "call":
            return self.form.opening + rest
        if self._state == "behind a call" and self.form.closing.startswith(rest.strip(BETWEEN)):
            return ""
        return rest if rest.strip(BETWEEN) or not self.calls else ""

    # Each returns whether the state is another, so that the text may say more.

    def _in_content(self, content: list[str]) -> bool:
        opening = self.form.opening
        if not opening and not self._only_content:
            return self._at_the_beginning()
        before, mark, behind = self._text.partition(opening) if opening else (self._text, "", "")
        if mark:
            content.append(before.rstrip())
            self._state, self._text = "call", behind
            return True
        # White space waits, since none is kept before a call.
        sure = before[: len(before) - _overlap(before, opening)].rstrip()
        content.append(sure)
        self._text = before[len(sure) :]
        return False

    def _at_the_beginning(self) -> bool:
        text = self._text.lstrip(BETWEEN)
        if not text:
            return False
        if text[0] in "{[":
            self._state, self._text = "call", text
        else:
            self._only_content = True
        return True

    def _in_call(self, content: list[str], calls: list[Call]) -> bool:
        read = self._read_named() if self.form.named else self._read_json()
        if read is None:
            return False
        made, end = read
        if made:
            calls += made
            self._state, self._text = "behind a call", self._text[end:]
        else:
            content.append(self.form.opening)
            self._state, self._only_content = "content", True
        return True

    def _behind_a_call(self) -> bool:
        text, closing = self._text.lstrip(BETWEEN), self.form.closing
        if text.startswith(closing):
            self._state, self._text = "content", text[len(closing) :]
            return True
        if closing.startswith(text):
            return False
        self._state = "content"
        return True

    # Each returns the calls that the text begins with and where they end: no calls where it is
    # something else, None where more of it must come.

    def _read_json(self) -> tuple[list[Call], int] | None:
        start = len(self._text) - len(self._text.lstrip())
        if start == len(self._text):
            return None
        if self._text[start] not in "{[":
            return [], 0
        try:
            value, end = DECODER.raw_decode(self._text, start)
        except (ValueError, RecursionError):
            return None
        made = [_call(item) for item in (value if isinstance(value, list) else [value])]
        calls = [call for call in made if call is not None and call.name in self.names]
        return (calls, end) if len(calls) == len(made) else ([], 0)

    def _read_named(self) -> tuple[list[Call], int] | None:
        start = self._text.find("{")
        if start < 0:
            return None
        name = NAME.match(self._text)
        if name is None or name[1] not in self.names:
            return [], 0
        if self._text[name.end() : start].strip() != self.form.middle.strip():
            return [], 0
        try:
            value, end = DECODER.raw_decode(self._text, start)
        except (ValueError, RecursionError):
            return None
        return [Call.of(name[1], value)], end


def _call(value: Any) -> Call | None:
    """Return the call that a JSON value is, None for any other value."""
    if isinstance(value, Mapping) and isinstance(value.get("function"), Mapping):
        value = value["function"]
    if not isinstance(value, Mapping) or not isinstance(name := value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):  # JSON as text
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    return Call.of(name, arguments) if isinstance(arguments, dict) else None


def _overlap(text: str, mark: str) -> int:
    """Return how many of the last characters of `text` are the first of `mark`."""
    longest = min(len(text), len(mark) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(mark[:n])), 0)
