"""jobs.yaml: several runs over one base, a list of settings for each, by the names of tune's flags.

    jobs:
      - name: small
        data: rows.jsonl
        rank: 4
      - name: large
        data: rows.jsonl
        rank: 64

What is wrong is collected, each with its line and its job, and raised at once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unicodedata import normalize

import yaml
from cyclopts import App, Argument, ArgumentCollection, CycloptsError
from cyclopts.config import Dict
from cyclopts.token import Token
from cyclopts.utils import UNSET

from veneer.cli.file_settings import SEARCHED, SHORT, as_flags
from veneer.cli.whole_numbers import fraction
from veneer.errors import ConfigError, VeneerError, nearest

OF_A_JOB = ("data", "from")  # beside what its adapter, course, objective and rows are
GROUPS = ("method", "lora", "training", "objective", "rows")
# Settings of these groups that belong to passes, which the jobs share.
OF_PASSES = ("recompute", "replay_passes", "context_parallel")
NO_NAME = "a setting must have a name before its colon"
LONGEST_NAME = 255  # bytes, of most file systems


@dataclass(frozen=True)
class Setting:
    """A value, and its line in the file."""

    value: Any
    line: int


@dataclass(frozen=True)
class JobEntry:
    """A job as the file has it: its settings by their flags' names, with underscores."""

    name: str
    line: int
    settings: Mapping[str, Setting]


@dataclass
class Problems:
    """What is wrong with a file of jobs."""

    path: Path
    lines: list[tuple[int, str]] = field(default_factory=list)

    def add(self, line: int, job: str, text: str) -> None:
        """Note a problem on a line of the file, of a job that has a name or not."""
        of = f", job {job!r}" if job else ""
        self.lines.append((line, f"line {line}{of}: {text.removesuffix('.')}"))

    def end(self) -> None:
        """Raise ConfigError where there are problems."""
        if self.lines:
            each = "".join(f"\n  - {text}" for _, text in sorted(self.lines))
            raise ConfigError(f"The jobs in {self.path} cannot begin:{each}")


def arguments_of_jobs(
    path: Path, app: App, commands: tuple[str, ...], arguments: ArgumentCollection
) -> dict[str, dict[str, Any]]:
    """Return what tune would be called with for each job, by its name: what the command line says,
    and in its place what the job says.

    Raises ConfigError for everything that is wrong with the file and its settings.
    """
    problems = Problems(path)
    flags = {name.removeprefix("--").replace("-", "_") for a in arguments for name in a.names}
    groups = [a for a in arguments if not a.keys and a.field_info.name in GROUPS]
    own = {str(child.field_info.name) for group in groups for child in group.children}
    own |= {*OF_A_JOB}
    jobs: dict[str, dict[str, Any]] = {}
    directories: dict[str, str] = {}
    for entry in _entries(path, problems):
        _check_names(entry, own - {*OF_PASSES}, flags - {"*"}, problems)
        settings = {key: each for key, each in entry.settings.items() if key in own}
        if "data" not in settings and not any(
            a.tokens for a in arguments if a.field_info.name == "data"
        ):
            problems.add(entry.line, entry.name, "data is missing: the rows that it learns")
        values = _values(path, entry, settings, (app, commands, arguments), problems)
        if earlier := directories.get(_as_one_directory(entry.name)):
            but = "" if earlier == entry.name else f", {earlier!r}, to systems that fold cases"
            problems.add(entry.line, entry.name, f"an earlier job has that name too{but}")
        directories[_as_one_directory(entry.name)] = entry.name
        jobs[entry.name] = values
    if not problems.lines and not jobs:
        problems.add(1, "", "there are no jobs; list them under jobs:")
    problems.end()
    return jobs


def _entries(path: Path, problems: Problems) -> Iterator[JobEntry]:
    """Yield the jobs of a file, and note what is no job. Raises ConfigError for what is no YAML."""
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        top = loader.get_single_node()
    except FileNotFoundError as error:
        raise ConfigError(f"There is no file of jobs {path}.") from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"The jobs in {path} cannot be read as YAML: {error}") from error
    if not isinstance(top, yaml.MappingNode):
        problems.add(1, "", "the file must hold jobs: and a list of them")
        return
    for key, node in top.value:
        if not isinstance(key, yaml.ScalarNode):
            problems.add(_line(key), "", NO_NAME)
        elif key.value != "jobs":
            text = f"{key.value!r} is unknown{nearest(str(key.value), ['jobs'])}"
            problems.add(_line(key), "", f"{text}; what holds for all jobs is said by flags")
        elif not isinstance(node, yaml.SequenceNode):
            problems.add(_line(node), "", "jobs: must hold a list, in which each begins by - name:")
        else:
            for item in node.value:
                if (entry := _entry(loader, item, problems)) is not None:
                    yield entry


def _entry(loader: yaml.SafeLoader, node: yaml.Node, problems: Problems) -> JobEntry | None:
    if not isinstance(node, yaml.MappingNode):
        problems.add(_line(node), "", "a job must be settings, one a line, as in name: small")
        return None
    settings: dict[str, Setting] = {}
    repeated: list[tuple[int, str]] = []
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            problems.add(_line(key_node), "", NO_NAME)
            continue
        key = str(key_node.value).replace("-", "_")
        if key in settings:
            repeated.append((_line(key_node), key))
        try:
            value = loader.construct_object(value_node, deep=True)
        except (ValueError, yaml.YAMLError) as error:  # a date that is none, too
            problems.add(_line(value_node), "", f"{key} cannot be read: {error}")
            continue
        if key == "name" and isinstance(value_node, yaml.ScalarNode):
            value = value_node.value  # as it is written, not as 7 for 007
        settings[key] = Setting(value, _line(key_node))
    name = settings.pop("name", None)
    text = "" if name is None else str(name.value)
    for line, key in repeated:
        problems.add(line, text, f"{key} is given twice")
    if name is None:
        problems.add(_line(node), "", "the job has no name: that of its directory below --out")
        return None
    if isinstance(name.value, list | dict) or not _names_a_directory(text):
        what = f"{name.value!r} is no name of a directory; choose another name"
        problems.add(name.line, "", what)
        return None
    return JobEntry(text, _line(node), settings)


def _names_a_directory(text: str) -> bool:
    """Return whether a text names a directory below another, on all systems."""
    if not text.strip(". ") or not text.isprintable() or {*text} & {"/", "\\"}:
        return False
    return len(text.encode()) <= LONGEST_NAME


def _as_one_directory(name: str) -> str:
    """Return what is equal for names that are the same directory's to some systems."""
    return normalize("NFC", name).casefold()


def _check_names(entry: JobEntry, own: set[str], flags: set[str], problems: Problems) -> None:
    """Note settings that are unknown, and those that only the command line can have."""
    from veneer.cli.other_names import our_name

    for key, setting in entry.settings.items():
        if key in own:
            continue
        if key in flags and (positive := key.removeprefix("no_")) in own:
            text = f"{key} is a flag, and no setting; write {positive}: false"
        elif key in flags:
            flag = f"--{key.replace('_', '-')}"
            text = f"{key} is the same for all jobs; give {flag} on the command line"
        else:
            text = our_name(key, own) or f"{key!r} is unknown{nearest(key, own)}"
        problems.add(setting.line, entry.name, text)


def _values(
    path: Path,
    entry: JobEntry,
    settings: Mapping[str, Setting],
    command: tuple[App, tuple[str, ...], ArgumentCollection],
    problems: Problems,
) -> dict[str, Any]:
    """Return what tune is called with for a job, without what is not given anywhere."""
    app, commands, arguments = command
    values = {key: setting.value for key, setting in settings.items()}
    method = values.get("method")
    if isinstance(method, str) and method in SHORT:
        if "bits" in SHORT[method]:
            line, bits = settings["method"].line, SHORT[method]["bits"]
            text = f"{method} is LoRA over {bits} bits, and all jobs share the base"
            problems.add(line, entry.name, f"{text}; give --bits {bits} on the command line")
        values = {**values, "method": "lora"} | {
            key: value for key, value in SHORT[method].items() if key != "bits"
        }
    elif method is not None:  # and so not one that is short for others
        values = {"dora": None, **values}
    own = copy.deepcopy(arguments)
    names = {f"--{key.replace('_', '-')}" for key in values}
    for argument in own:
        if names & {*argument.names}:
            argument.tokens = []  # of the command line
        elif "--search-first" in argument.names:
            _leave_to_search(argument, values)
    source = str(path)
    flat = as_flags({key: value for key, value in values.items() if value is not None})
    for key, value in flat.items():
        try:
            Dict({key: value}, source=source, use_commands_as_keys=False)(app, commands, own)
        except CycloptsError as error:  # a list where there is to be one value
            problems.add(settings[key].line, entry.name, _text(error))
    called: dict[str, Any] = {}
    for argument in own:
        for token in argument.tokens:
            if token.source == source and (text := fraction(argument, token)):
                problems.add(_line_of(text, argument, settings, entry.line), entry.name, text)
        try:
            value = argument.convert()
        except VeneerError as error:
            text = _text(error)
            problems.add(_line_of(text, argument, settings, entry.line), entry.name, text)
            continue
        except CycloptsError as error:
            # Its child says it, or for the command line, where this is no job's, cyclopts itself.
            if not argument.children and any(t.source == source for t in argument.tokens):
                text = _text(error)
                problems.add(_line_of(text, argument, settings, entry.line), entry.name, text)
            continue
        if not argument.keys and value is not UNSET:
            called[str(argument.field_info.name)] = value
    return called


def _leave_to_search(argument: Argument, values: dict[str, Any]) -> None:
    """Take settings that are "auto" from a job's values, for the search before its run. argument:
    what is to be searched for, which has those of the command line."""
    of_all = argument.tokens[-1].implicit_value if argument.tokens else ()
    autos = [
        key
        for key in SEARCHED
        if values.get(key) == "auto" or (key in of_all and key not in values)
    ]
    for key in autos:
        values.pop(key, None)
    token = Token(keyword="--search-first", source="jobs", implicit_value=tuple(autos))
    argument.tokens = [token] if autos else []


def _text(error: VeneerError | CycloptsError) -> str:
    if isinstance(error, CycloptsError):
        error.verbose = False
    return " ".join(str(error).split())


def _line_of(text: str, argument: Argument, settings: Mapping[str, Setting], otherwise: int) -> int:
    """Return the line of the first setting that an error is of, or that it names."""
    for key, setting in settings.items():
        if f"--{key.replace('_', '-')}" in argument.names or f"{key} is " in text:
            return setting.line
    return otherwise


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
