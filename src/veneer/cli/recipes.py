"""recipe.yaml as a source of flags: what it says counts unless a flag says otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cyclopts import App, ArgumentCollection
from cyclopts.config import Yaml

from veneer.errors import ConfigError


def from_recipe(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Fill in what --config names, in cyclopts's protocol for sources of configuration."""
    (argument,) = [argument for argument in arguments if "--config" in argument.names]
    if not argument.tokens:
        return
    path = Path(argument.tokens[-1].value)
    if not path.is_file():
        raise ConfigError(f"There is no recipe {path}.")
    source: Any = Yaml(path, use_commands_as_keys=False, must_exist=True)
    source(app, commands, arguments)
