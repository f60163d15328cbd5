"""Fractions where a flag takes whole numbers, which cyclopts would round without a word."""

from __future__ import annotations

from typing import get_args

from cyclopts import App, Argument, ArgumentCollection
from cyclopts.token import Token

from veneer.errors import ConfigError, joined


def whole_numbers(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Raise ConfigError for all fractions that a command is given as whole numbers; cyclopts calls
    this before parsing."""
    wrong = [fraction(a, token) for a in arguments for token in a.tokens]
    if problems := [text for text in wrong if text]:
        raise ConfigError(f"This cannot be: {joined(problems)}.")


def fraction(argument: Argument, token: Token) -> str:
    """Return what is wrong with a value that is a fraction and has to be a whole number, or
    nothing."""
    kinds = (argument.hint, *get_args(argument.hint))
    if int not in kinds or float in kinds or str in kinds:
        return ""
    try:
        is_whole = float(token.value).is_integer()
    except ValueError:  # which parsing refuses, or takes, as in 0x10
        return ""
    name = argument.name.removeprefix("--").replace("-", "_")
    return "" if is_whole else f"{name} is {token.value}, but must be a whole number"
