"""Functions that a model may call: what requests say of them, and the grammar of an answer that
must call one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field
from transformers import PreTrainedTokenizerBase

from veneer.serve.api.calls import ID, MOST_CALLS, CallForm
from veneer.serve.api.formats import Object
from veneer.serve.api.strict import Strict, Text
from veneer.serve.engine.grammar import WHITE_SPACE
from veneer.serve.engine.request import Grammar

MOST_TOOLS = 128
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class Function(Strict):
    """A function that may be called. Where an answer must be a call, it follows the parameters."""

    ignored: ClassVar = {"strict": "only a call that is asked for follows the parameters"}

    name: Name
    description: Text | None = None
    parameters: Object | None = None


class Tool(Strict):
    """One of the tools; functions are the only kind that is served."""

    type: Literal["function"]
    function: Function

    @property
    def for_template(self) -> dict[str, Any]:
        """Return the tool as chat templates take it."""
        function = self.function
        return {
            "type": "function",
            "function": {
                "name": function.name,
                "description": function.description or "",
                "parameters": function.parameters or {"type": "object", "properties": {}},
            },
        }


class NamedFunction(Strict):
    name: Name


class NamedTool(Strict):
    """The tool that an answer must call."""

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


def _arguments(text: str) -> str:
    """Refuse what is no JSON object."""
    try:
        is_object = isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        is_object = False
    if not is_object:
        raise ValueError("should be a JSON object, as text")
    return text


class CalledFunction(Strict):
    name: Name
    arguments: Annotated[Text, AfterValidator(_arguments)]


class ToolCall(Strict):
    """A call in an earlier answer."""

    neutral: ClassVar = {"index": tuple(range(MOST_CALLS))}

    id: Text
    type: Literal["function"]
    function: CalledFunction

    @property
    def for_template(self) -> dict[str, Any]:
        """Return the call as chat templates take it, its arguments as an object."""
        arguments = json.loads(self.function.arguments)
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}


def grammar_of_calls(
    form: CallForm,
    tools: Sequence[Tool],
    tokenizer: PreTrainedTokenizerBase,
    *,
    several: bool,
) -> Grammar:
    """Return the grammar of an answer that calls some of `tools`, in a model's own form."""
    special = {
        token.content: number
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special
    }
    any_call = " | ".join(f"call_{n}" for n in range(len(tools)))
    more = ""
    if several and form.between is not None:
        more = f" ({_literal(form.between, special)} call){{0,{MOST_CALLS - 1}}}"
    lines = [
        f"start: {_literal(form.before, special)} call{more} {_literal(form.after, special)}",
        f"call: {any_call}",
    ]
    for n, tool in enumerate(tools):
        middle = _literal(form.middle, special)
        lines.append(f'call_{n}: "{tool.function.name}" {middle} arguments_{n}')
        lines.append(f"arguments_{n}: %json {json.dumps(_parameters(tool))}")
    return Grammar("grammar", "\n".join(lines), "tools")


def _parameters(tool: Tool) -> Mapping[str, Any]:
    options = {"whitespace_pattern": WHITE_SPACE}
    return {"x-guidance": options, "type": "object", **(tool.function.parameters or {})}


def _literal(text: str, special: Mapping[str, int]) -> str:
    """Return a text in Lark's form: special tokens by their ids, and for a call's id any."""
    marks = "|".join(map(re.escape, sorted([ID, *special], key=len, reverse=True)))
    pieces = re.split(f"({marks})", text)
    return (
        " ".join(
            "/[a-zA-Z0-9]{9}/"
            if piece == ID
            else f"<[{special[piece]}]>"
            if piece in special
            else json.dumps(piece)
            for piece in pieces
            if piece
        )
        or '""'
    )
