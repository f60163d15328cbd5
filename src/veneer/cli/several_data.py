"""Several `--data` on one command line, as the one value that the flag takes."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

FLAG = "--data"


def joined_data(arguments: Sequence[str]) -> list[str]:
    """Return the arguments, where several are `--data` with these joined into one, a JSON list.

    They stay as they are where a value is missing, which is then said where they are parsed.
    """
    values, others = [], []
    waiting = iter(arguments)
    for argument in waiting:
        flag, equals, value = argument.partition("=")
        if flag == FLAG:
            value = value if equals else next(waiting, "--")
            if value.startswith("--"):
                return list(arguments)
            values.append(value)
        else:
            others.append(argument)
    return [*others, FLAG, json.dumps(values)] if len(values) > 1 else list(arguments)


def data_flags(arguments: Sequence[str], unused: Collection[str]) -> str | None:
    """Return how to write several data for `tune`, None unless all that is unused are paths."""
    if "tune" not in arguments[:1] or not all(Path(path).exists() for path in unused):
        return None
    return (
        f"Nothing reads {', '.join(unused)}. Several data are {FLAG} a.jsonl {FLAG} b.jsonl, or a "
        "pattern in quotes: 'rows/*.jsonl'"
    )


def data_of(value: str) -> Path | tuple[str, ...]:
    """Return what the flag's value names: one path, or those of a JSON list."""
    if value.startswith("["):
        with suppress(ValueError):  # a name that begins so
            return tuple(map(str, json.loads(value)))
    return Path(value)
