"""Schemas of the kinds that programs ask answers to follow, and whether a text follows one."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema_rs

PATTERNS = (
    r"^[A-Z]{2}-[0-9]{3}$",
    r"^(red|green|blue)[0-9]?$",
    r"^[a-z]+(_[a-z]+){0,2}$",
    r"^\+?[0-9]{6,9}$",
)
# By its grammar alone a time may have a leap second anywhere, and an email's name be too long.
FORMATS = ("date", "uuid", "ipv4", "ipv6")
NAMES = ("name", "age", "city", "tags", "price", "active", "owner", "items", "code", "note")


def schemas(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Return schemas of objects, nested, with enums, patterns, bounds, unions and references."""
    return [_Maker(random.Random(f"{seed}/{n}")).document() for n in range(count)]


def problem(text: str, schema: Any) -> str:
    """Return what is wrong with a text that should be JSON of a schema; nothing where it is."""
    try:
        jsonschema_rs.validate(schema, json.loads(text), validate_formats=True)
    except (json.JSONDecodeError, jsonschema_rs.ValidationError) as error:
        return str(error) or repr(error)
    return ""


class _Maker:
    def __init__(self, draw: random.Random) -> None:
        self.draw = draw

    def document(self) -> dict[str, Any]:
        schema = self.object(depth=2)
        if self.draw.random() < 0.4:
            schema["$defs"] = {"point": self.object(depth=0)}
            schema["properties"]["place"] = {"$ref": "#/$defs/point"}
            schema["required"].append("place")
        return schema

    def object(self, *, depth: int) -> dict[str, Any]:
        names = self.draw.sample(NAMES, self.draw.randint(1, 4))
        optional = names[: len(names) // 3]
        return {
            "type": "object",
            "properties": {name: self.value(depth) for name in names},
            "required": [name for name in names if name not in optional],
            "additionalProperties": False,
        }

    def value(self, depth: int) -> dict[str, Any]:
        flat = [self.text, self.pattern, self.format, self.enum, self.integer, self.number]
        flat += [self.flag, self.constant, self.nothing_or_text]
        if depth == 0:
            return self.draw.choice(flat)()
        kind = self.draw.random()
        if kind < 0.3:
            return self.object(depth=depth - 1)
        if kind < 0.5:
            return self.array(depth - 1)
        if kind < 0.6:
            return {"anyOf": [self.integer(), self.enum(), self.object(depth=0)]}
        return self.draw.choice(flat)()

    def array(self, depth: int) -> dict[str, Any]:
        least = self.draw.randint(0, 2)
        most = least + self.draw.randint(1, 2)
        return {"type": "array", "items": self.value(depth), "minItems": least, "maxItems": most}

    def text(self) -> dict[str, Any]:
        return {"type": "string", "minLength": 1, "maxLength": self.draw.randint(3, 12)}

    def pattern(self) -> dict[str, Any]:
        return {"type": "string", "pattern": self.draw.choice(PATTERNS), "maxLength": 20}

    def format(self) -> dict[str, Any]:
        return {"type": "string", "format": self.draw.choice(FORMATS)}

    def enum(self) -> dict[str, Any]:
        return {
            "enum": self.draw.sample(["yes", "no", 'it\'s "so"', 7, None, True, "maybe not"], 3)
        }

    def integer(self) -> dict[str, Any]:
        least = self.draw.randint(-50, 50)
        return {"type": "integer", "minimum": least, "maximum": least + self.draw.randint(1, 400)}

    def number(self) -> dict[str, Any]:
        return {"type": "number", "minimum": 0, "exclusiveMaximum": 1.5}

    def flag(self) -> dict[str, Any]:
        return {"type": "boolean"}

    def constant(self) -> dict[str, Any]:
        return {"const": self.draw.choice(["v1", 3, None])}

    def nothing_or_text(self) -> dict[str, Any]:
        return {"type": ["string", "null"], "maxLength": 8}
