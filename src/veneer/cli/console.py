"""The terminal: its two streams, and the lines and tables that look alike in every command."""

from __future__ import annotations

import json
import os
import re
import stat
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from veneer.errors import VeneerError, VeneerWarning
from veneer.files import check_writable, remove_leftovers, size_of


class Terminal(Console):
    """A console that ends the program where nobody reads it any more, unless work `goes_on`."""

    goes_on = False

    @property
    def animates(self) -> bool:
        """Whether what was printed can be drawn over: in no file, dumb terminal, or log of a CI,
        even one that asks for colours."""
        return self.is_interactive and self.file.isatty()

    def print(self, *objects: Any, soft_wrap: bool | None = None, **options: Any) -> None:
        """Print. A text is whole in a file, and in a terminal broken between words.

        soft_wrap: let the terminal break a text, which then copies it as one line: for commands.
        """
        if soft_wrap is None and all(isinstance(each, str) for each in objects):
            soft_wrap = True
            if self.file.isatty():
                objects = tuple(between_words(self.render_str(x), self.width) for x in objects)
        super().print(*objects, soft_wrap=soft_wrap, **options)

    def on_broken_pipe(self) -> None:
        """Take that a pipe is closed."""
        if not Terminal.goes_on:
            super().on_broken_pipe()
        silence(self)


def between_words(text: Text, width: int) -> Text:
    """Return a text in lines of at most `width` columns. A longer word, such as a path, is not
    broken: the terminal shows it in several lines and copies it as one."""
    lines = []
    for line in text.split(allow_blank=True):
        breaks, used = [], 0
        for word in re.finditer(r"\s*\S+\s*", line.plain):
            if used and used + cell_len(word.group().rstrip()) > width:
                breaks.append(word.start())
                used = 0
            used += cell_len(word.group())
        *broken, last = line.divide(breaks)
        for piece in broken:
            piece.rstrip()
        lines += [*broken, last]
    return Text("\n").join(lines)


OUTPUT = Terminal(highlight=False)
ERRORS = Terminal(stderr=True, highlight=False)
PAUSE = 60.0  # seconds between two lines of progress, where there is no terminal for a bar
WIDTH = 110  # columns of wide tables where there is no terminal: in fewer, numbers would break


class Pace:
    """Says when another line of progress is due: a minute after the last one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.last = clock()

    def due(self, *, anyway: bool = False) -> bool:
        """Return whether a line is due now, or to be printed `anyway`; it is taken for printed."""
        now = self.clock()
        if not anyway and now - self.last < PAUSE:
            return False
        self.last = now
        return True


def is_at_terminal() -> bool:
    """Return whether somebody types here, and reads what is printed."""
    return sys.stdin.isatty() and sys.stdout.isatty()


@contextmanager
def silenced() -> Iterator[None]:
    """Print what can be printed: where whoever read it is gone (`head`, or a terminal), nothing
    more, and no run ends by it."""
    try:
        yield
    except OSError:
        silence()


def silence(*consoles: Console) -> None:
    """Print nothing more there: whoever read it is gone, which is no reason for a run to end.

    consoles: all that print on a terminal unless given
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for console in consoles or (OUTPUT, ERRORS):
        handle = console.file.fileno()
        if consoles or stat.S_ISCHR(os.fstat(handle).st_mode):
            os.dup2(nowhere, handle)
    os.close(nowhere)


def show_error(error: Exception) -> None:
    """Print one error, in full, for a person: no traceback."""
    ERRORS.print(f"[bold red]Error:[/] {escape(str(error))}")


def show_notice(text: str, *, on: Console = ERRORS) -> None:
    """Print something that a person should know."""
    on.print(f"  [yellow]note[/] {escape(text)}")


def show_command(command: str, *, on: Console = OUTPUT) -> None:
    """Print a command to copy, on a line of its own."""
    on.print(f"  {escape(command)}", soft_wrap=True)


def show_doing(text: str) -> None:
    """Print what a command does now, before it takes its time."""
    ERRORS.print(f"{escape(text)} ...")


@contextmanager
def warnings_as_notices() -> Iterator[None]:
    """Show what Veneer warns of as a notice, each text once; other warnings as ever."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def show_warning(message: Warning | str, category: type[Warning], *where: Any) -> None:
            if issubclass(category, VeneerWarning):
                show_notice(str(message))
            else:
                show(message, category, *where)

        warnings.simplefilter("default", VeneerWarning)
        warnings.showwarning = show_warning  # type: ignore[assignment]
        yield


def show_saved(path: Path, *, what: str = "", facts: Sequence[str] = (), more: str = "") -> None:
    """Print where a result is, its size, and what else there is to know of it."""
    size = bytes_text(size_of(path))
    name = f"{what}: {escape(str(path))}" if what else escape(str(path))
    OUTPUT.print(f"[bold]Saved[/]   {name} ({', '.join([*facts, size])}{more})")


def questions() -> Iterator[str]:
    """Yield what a person types, until an empty line or the end of the input."""
    while True:
        try:
            question = OUTPUT.input("[bold]You:[/] ").strip()
        except EOFError:
            return
        if not question:
            return
        yield question


def new_table(first: str, *others: str, **options: Any) -> Table:
    """Return an empty table: a column of names that may fold, and columns of numbers."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold", **options)
    table.add_column(first, overflow="fold")
    for title in others:
        table.add_column(title, justify="right")
    return table


def print_wide(table: Table) -> None:
    """Print a table that needs more columns than a pipe is taken to have. In a terminal without
    room for it, it is several tables with the same names, so that no number is broken."""
    output = OUTPUT if OUTPUT.is_terminal else page(WIDTH)
    for piece in _in_pieces(table, output):
        output.print(piece)


def page(width: int) -> Console:
    """Return a console of `width` columns, or of the terminal's where that has fewer."""
    columns = min(width, OUTPUT.width) if OUTPUT.is_terminal else width
    return Console(highlight=False, width=columns, stderr=OUTPUT.stderr, quiet=OUTPUT.quiet)


def print_narrow(table: Table, *spare: str, on: Console) -> None:
    """Print a table, without the first of its `spare` columns where it would be too wide."""
    columns, titles = list(range(len(table.columns))), list(spare)
    while titles and not _fits(table, columns, on):
        title = titles.pop(0)
        columns = [index for index in columns if table.columns[index].header != title]
    on.print(_part_of(table, columns))


def _in_pieces(table: Table, on: Console) -> Iterator[Table]:
    """Yield tables of the first column and as many of the others as fit."""
    others = [
        index
        for index, column in enumerate(table.columns)
        if index and (column.header or any(column.cells))
    ]
    title = table.title
    while others:
        count = 1
        while count < len(others) and _fits(table, [0, *others[: count + 1]], on):
            count += 1
        piece = _part_of(table, [0, *others[:count]])
        piece.title, title = title, None
        yield piece
        others = others[count:]


def _fits(table: Table, columns: Sequence[int], on: Console) -> bool:
    anything = on.options.update(max_width=1000)
    return Measurement.get(on, anything, _part_of(table, columns)).maximum <= on.width


def _part_of(table: Table, columns: Sequence[int]) -> Table:
    """Return a table of some columns of another."""
    chosen = [table.columns[index] for index in columns]
    fewer = new_table(
        "", padding=table.padding, title_justify=table.title_justify, title_style=table.title_style
    )
    fewer.columns.clear()
    for index, column in enumerate(chosen):
        fewer.columns.append(replace(column, _index=index, _cells=[]))
    for row, cells in zip(table.rows, zip(*(c.cells for c in chosen), strict=True), strict=True):
        fewer.add_row(*cells, style=row.style, end_section=row.end_section)
    return fewer


def print_json(value: object) -> None:
    """Print a value for other programs."""
    print(json.dumps(value, ensure_ascii=False, indent=2))


def refuse_to_replace(out: Path) -> None:
    """Raise VeneerError if `out` is a file, holds anything, or cannot be written to. What a killed
    process left of writing it goes."""
    if out.is_file():
        raise VeneerError(f"{out} is there already; name another place.")
    if out.exists() and any(out.iterdir()):
        raise VeneerError(f"{out} holds something already; name another place.")
    check_writable(out)
    remove_leftovers(out.parent, out.name)


def quieten_libraries() -> None:
    """Keep the libraries' own progress bars and advice out of our output; errors still show."""
    import logging as standard

    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    standard.getLogger("bitsandbytes").setLevel(standard.ERROR)
    # The reader of GGUF files has a bar of its own, which does not heed that switch.
    modeling_gguf_pytorch_utils.tqdm = logging.tqdm  # type: ignore[attr-defined]


def bytes_text(count: float) -> str:
    """Return a number of bytes as people read it, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit in ("B", "kB") else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError
