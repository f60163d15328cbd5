"""Pages of the reference that are made of the package: public names, events, metrics."""

from __future__ import annotations

import ast
from pathlib import Path

import commands

import veneer
from veneer.training.metric_names import BY_KIND

EVENTS = Path(veneer.__file__).parent / "training" / "events.py"


def pages() -> dict[str, str]:
    """Return each page of the reference that is made of the code, by its path below docs/."""
    made = {f"reference/commands/{name}.md": commands.page(name) for name in commands.NAMES}
    made["reference/commands/index.md"] = commands.overview()
    made["reference/python.md"] = python_page()
    made["reference/events.md"] = events_page()
    made["reference/metrics.md"] = metrics_page()
    return made


def navigation() -> list[dict[str, str]]:
    """Return the entries of all commands, for the site's navigation."""
    index = {"All commands": "reference/commands/index.md"}
    return [index, *({name: f"reference/commands/{name}.md"} for name in sorted(commands.NAMES))]


def python_page() -> str:
    """Return the page of all public names: functions, values, errors."""
    kinds = {"Functions": [], "Settings and values": [], "Errors": []}
    for name in veneer.__all__:
        if name[0].islower():
            kinds["Functions"].append(name)
        else:
            is_error = name.endswith(("Error", "Warning"))
            kinds["Errors" if is_error else "Settings and values"].append(name)
    lines = [
        "# Python",
        "",
        "Each name is imported when it is first asked for: `import veneer`",
        "",
    ]
    lines[2] += " alone loads no torch."
    for heading, names in kinds.items():
        lines += [f"## {heading}", ""]
        for name in names:
            home = f"veneer.{veneer._HOMES[name]}.{name}"
            lines += [f"::: {home}", "    options:", f"      heading: veneer.{name}"]
            lines += [f"      toc_label: {name}", ""]
    return "\n".join(lines)


def events_page() -> str:
    """Return the page of all events, each with its fields."""
    names = [
        node.name
        for node in ast.parse(EVENTS.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name != "Event"
    ]
    lines = [
        "# Events",
        "",
        "`veneer.train` and `veneer.tune` yield what happens, as values of these classes in",
        "`veneer.training.events`. What is written of them: [metrics](metrics.md).",
        "",
    ]
    for name in names:
        lines += [f"::: veneer.training.events.{name}", "    options:", f"      heading: {name}"]
        lines += ["      heading_level: 2", ""]
    return "\n".join(lines)


def metrics_page() -> str:
    """Return the page of all numbers in metrics.jsonl."""
    lines = [
        "# Metrics",
        "",
        "`metrics.jsonl` in a run's directory has a line of JSON for each step and evaluation.",
        "Names of what an objective measures in an evaluation begin with `eval_`.",
        "",
    ]
    for kind, meanings in BY_KIND.items():
        lines += [f"## {kind}", "", "| name | what it is |", "|---|---|"]
        lines += [f"| `{name}` | {commands.words(text)} |" for name, text in meanings.items()]
        lines.append("")
    return "\n".join(lines)
