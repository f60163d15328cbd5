"""Pages of the reference that say what every command and flag does, made from the parser itself."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from types import NoneType
from typing import Any, get_args

from cyclopts import App

from veneer.cli.app import app

NAMES = [name for name in app if not name.startswith("-")]


FLAG = re.compile(r"(?<![\w`-])--[a-z][\w-]*")
CODE = re.compile(r"(`[^`]*`)")


def words(text: object) -> str:
    """Return a text as one line that a cell of a table can hold, with the flags in it as code."""
    pieces = CODE.split(" ".join(str(text).split()))
    for at in range(0, len(pieces), 2):  # code is what stands between
        plain = pieces[at].replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")
        pieces[at] = FLAG.sub(r"`\g<0>`", plain)
    return "".join(pieces)


def summary(command: App) -> str:
    return words(command.help)


def overview() -> str:
    """Return the page that lists all commands below the headings of `veneer --help`."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in NAMES:
        line = f"| [`veneer {name}`]({name}.md) | {summary(app[name])} |"
        groups[app[name].group[0].name].append(line)
    lines = ["# Commands", "", "`veneer COMMAND --help` prints the same in a terminal.", ""]
    for heading in sorted(groups, key=list(groups).index):
        lines += [f"## {heading}", "", "| command | what it does |", "|---|---|"]
        lines += [*groups[heading], ""]
    return "\n".join(lines)


def page(name: str) -> str:
    """Return the page of one command: its usage, and its flags by their headings."""
    command = app[name]
    arguments = [
        argument
        for argument in command.assemble_argument_collection(parse_docstring=True)
        if argument.show and argument.parse
    ]
    positional = [x for x in arguments if x.field_info.is_positional]
    usage = " ".join(
        label(x) if x.required else f"[{label(x)}]" for x in positional if x.names[0] != "--"
    )
    also = ", ".join(f"`{other}`" for other in command.name[1:])
    lines = [f"# veneer {name}", "", summary(command), ""]
    lines += [f"    veneer {name} {usage} [FLAGS]".rstrip(), ""]
    if also:
        lines += [f"Also called {also}.", ""]
    groups: dict[str, list[Any]] = defaultdict(list)
    for argument in arguments:
        groups[argument.parameter.group[0].name].append(argument)
    for heading in sorted(groups, key=lambda heading: heading != "Parameters"):
        lines += [f"## {heading}", ""]
        lines += [line for argument in groups[heading] for line in entry(argument)]
    return "\n".join(lines)


def label(argument: Any) -> str:
    return argument.name.lstrip("-").replace("-", "_").upper()


def entry(argument: Any) -> list[str]:
    """Return a flag's lines: its names, the values that it takes, its default, its help."""
    name, *others = argument.names
    if argument.field_info.is_positional:
        name = label(argument)
    default = default_text(argument.field_info.default)
    facts = [
        values(argument),
        "or " + ", ".join(f"`{other}`" for other in others) if others else "",
        "needed" if argument.required else f"default {default}" if default else "",
    ]
    shown = "; ".join(filter(None, facts))
    return [
        f"### `{name}` {{ #{argument.name.strip('-')} }}",
        "",
        *([f"*{shown}*", ""] if shown else []),
        words(argument.parameter.help or ""),
        "",
    ]


def default_text(default: object) -> str:
    if default is None or default is False or default in ((), {}, ""):
        return ""
    if isinstance(default, tuple | list):
        default = " ".join(map(str, default))
    return f"`{default}`"


def values(argument: Any) -> str:
    """Return what a flag takes: its choices, or the name of its kind of value."""
    if choices := argument.get_choices():
        return ", ".join(f"`{choice}`" for choice in choices)
    kinds = list(dict.fromkeys(kind_names(argument.hint)))
    return "" if kinds == ["switch"] else " or ".join(kinds)


def kind_names(hint: Any) -> Iterator[str]:
    """Yield, for a type and all that it is a union of, what a person calls such a value."""
    plain = {int: "a whole number", float: "a number", bool: "switch", str: "text"}
    if hint in plain:
        yield plain[hint]
    elif members := [member for member in get_args(hint) if member is not NoneType]:
        for member in members:
            yield from kind_names(member)
    elif isinstance(hint, type):
        yield "a path" if hint.__name__ == "Path" else words(hint.__name__)
    elif isinstance(hint, str | int):
        yield f"`{hint}`"
