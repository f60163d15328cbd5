"""The process in which a user's reward function runs: `python -m veneer.rewards.worker FUNCTION`.

It reads a line of JSON for each answer and writes one with its reward. What the function prints
goes to the standard error, and there is nothing for it to read.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

from veneer.errors import ConfigError, VeneerError, nearest

OFFERED = ("prompt", "completion", "messages", "references")


def load(spec: str) -> Callable[..., Any]:
    """Return the function that MODULE:FUNCTION or FILE.py:FUNCTION names. Raises ConfigError."""
    where, _, name = spec.rpartition(":")
    module = _module(where)
    function = getattr(module, name, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if callable(value)]
        raise ConfigError(f"{where} has no function {name!r}{nearest(name, names)}.")
    _check_parameters(spec, function)
    assert callable(function)
    return function


def _module(where: str) -> ModuleType:
    sys.path.insert(0, os.getcwd())  # noqa: PTH109 - as Python itself does for -c
    try:
        if not where.endswith(".py"):
            return importlib.import_module(where)
        sys.path.insert(0, str(Path(where).absolute().parent))
        spec = importlib.util.spec_from_file_location(Path(where).stem, where)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where dataclasses look for their module
        spec.loader.exec_module(module)
        return module
    except (Exception, SystemExit) as error:  # whatever a user's module raises
        raise ConfigError(f"{where} cannot be imported: {type(error).__name__}: {error}") from error


def _check_parameters(spec: str, function: Callable[..., Any]) -> None:
    """Raise ConfigError where a function needs an argument that nobody gives."""
    parameters = inspect.signature(function).parameters.values()
    unknown = [
        p.name
        for p in parameters
        if p.default is p.empty
        and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        and (p.name not in OFFERED or p.kind is p.POSITIONAL_ONLY)
    ]
    if unknown:
        raise ConfigError(
            f"{spec} needs {', '.join(unknown)}, but a reward function is given what it names of "
            f"{', '.join(OFFERED)}."
        )


def _arguments(function: Callable[..., Any], row: dict[str, Any]) -> dict[str, Any]:
    """Return what a function takes of a row."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return row
    return {name: value for name, value in row.items() if name in parameters}


def serve(spec: str, requests: TextIO, replies: TextIO) -> None:
    """Answer requests until there are no more."""

    def reply(**message: object) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    try:
        function = load(spec)
    except VeneerError as error:
        reply(unusable=str(error))
        return
    reply(ready=True)
    for line in requests:
        try:
            reply(reward=float(function(**_arguments(function, json.loads(line)))))
        except (Exception, SystemExit) as error:  # of the user's function
            reply(raised=f"{type(error).__name__}: {error}")


def main() -> None:
    requests = os.fdopen(os.dup(sys.stdin.fileno()), encoding="utf-8")
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, sys.stdin.fileno())
    os.close(nothing)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=True)  # what is printed before the process is ended
    serve(sys.argv[1], requests, replies)


if __name__ == "__main__":
    main()
