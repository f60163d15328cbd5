"""What a request says its answer must be: OpenAI's `response_format`, and vLLM's names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from veneer.errors import RequestError
from veneer.serve.api.strict import Strict, Text
from veneer.serve.engine.grammar import choice_of
from veneer.serve.engine.request import Grammar

LONGEST = 200_000  # characters of a grammar or an expression, which compile in a second
DEEPEST = 64  # objects and arrays within each other in a schema, as in vLLM
# Parameters that say what an answer must be; a request has one of them.
FORMATS = (
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
)


def _shallow(schema: dict[str, Any]) -> dict[str, Any]:
    """Refuse a schema that only a very deep stack could read."""
    level: list[Any] = [schema]
    depth = 0
    while level := [
        item
        for value in level
        if isinstance(value, dict | list)
        for item in (value.values() if isinstance(value, dict) else value)
    ]:
        depth += 1
        if depth > DEEPEST:
            raise ValueError(f"is nested more than {DEEPEST} deep")
    return schema


def _schema(schema: dict[str, Any] | str) -> dict[str, Any]:
    """Return a schema that may be JSON text."""
    if isinstance(schema, dict):
        return _shallow(schema)
    try:
        parsed = json.loads(schema)
    except RecursionError as error:
        raise ValueError(f"is nested more than {DEEPEST} deep") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"is text, but not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise ValueError("should be a JSON object")
    return _shallow(parsed)


Object = Annotated[dict[str, Any], AfterValidator(_shallow)]
Schema = Annotated[dict[str, Any] | Text, AfterValidator(_schema)]
Source = Annotated[Text, Field(max_length=LONGEST)]
Choices = Annotated[
    list[Annotated[Text, Field(min_length=1)]], Field(min_length=1, max_length=1024)
]


class JsonSchema(Strict):
    """The schema of an answer. `strict` changes nothing: the answer follows it in any case."""

    ignored: ClassVar = {"description": "the schema alone is followed"}

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")] = "schema"
    schema_: Annotated[Object | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Strict):
    """OpenAI's: text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("should have json_schema with that type, and with no other")
        return self

    @property
    def grammar(self) -> Grammar | None:
        if self.type == "text":
            return None
        schema = self.json_schema.schema_ if self.json_schema is not None else None
        return _of_schema({"type": "object"} if schema is None else schema, "response_format")


class StructuredOutputs(Strict):
    """vLLM's: one of its fields says what the answer must be."""

    neutral: ClassVar = {
        "disable_any_whitespace": (False,),
        "disable_additional_properties": (False,),
    }

    choice: Choices | None = None
    grammar_: Annotated[Source | None, Field(alias="grammar")] = None
    json_: Annotated[Schema | None, Field(alias="json")] = None
    json_object: bool | None = None
    regex: Source | None = None

    @model_validator(mode="after")
    def _is_one(self) -> StructuredOutputs:
        values = (self.choice, self.grammar_, self.json_, self.json_object or None, self.regex)
        if sum(value is not None for value in values) != 1:
            raise ValueError("should have one of choice, grammar, json, json_object and regex")
        return self

    @property
    def grammar(self) -> Grammar:
        name = "structured_outputs"
        if self.choice is not None:
            return Grammar("grammar", choice_of(self.choice), name)
        if self.grammar_ is not None:
            return Grammar("grammar", self.grammar_, name)
        if self.regex is not None:
            return Grammar("regex", self.regex, name)
        return _of_schema({"type": "object"} if self.json_ is None else self.json_, name)


def grammar_of(asked: Mapping[str, Any]) -> Grammar | None:
    """Return the grammar that those of FORMATS which a request has ask for together.

    Raises RequestError for more than one.
    """
    grammars = {name: _grammar(name, value) for name, value in asked.items()}
    needed = {name: grammar for name, grammar in grammars.items() if grammar is not None}
    if len(needed) > 1:
        names = " and ".join(needed)
        raise RequestError(f"{names} cannot be followed together.", param=next(iter(needed)))
    return next(iter(needed.values()), None)


def _grammar(name: str, value: Any) -> Grammar | None:
    if isinstance(value, ResponseFormat | StructuredOutputs):
        return value.grammar
    match name:
        case "guided_choice":
            return Grammar("grammar", choice_of(value), name)
        case "guided_grammar":
            return Grammar("grammar", value, name)
        case "guided_regex":
            return Grammar("regex", value, name)
        case _:
            return _of_schema(value, name)


def _of_schema(schema: Any, asked_by: str) -> Grammar:
    return Grammar("json_schema", json.dumps(schema), asked_by)
