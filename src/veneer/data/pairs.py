"""Rows of preferences: a chosen and a rejected answer to one prompt, or answers judged one by one.

A pair is one example of two rows, each of which begins with the prompt. A judged answer is one
too: its second row is its prompt with another row's answer, by which KTO measures how far the model
is from its reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, takewhile

from veneer.data.encode import UNLABELLED, Encoder, Example, Rendered, why_unusable
from veneer.data.messages import Message, kind, nonblank_text, read_tools, read_turns, text_value
from veneer.data.problems import Located, Problem
from veneer.data.rows import Conversation, PlainText, Row, parse_row
from veneer.errors import DataError, nearest

_ROWS_AT_ONCE = 512
_KEYS = ("prompt", "chosen", "rejected")
_OF_OPENAI = {"preferred_output": "chosen", "non_preferred_output": "rejected"}
_BESIDE = ("system", "tools")  # what is read beside these keys


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt with the answer that was chosen and the one that was rejected."""

    chosen: Row
    rejected: Row


@dataclass(frozen=True, slots=True)
class Judged:
    """A conversation or text, and whether its answer is one to give."""

    row: Row
    desirable: bool


Preference = Pair | Judged


def parse_pair(value: object) -> list[Preference]:
    """Return the pair that `value`, a decoded JSON object, holds.

    chosen and rejected are texts, or lists of messages. So is `prompt`; without it, the prompt is
    what both begin with. Beside messages `system` and `tools` are read. Or as OpenAI has it:
    `input` with `messages` and `tools`, `preferred_output` and `non_preferred_output`.
    Raises ValueError, saying what is wrong with the row.
    """
    row = _as_ours(_object(value))
    for key in _KEYS[1:]:
        if key not in row:
            if isinstance(row.get("label"), bool):
                raise ValueError("the row is a judged answer; learn from it by --objective kto")
            has = ", ".join(map(repr, row)) or "no keys"
            guess = next((nearest(other, [key]) for other in row if nearest(other, [key])), "")
            raise ValueError(f"a pair needs 'chosen' and 'rejected', and the row has {has}{guess}")
    unused = tuple(key for key in row if key not in (*_KEYS, *_BESIDE))
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise ValueError("'chosen' and 'rejected' must both be texts or both lists of messages")
    if "prompt" not in row and not isinstance(chosen, list):
        return [_texts(row, unused)]
    both = [_conversation(row, key) for key in ("chosen", "rejected")]
    if both[0].messages == both[1].messages:
        raise ValueError("'chosen' and 'rejected' are the same, so there is nothing to prefer")
    first, second = (replace(each, unused=unused) for each in _after_prompt(*both))
    return [Pair(first, replace(second, unused=()))]


def parse_judged(value: object) -> list[Preference]:
    """Return the judged answer that `value` holds, any row with a boolean `label`; of a pair, both
    of its answers. Raises ValueError, saying what is wrong with the row."""
    row = _object(value)
    if "chosen" in row and "rejected" in row:
        (pair,) = parse_pair(value)
        assert isinstance(pair, Pair)
        return [Judged(pair.chosen, True), Judged(pair.rejected, False)]
    if not isinstance(row.get("label"), bool):
        what = kind(row["label"]) if "label" in row else "missing"
        raise ValueError(f"'label' must be true or false, and is {what}")
    answer = parse_row({key: item for key, item in row.items() if key != "label"})
    return [Judged(answer, bool(row["label"]))]


def _object(value: object) -> dict[str, object]:
    if not isinstance(value, Mapping):
        raise ValueError(f"a row must be an object, not {kind(value)}")
    return {key: item for key, item in value.items() if item is not None}


def is_pair(value: object) -> bool:
    """Return whether a decoded JSON value has the keys of a pair."""
    return isinstance(value, Mapping) and bool({*_KEYS[1:], *_OF_OPENAI} & {*value})


def _as_ours(row: dict[str, object]) -> dict[str, object]:
    """Return OpenAI's shape of a pair with our keys, and any other row as it is."""
    if not {*_OF_OPENAI} & {*row}:
        return row
    asked = row.get("input")
    if not isinstance(asked, Mapping) or not isinstance(asked.get("messages"), list):
        raise ValueError("'input' must be an object with 'messages' beside 'preferred_output'")
    named = {_OF_OPENAI.get(key, key): item for key, item in row.items() if key != "input"}
    beside = {"tools": asked["tools"]} if asked.get("tools") else {}
    return {"prompt": asked["messages"], **beside, **named}


def _texts(row: Mapping[str, object], unused: tuple[str, ...]) -> Pair:
    """Return a pair of texts, of which what both begin with is the prompt, up to a whole word."""
    texts = [nonblank_text(row[key], repr(key)) for key in ("chosen", "rejected")]
    if texts[0] == texts[1]:
        raise ValueError("'chosen' and 'rejected' are the same, so there is nothing to prefer")
    same = takewhile(lambda both: both[0] == both[1], zip(*texts, strict=False))
    shared = "".join(character for character, _ in same)
    while shared and not shared[-1].isspace():
        shared = shared[:-1]
    chosen, rejected = (PlainText(text, learnt_from=len(shared.rstrip(" "))) for text in texts)
    if min(len(text.rstrip()) for text in texts) <= chosen.learnt_from:
        raise ValueError("one of 'chosen' and 'rejected' is only what both begin with")
    return Pair(replace(chosen, unused=unused), rejected)


def _conversation(row: Mapping[str, object], key: str) -> Conversation:
    """Return the prompt with the answer under `key`."""
    prompt = row.get("prompt")
    if isinstance(row[key], list):
        turns = read_turns(row, key).messages
        # Some data sets have the prompt as a text, and once more as the first message.
        is_repeated = isinstance(prompt, str) and turns and turns[0].role != "assistant"
        before = [] if is_repeated else _turns_of_prompt(row)
    else:
        turns = [Message("assistant", nonblank_text(row[key], repr(key)))]
        before = _turns_of_prompt(row)
    messages = [*(replace(turn, learn=False) for turn in before), *turns]
    if not messages or messages[-1].role != "assistant":
        raise ValueError(f"{key!r} must end with an answer of the assistant's")
    system = text_value(row.get("system", ""), "'system'")
    if system.strip() and messages[0].role != "system":
        messages = [Message("system", system), *messages]
    return Conversation(tuple(messages), read_tools(row))


def _turns_of_prompt(row: Mapping[str, object]) -> list[Message]:
    if "prompt" not in row:
        return []
    if isinstance(row["prompt"], list):
        return read_turns(row, "prompt").messages
    return [Message("user", nonblank_text(row["prompt"], "'prompt'"))]


def _after_prompt(chosen: Conversation, rejected: Conversation) -> tuple[Conversation, ...]:
    """Return both with only those answers learnt that come behind what both begin with."""
    pairs = zip(chosen.messages, rejected.messages, strict=False)
    shared = 0
    for one, other in pairs:
        if (one.role, one.content, one.fields) != (other.role, other.content, other.fields):
            break
        shared += 1
    shared = min(shared, len(chosen.messages) - 1, len(rejected.messages) - 1)
    return tuple(
        replace(
            each,
            messages=tuple(
                replace(turn, learn=turn.learn and number >= shared)
                for number, turn in enumerate(each.messages)
            ),
        )
        for each in (chosen, rejected)
    )


def rows_in(preference: Preference) -> list[Row]:
    """Return the rows of a preference."""
    if isinstance(preference, Judged):
        return [preference.row]
    return [preference.chosen, preference.rejected]


def each_of(values: Iterable[Located[list[Preference]]]) -> list[Located[Preference]]:
    """Return what values hold, each with its value's place."""
    return [Located(each, value.place) for value in values for each in value.value]


PARSERS: Mapping[str, Callable[[object], list[Preference]]] = {
    "pairs": parse_pair,
    "judged": parse_judged,
}


def encode_preferences(
    encoder: Encoder, rows: Iterable[Located[Preference]]
) -> tuple[list[Example], list[Problem]]:
    """Return rows as examples of two rows each, and the problems of those that cannot be used.

    Whatever of a long row does not fit is cut off.
    """
    examples: list[Example] = []
    problems: list[Problem] = []
    waiting = iter(rows)
    while chunk := list(islice(waiting, _ROWS_AT_ONCE)):
        for row, encoded in zip(chunk, _encoded(encoder, chunk), strict=True):
            if isinstance(encoded, str):
                problems += [Problem(row.place, encoded)] if encoded else []
            else:
                examples.append(encoded)
    if any(not example.second for example in examples):
        if len(examples) < 2:
            raise DataError("kto compares each answer with one to another prompt; give more rows")
        examples = with_others_answers(examples, encoder.max_length)
    return examples, problems


def _encoded(encoder: Encoder, rows: Sequence[Located[Preference]]) -> list[Example | str]:
    """Return each row as an example, or why it cannot be, "" where it is left out as too long."""
    rendered: list[list[Rendered]] = []
    outcomes: list[int | str] = []  # how many rows, or why there are none
    for row in rows:
        try:
            texts = [encoder.render(Located(each, row.place)) for each in rows_in(row.value)]
            rendered.append(texts)
            outcomes.append(len(texts))
        except DataError as error:
            outcomes.append(str(error))
    encoded = iter(encoder.tokenise([text for texts in rendered for text in texts]))
    texts_of = iter(rendered)
    results: list[Example | str] = []
    for row, outcome in zip(rows, outcomes, strict=True):
        if isinstance(outcome, str):
            results.append(outcome)
            continue
        pieces = [next(encoded)[0] for _ in range(outcome)]
        whys = [
            why_unusable(encoder, text, piece)
            for text, piece in zip(next(texts_of), pieces, strict=True)
        ]
        if (why := next((why for why in whys if why is not None), None)) is not None:
            results.append(why)
        elif isinstance(row.value, Judged):
            results.append(replace(pieces[0], desirable=row.value.desirable))
        elif pieces[0].tokens == pieces[1].tokens:
            results.append("the answers do not differ within --max-length; raise it")
        else:
            results.append(as_pair(*pieces))
    return results


def as_pair(chosen: Example, rejected: Example) -> Example:
    """Return two rows as one example."""
    return replace(
        chosen,
        tokens=chosen.tokens + rejected.tokens,
        labels=chosen.labels + rejected.labels,
        truncated=chosen.truncated + rejected.truncated,
        unread=chosen.unread + rejected.unread,
        second=len(chosen.tokens),
    )


def with_others_answers(examples: Sequence[Example], max_length: int) -> list[Example]:
    """Return judged answers, each with a second row: its prompt with the next one's answer."""
    pairs = []
    for number, own in enumerate(examples):
        other = examples[(number + 1) % len(examples)]
        prompt, answer = (
            next(i for i, label in enumerate(each.labels) if label != UNLABELLED)
            for each in (own, other)
        )
        row = Example(
            (own.tokens[:prompt] + other.tokens[answer:])[:max_length],
            ([UNLABELLED] * prompt + other.labels[answer:])[:max_length],
            own.where,
            0,
        )
        pairs.append(as_pair(own, row))
    return pairs
