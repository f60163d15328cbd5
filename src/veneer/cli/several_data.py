"""Several `--data` on one command line, as the one value that the flag takes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

FLAG = "--data"


def joined_data(arguments: Sequence[str]) -> list[str]:
    """Return the arguments, where several are `--data` with these joined into one, a JSON list."""
    values, others = [], []
    waiting = iter(arguments)
    for argument in waiting:
        flag, equals, value = argument.partition("=")
        if flag == FLAG:
            values.append(value if equals else next(waiting, ""))
        else:
            others.append(argument)
    return [*others, FLAG, json.dumps(values)] if len(values) > 1 else list(arguments)


def data_of(value: str) -> Path | tuple[str, ...]:
    """Return what the flag's value names: one path, or those of a JSON list."""
    if value.startswith("["):
        with suppress(ValueError):  # a name that begins so
            return tuple(map(str, json.loads(value)))
    return Path(value)
