"""Rewards of 0 or 1 that need no function of a user's: exact match, patterns, JSON by a schema."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import regex

from veneer.errors import ConfigError, shortened
from veneer.rewards.judged import Answered, RewardFault

GROUP = "answer"  # of a pattern: what has to be one of the references


@dataclass(frozen=True)
class Exact:
    """1 where an answer is one of its row's references, but for white space around it."""

    name: str = "exact"

    def __call__(self, answer: Answered) -> float:
        return float(answer.text.strip() in {text.strip() for text in answer.references})

    def close(self) -> None:
        """There is nothing to end."""


@dataclass(frozen=True)
class Matches:
    """1 where a pattern is in an answer. What its group called `answer` matches, if it has one,
    must be one of the references. Raises ConfigError for what is no pattern."""

    pattern: str
    seconds: float = 1.0
    name: str = "regex"
    _compiled: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "_compiled", regex.compile(self.pattern))
        except (regex.error, RecursionError, OverflowError) as error:  # (((((...
            pattern = repr(shortened(self.pattern))
            raise ConfigError(f"{pattern} is no regular expression: {error}.") from error

    def __call__(self, answer: Answered) -> float:
        try:
            match = self._compiled.search(answer.text, timeout=self.seconds)
        except TimeoutError as error:
            raise RewardFault(
                "timed out", f"the pattern took more than {self.seconds:g} s."
            ) from error
        if match is None:
            return 0.0
        if GROUP not in self._compiled.groupindex:
            return 1.0
        text = match[GROUP]
        return float(text is not None and text.strip() in {t.strip() for t in answer.references})

    def close(self) -> None:
        """There is nothing to end."""


@dataclass(frozen=True)
class ValidJSON:
    """1 where an answer is JSON that a schema allows. Raises ConfigError for what is no schema, or
    where jsonschema-rs is not installed."""

    schema: Path
    name: str = "json"
    _validator: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            import jsonschema_rs
        except ImportError as error:
            raise ConfigError(
                "Judging JSON by a schema needs: pip install 'veneer[rewards]'"
            ) from error
        try:
            schema = json.loads(self.schema.read_text(encoding="utf-8"))
            validator = jsonschema_rs.validator_for(schema)
        except (OSError, ValueError, RecursionError, jsonschema_rs.ValidationError) as error:
            raise ConfigError(f"{self.schema} is no JSON schema: {error}.") from error
        object.__setattr__(self, "_validator", validator)

    def __call__(self, answer: Answered) -> float:
        try:
            value = json.loads(answer.text, parse_constant=_refuse)
            return float(self._validator.is_valid(value))
        except (ValueError, RecursionError):  # half a character, as in "\ud800", among them
            return 0.0

    def close(self) -> None:
        """There is nothing to end."""


def _refuse(constant: str) -> None:
    """Raise ValueError for NaN and Infinity, which Python reads and JSON does not have."""
    raise ValueError(f"{constant} is no JSON.")
