"""JSON objects in which nothing is dropped in silence: the ground of every request's body."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator

log = logging.getLogger("veneer.serve")

# Tools, with the parameter that is "none" where the model must not call them.
NOT_TO_CALL = {"tools": "tool_choice", "functions": "function_call"}


@cache
def _note(name: str, why: str) -> None:
    """Write into the log, once, that a parameter is ignored."""
    log.info("The parameter %s is ignored: %s.", name, why)


def _whole(text: str) -> str:
    """Refuse half a character, which JSON can say and no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("has half a character (a lone surrogate)") from error
    return text


Text = Annotated[str, AfterValidator(_whole)]


class Strict(BaseModel):
    """A JSON object: every value has the type it should have, and no name is unknown.

    neutral: names that are accepted with some values. ignored: names that always are, and why.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    ignored: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_what_changes_nothing(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        unused = {
            name: f'{choice} is "none"'
            for name, choice in NOT_TO_CALL.items()
            if name in cls.neutral and body.get(choice) == "none"
        }
        ignored = {**cls.ignored, **unused}
        kept = {}
        for name, value in body.items():
            if name in ignored:
                if value:  # false, null and nothing ask for nothing
                    _note(name, ignored[name])
            elif name not in cls.neutral or not (value is None or value in cls.neutral[name]):
                kept[name] = value
        return kept
