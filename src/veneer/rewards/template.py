"""Texts with a row's fields and the answer in them: `{{ item.x }}`, `{{ sample.output_text }}`.

There are names, numbers of entries, and nothing else: no filters, no calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from veneer.errors import shortened

MOST_CHARACTERS = 20_000
MOST_PLACES = 32  # each of which may be filled with a whole answer
_NAME = re.compile(r"\w+")
_PATH = re.compile(r"(item|sample)((?:\.\w+|\[\d{1,6}\])+)")
_STEP = re.compile(r"\.(\w+)|\[(\d+)\]")
OF_SAMPLE = ("output_text", "output_json")


class Lacking(Exception):
    """The row, or the answer, has nothing at a place of a template."""

    def __init__(self, field: Field) -> None:
        super().__init__(f"{field} is not there")
        self.field = field


@dataclass(frozen=True)
class Field:
    """What stands between two pairs of braces: `item` or `sample`, and the steps into it."""

    root: str
    steps: tuple[str | int, ...]

    def __str__(self) -> str:
        steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in self.steps)
        return self.root + "".join(steps)

    def text_in(self, values: Mapping[str, Any]) -> str:
        """Return what is there: numbers, lists and objects as JSON, and a text, or what JSON has
        not, such as a date of a table, as it is. Raises Lacking."""
        value: Any = values[self.root]
        for step in self.steps:
            is_there = (
                isinstance(value, Sequence) and not isinstance(value, str) and step < len(value)
                if isinstance(step, int)
                else isinstance(value, Mapping) and step in value
            )
            value = value[step] if is_there else None
            if value is None:
                raise Lacking(self)
        if not isinstance(value, bool | int | float | list | dict):
            return str(value)
        try:
            return json.dumps(value, ensure_ascii=False, default=str)
        except RecursionError:  # within itself too often to be a text
            raise Lacking(self) from None


@dataclass(frozen=True)
class Template:
    """A text, in pieces: as they are, and places that are filled for each answer."""

    pieces: tuple[str | Field, ...]

    @property
    def fields(self) -> tuple[Field, ...]:
        """The places that a row has to fill."""
        return tuple(x for x in self.pieces if isinstance(x, Field) and x.root == "item")

    def fill(self, item: Mapping[str, Any], answer: str) -> str:
        """Return the text for an answer to a row. Raises Lacking."""
        sample = {"output_text": answer}
        if any(isinstance(x, Field) and x.steps[0] == "output_json" for x in self.pieces):
            sample["output_json"] = _json_of(answer)
        values = {"item": item, "sample": sample}
        return "".join(x if isinstance(x, str) else x.text_in(values) for x in self.pieces)


def template_of(text: str) -> Template:
    """Return a text as a template. Raises ValueError, saying what is wrong with it."""
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"it has {len(text):,} characters, and may have {MOST_CHARACTERS:,}")
    before, *places = text.split("{{")
    if len(places) > MOST_PLACES:
        raise ValueError(f"it has {len(places):,} places to fill, and may have {MOST_PLACES}")
    pieces: list[str | Field] = [before]
    for place in places:
        name, end, behind = place.partition("}}")
        if not end:
            raise ValueError("a {{ has no }} behind it")
        pieces += (_field(name.strip()), behind)
    return Template(tuple(piece for piece in pieces if piece))


def is_name(key: str) -> bool:
    """Return whether a template can name a row's field that is called so."""
    return _NAME.fullmatch(key) is not None


def _field(text: str) -> Field:
    if (match := _PATH.fullmatch(text)) is None:
        raise ValueError(
            f"{{{{ {shortened(text, 60)} }}}} names neither a field of the row, such as "
            "{{ item.answer }}, nor {{ sample.output_text }}"
        )
    steps = tuple(name or int(number) for name, number in _STEP.findall(match[2]))
    field = Field(match[1], steps)
    if field.root == "sample" and (
        steps[0] not in OF_SAMPLE or (steps[0] == "output_text" and len(steps) > 1)
    ):
        raise ValueError(f"there is no {field}; of an answer there are {' and '.join(OF_SAMPLE)}")
    return field


def _json_of(answer: str) -> Any:
    """Return what an answer says in JSON; nothing where it says none."""
    try:
        return json.loads(answer)
    except (ValueError, RecursionError):
        return None
