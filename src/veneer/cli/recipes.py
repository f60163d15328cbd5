"""recipe.yaml as a source of flags: a setting in it holds unless a flag overrides it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from cyclopts import App, Argument, ArgumentCollection
from cyclopts.config import Dict
from cyclopts.token import Token

from veneer.cli.file_settings import SEARCHED, SHORT, as_flags
from veneer.errors import ConfigError, listed, nearest


def from_recipe(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Fill in the settings of the recipe that --config names, and read the jobs of --jobs; cyclopts
    calls this before parsing.

    Raises ConfigError, with the problems of all groups of settings at once.
    """
    flags = {name: argument for argument in arguments for name in argument.names}
    _spell_out_method(flags)
    if tokens := flags["--config"].tokens:
        path = Path(tokens[-1].value)
        names = {name.removeprefix("--") for name in flags}
        settings = _read(path, names - {"config"})
        Dict(settings, source=str(path), use_commands_as_keys=False)(app, commands, arguments)
    _take_autos(flags)
    jobs = flags["--jobs"]
    if jobs.tokens:
        from veneer.cli.jobs_file import arguments_of_jobs

        path = Path(jobs.tokens[-1].value)
        of_jobs = arguments_of_jobs(path, app, commands, arguments)
        jobs.tokens = [jobs.tokens[-1].evolve(value="", implicit_value=of_jobs)]
    problems = []
    for argument in arguments:
        try:
            argument.convert()
        except ConfigError as error:
            problems.append(str(error))
        except Exception:  # cyclopts raises it again, and names the flag
            continue
    if problems:
        raise ConfigError("\n".join(problems))


def trials_from_recipe(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Fill in the settings of the recipe that --config names, for trials of that run, all but where
    it went; cyclopts calls this before parsing.

    Raises ConfigError where the recipe has what trials cannot have.
    """
    from veneer.training.recipe import Recipe

    flags = {name: argument for argument in arguments for name in argument.names}
    if not (tokens := flags["--config"].tokens):
        return
    path = Path(tokens[-1].value)
    usual = as_flags(Recipe("base", "rows").settings())
    own = {name.removeprefix("--").replace("-", "_") for name in flags} - {"config", "out"}
    read = _read(path, own | {*usual})
    settings = {key.replace("-", "_"): value for key, value in read.items()}
    others = [key for key in settings.keys() - own - {"out"} if settings[key] != usual[key]]
    if others:
        raise ConfigError(f"Trials cannot have what {path} says of {listed(sorted(others))}.")
    taken = {key: value for key, value in settings.items() if key in own}
    Dict(taken, source=str(path), use_commands_as_keys=False)(app, commands, arguments)


def _take_autos(flags: dict[str, Argument]) -> None:
    """Leave settings that are "auto" to the search before the run."""
    autos = [
        name
        for name in SEARCHED
        if (tokens := flags[f"--{name}"].tokens) and tokens[-1].value == "auto"
    ]
    for name in autos:
        flags[f"--{name}"].tokens = []
    if autos:
        value = Token(keyword="--search-first", source="cli", implicit_value=tuple(autos))
        flags["--search-first"].tokens = [value]


def _spell_out_method(flags: dict[str, Argument]) -> None:
    """Replace a short name of LoRA on the command line by the flags that it is short for."""
    method = flags["--method"]
    if not method.tokens or method.tokens[-1].value not in SHORT:
        return
    short = method.tokens[-1].value
    method.tokens[-1] = method.tokens[-1].evolve(value="lora")
    for key, value in SHORT[short].items():
        if any(token.implicit_value is False for token in flags[f"--{key}"].tokens):
            raise ConfigError(f"--method {short} and --no-{key} exclude each other.")
        if not flags[f"--{key}"].tokens:  # --bits 8 stays
            flags[f"--{key}"].append(Token(keyword=f"--{key}", value=str(value), source="cli"))


def _read(path: Path, names: set[str]) -> dict[str, Any]:
    """Return a recipe's settings, each as its flag would take it."""
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"There is no recipe {path}.") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"The recipe {path} cannot be read as YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"The recipe {path} must hold settings, one a line, as in rank: 8.")
    flags = {name.replace("-", "_") for name in names}
    unknown = [key for key in map(str, settings) if key.replace("-", "_") not in flags]
    if unknown:
        from veneer.cli.other_names import our_name

        problems = "; ".join(
            our_name(key, flags) or f"{key!r} is unknown{nearest(key, flags)}" for key in unknown
        )
        raise ConfigError(f"The recipe {path} cannot be followed: {problems}.")
    short = settings.get("method")
    if isinstance(short, str) and short in SHORT:
        meant = {key: settings.get(key) or value for key, value in SHORT[short].items()}
        settings |= {"method": "lora"} | meant
    return as_flags(settings)
