"""Rules for the fields of a config, and the one way to check a config by them."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, get_args

from veneer.errors import ConfigError, joined


def _plain(value: Any) -> Any:
    """Return numpy's numbers as Python's own, which every file format takes."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if _is_number(value):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    return value


def _is_number(value: Any, kind: type[Any] = numbers.Real) -> bool:
    # A bool is an int, and a NaN is a float; neither is meant anywhere.
    return isinstance(value, kind) and not isinstance(value, bool) and abs(value) < math.inf


class Rule(NamedTuple):
    """What a value must be: a test that takes a value of any kind, the text for a message, and what
    a config keeps of a value that holds."""

    holds: Callable[[Any], bool]
    text: str  # what follows "must be"
    kept: Callable[[Any], Any] = _plain


def at_least(least: float, *, below: float = math.inf) -> Rule:
    """A finite number from `least` on, and below `below`."""
    end = "" if below == math.inf else f" and below {below}"
    return Rule(
        lambda value: _is_number(value) and least <= value < below, f"at least {least}{end}"
    )


def whole_number(least: int, *, most: float = math.inf) -> Rule:
    """A whole number from `least` to `most`, numpy's too; 1.0 is not one."""
    end = "" if most == math.inf else f" and at most {most}"
    return Rule(
        lambda value: _is_number(value, numbers.Integral) and least <= value <= most,
        f"a whole number of at least {least}{end}",
    )


def one_of(literal: Any) -> Rule:
    """One of the values of a typing.Literal."""
    values = get_args(literal)
    return Rule(lambda value: value in values, f"one of {', '.join(map(str, values))}")


def of_class(kind: type[Any]) -> Rule:
    """A value of a class."""
    return Rule(lambda value: isinstance(value, kind), f"of the class {kind.__name__}")


def each(rule: Rule) -> Rule:
    """Several values that all keep to a rule."""
    return Rule(lambda values: all(map(rule.holds, values)), f"{rule.text}, each")


NUMBER = Rule(lambda value: _is_number(value), "a number")
ABOVE_0 = Rule(lambda value: _is_number(value) and value > 0, "a number above 0")
FRACTION = Rule(lambda value: _is_number(value) and 0 < value <= 1, "above 0 and at most 1")
BETWEEN_0_AND_1 = Rule(lambda value: _is_number(value) and 0 < value < 1, "above 0 and below 1")
BOOLEAN = Rule(lambda value: isinstance(value, bool), "true or false")
TEXT = Rule(lambda value: isinstance(value, str), "a text")
PATH = Rule(lambda value: isinstance(value, str | os.PathLike), "a path", Path)


def check_config(
    config: Any,
    *,
    opening: str,
    rules: Mapping[str, Rule],
    contradictions: Mapping[str, bool] | None = None,
    problems: Sequence[str] = (),
) -> None:
    """Raise ConfigError, "`opening`: all problems.", if anything is wrong with a dataclass; else
    let it keep of each value what its rule says.

    rules: by the names of fields; a field whose default is None may be None. contradictions: a
    message for each impossible combination of fields, and whether `config` has it. problems: those
    that the caller has found.
    """
    optional = {field.name for field in fields(config) if field.default is None}
    values = {name: getattr(config, name) for name in rules}
    all_problems = [
        problem
        for name, value in values.items()
        if not (value is None and name in optional)
        for problem in broken(rules[name], {name: value})
    ]
    all_problems += [message for message, is_so in (contradictions or {}).items() if is_so]
    all_problems += problems
    if all_problems:
        raise ConfigError(f"{opening}: {joined(all_problems)}.")
    for name, value in values.items():
        if value is not None:
            object.__setattr__(config, name, rules[name].kept(value))


def broken(rule: Rule, values: Mapping[str, Any]) -> list[str]:
    """Return "NAME is VALUE, but must be ..." for each of the named values that breaks the rule."""
    return [
        f"{name} is {value!r}, but must be {rule.text}"
        for name, value in values.items()
        if not rule.holds(value)
    ]
