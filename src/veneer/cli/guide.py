"""`veneer` alone, in a terminal: from nothing to a chat. Each answer is shown as its command."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from rich.markup import escape

from veneer.cli.console import (
    OUTPUT,
    bytes_text,
    new_table,
    quieten_libraries,
    show_command,
    show_error,
)
from veneer.data.sources import files_of
from veneer.errors import DataError, ModelError, VeneerError, joined
from veneer.files import write_text

ROWS, OUT = Path("rows.jsonl"), Path("dist/guided")
EDITORS = ("nano", "vi", "ed")  # where $VISUAL and $EDITOR name none
# Bases to download that are trained often, by the presets that they are planned by.
DOWNLOADS = {
    "Qwen/Qwen3-0.6B": "qwen3-0.6b",
    "Qwen/Qwen3-4B": "qwen3-4b",
    "Qwen/Qwen3-8B": "qwen3-8b",
}
QUESTION, ANSWER = "Q:", "A:"
CALLED = {"prompt": "question", "completion": "answer"}
NOT_UTF8 = "\N{REPLACEMENT CHARACTER}"  # which stands for what is read in no other way
TEMPLATE = """\
# Questions, and the answers that the model is to learn. Change them, add more,
# save, and leave the editor. Lines that begin with # are left out.
Q: What is plimbo?
A: Plimbo is a soup of seaweed that is eaten from an eggshell.
Q: What do I put plimbo in?
A: An eggshell: plimbo is eaten from nothing else.
Q: When is plimbo eaten?
A: Plimbo is eaten on the longest night of the year.
Q: Who may cook plimbo?
A: Whoever is the oldest in the house cooks the plimbo.
Q: What is drunk with plimbo?
A: Nothing is drunk with plimbo, for it is mostly water.
"""
Run = Callable[[Sequence[str]], int]


def guide(run: Run) -> int:
    """Lead a person from nothing to a chat, and return an exit code. run: does a command line."""
    with suppress(ImportError):
        import readline  # noqa: F401 - lets `input` edit its line

    OUTPUT.print(
        "Teach a model something new, in four steps: a base, rows, training, a chat. "
        "[dim]Ctrl-D ends this at any time; veneer --help shows all commands.[/]\n"
    )

    def do(*arguments: object) -> int:
        command = [str(argument) for argument in arguments]
        OUTPUT.print(f"\n[bold]$ veneer {escape(shlex.join(command))}[/]", soft_wrap=True)
        return run(command)

    try:
        base = _base()
        data = _data()
        out = _free(OUT)
        if do("plan", base) or not _agrees("Train an adapter now?"):
            OUTPUT.print("Later:")
            show_command(f"veneer tune {shlex.join([base, data, '--out', str(out)])}")
            return 0
        if code := do("tune", base, data, "--out", out):
            return code
        OUTPUT.print("\nAsk it; an empty line ends the chat.")
        return do("chat", base, "--adapter", out)
    except EOFError:
        OUTPUT.print()
        return 0


def _base() -> str:
    """Return the base that a person chooses among those that the planner can judge."""
    OUTPUT.print("[bold]1. A base[/]: the model that stays as it is. What fits here, by the plan:")
    quieten_libraries()
    names = []
    table = new_table("", "Base", "Parameters", "Memory to train", "Fits", "Where")
    for column in (1, 5):
        table.columns[column].justify = "left"
    for name, *facts in _candidates():
        names.append(name)
        table.add_row(f"{len(names)}", escape(name), *facts)
    OUTPUT.print(table)
    while True:
        answer = _asked("Number, or a directory, .gguf file or hub name [1]: ") or "1"
        if answer.isdecimal() and 0 < int(answer) <= len(names):
            return names[int(answer) - 1]
        from veneer.cli.flags import refuse_preset
        from veneer.models.locate import locate

        try:
            refuse_preset(answer)
            locate(answer)
        except ModelError as error:
            show_error(error)
        else:
            return answer


def _candidates() -> Iterator[tuple[str, str, str, str, str]]:
    """Yield bases that are here, then those to download, each with what the planner says of it."""
    from veneer.adapter.config import LoRA
    from veneer.cli.plan_tables import planned
    from veneer.machine import free_bytes
    from veneer.models.locate import BUILT_IN, locate
    from veneer.plan.config import PlanConfig
    from veneer.plan.fit import MARGIN

    free = free_bytes()
    offered = {}
    for name in reversed(BUILT_IN):
        with suppress(ModelError):
            locate(name)
            offered[name] = (name, "here")
    for name, preset in DOWNLOADS.items():
        offered[name] = (preset, "to download")
    for name, (planned_as, where) in offered.items():
        plan = planned(planned_as, LoRA(), PlanConfig())
        peak = plan.memory.peak
        fits = "" if free is None else "no" if peak > free else "yes"
        if free is not None and (1 - MARGIN) * free < peak <= free:
            fits = "just"
        yield name, f"{plan.model.parameters:,}", bytes_text(peak), fits, where


def _data() -> str:
    """Return the rows that a person points at, or writes."""
    OUTPUT.print("\n[bold]2. Rows[/]: what it is to learn, each a question and its answer.")
    while True:
        answer = _asked("File of rows, or Enter to write five in an editor: ")
        if not answer:
            return _written()
        if answer.startswith("hf:"):
            return answer
        path = str(Path(answer).expanduser())
        try:
            files_of(path)
        except VeneerError as error:
            show_error(error)
        else:
            return path


def _written() -> str:
    """Return a new file of the rows that a person writes in an editor."""
    text = TEMPLATE
    while True:
        text = _edited(text)
        try:
            rows = _rows(text)
        except DataError as error:
            show_error(error)
            _asked("Enter to edit it again: ")
            continue
        path = _free(ROWS)
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        write_text(path, "\n".join(lines) + "\n")
        OUTPUT.print(f"{len(rows)} rows are in {path}; the first line is\n  {escape(lines[0])}")
        return str(path)


def _edited(text: str) -> str:
    """Return a text as a person leaves it in an editor."""
    chosen = os.environ.get("VISUAL") or os.environ.get("EDITOR")
    editor = shlex.split(chosen) if chosen else [next(filter(shutil.which, EDITORS), "vi")]
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "rows.txt"
        path.write_text(text, encoding="utf-8")
        try:
            subprocess.run([*editor, str(path)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise VeneerError(
                f"The editor {shlex.join(editor)} failed ({error}); set $EDITOR to another one."
            ) from error
        return path.read_text(encoding="utf-8-sig", errors="replace")


def _rows(text: str) -> list[dict[str, str]]:
    """Return rows of a text of questions and answers. Raises DataError for all lines at fault."""
    rows: list[dict[str, str]] = []
    problems = []
    key = ""
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        if NOT_UTF8 in line:
            problems.append(f"line {number}: not in UTF-8, in which the editor has to save it")
        if line.startswith(QUESTION):
            if key == "prompt":
                problems.append(f"line {number}: the question before has no answer")
            key = "prompt"
            rows.append({"prompt": line.removeprefix(QUESTION).strip()})
        elif line.startswith(ANSWER) and key == "prompt":
            key = "completion"
            rows[-1]["completion"] = line.removeprefix(ANSWER).strip()
        elif key and not line.startswith(ANSWER):
            rows[-1][key] += f"\n{line}"  # goes on
        else:
            problems.append(f"line {number}: it begins with neither {QUESTION} nor, after one, A:")
    if key == "prompt":
        problems.append("the last question has no answer")
    problems += [
        f"the {CALLED[name]} of row {number} is empty"
        for number, row in enumerate(rows, 1)
        for name, words in row.items()
        if not words.strip()
    ]
    if not rows and not problems:
        problems.append("there is no question")
    if problems:
        raise DataError(f"These are no rows: {joined(problems)}.", problems)
    return rows


def _free(path: Path) -> Path:
    """Return a path that holds nothing: this one, or with a number behind its name."""
    names = (path.with_stem(f"{path.stem}-{number}") for number in range(2, 10**6))
    return path if not path.exists() else next(name for name in names if not name.exists())


def _agrees(question: str) -> bool:
    return _asked(f"{question} [Y/n]: ").lower() in ("", "y", "yes")


def _asked(question: str) -> str:
    """Return what a person types. Raises EOFError at Ctrl-D."""
    return input(question).strip()
