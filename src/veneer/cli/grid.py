"""Figures of layers as they stand in a model: blocks downwards, kinds of layers across."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from veneer.cli.console import new_table
from veneer.errors import VeneerError

IN_BLOCK = re.compile(r"(?P<stack>.*?)\.(?P<block>\d+)\.(?P<kind>.+)")
OUTSIDE = "–"  # the row of layers that are in no block
# Dark to light, evenly to the eye and in grey alike (Nuñez et al. 2018).
COLOURS = "cividis"


@dataclass(frozen=True)
class Places:
    """Where each layer stands: {path: (row, column)}, and the rows and columns in their order."""

    of: Mapping[str, tuple[str, str]]
    rows: tuple[str, ...]
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Panel:
    """One picture of a figure of each layer; `span` is what the lightest and darkest stand for."""

    title: str
    values: Mapping[str, float]
    text: str = "{:.3g}"
    span: tuple[float | None, float | None] = (0.0, None)


def places(paths: Sequence[str]) -> Places:
    """Return rows and columns for layers: as short as they can be named without doubt."""
    found = {path: IN_BLOCK.fullmatch(path) for path in paths}
    stacks = {match["stack"] for match in found.values() if match}
    kinds = list(dict.fromkeys(m["kind"] if m else p for p, m in found.items()))
    last = [kind.rpartition(".")[2] for kind in kinds]
    short = dict(zip(kinds, last if len(set(last)) == len(last) else kinds, strict=True))
    where = {}
    for path, match in found.items():
        block = OUTSIDE
        if match:
            block = match["block"] if len(stacks) == 1 else f"{match['stack']}.{match['block']}"
        where[path] = block, short[match["kind"] if match else path]
    rows = dict.fromkeys(row for row, _ in where.values())
    return Places(where, tuple(rows), tuple(short.values()))


def grid_table(title: str, cells: Mapping[str, str]) -> Table:
    """Return a table of what there is to say of each layer, by path."""
    place = places(list(cells))
    at = {place.of[path]: text for path, text in cells.items()}
    table = new_table(
        "Block", *place.columns, title=title, title_justify="left", title_style="bold"
    )
    for column in table.columns:
        column.justify, column.overflow = "right", "fold"
    for row in place.rows:
        table.add_row(row, *(at.get((row, column), "") for column in place.columns))
    return table


def draw_heatmaps(panels: Sequence[Panel], path: Path) -> None:
    """Draw panels beside each other, each layer a field with its figure in it.

    Raises VeneerError where matplotlib, which comes with the extra `plot`, is not installed, and
    for a name that does not end like a picture's.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise VeneerError(
            "There is no picture without matplotlib: pip install 'veneer[plot]'"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    known = pyplot.figure().canvas.get_supported_filetypes()
    pyplot.close()
    if path.suffix.removeprefix(".") not in known:
        raise VeneerError(f"{path} is no picture's name; end it with .png, .pdf or .svg.")
    place = places(list(dict.fromkeys(p for panel in panels for p in panel.values)))
    height, width = 1.6 + 0.24 * len(place.rows), 1.2 + 0.52 * len(place.columns)
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(len(panels) * width, height), layout="constrained", squeeze=False
    )
    for ax, panel in zip(axes[0], panels, strict=True):
        _draw(ax, panel, place)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw(ax: Any, panel: Panel, place: Places) -> None:
    from matplotlib.colors import Normalize

    at = {place.of[path]: value for path, value in panel.values.items()}
    nothing = float("nan")
    cells = [[at.get((row, column), nothing) for column in place.columns] for row in place.rows]
    low, high = panel.span
    high = max(panel.values.values(), default=1.0) or 1.0 if high is None else high
    shade = Normalize(low, high)
    ax.imshow(cells, cmap=COLOURS, norm=shade, aspect="auto")
    for y, row in enumerate(cells):
        for x, value in enumerate(row):
            if value == value:
                colour = "white" if shade(value) < 0.55 else "black"
                text = panel.text.format(value)
                ax.text(x, y, text, ha="center", va="center", fontsize=6, color=colour)
    ax.set_title(panel.title, fontsize=9)
    ax.set_xticks(range(len(place.columns)), place.columns, rotation=60, ha="right", fontsize=7)
    ax.set_yticks(range(len(place.rows)), place.rows, fontsize=7)
    ax.set_ylabel("block", fontsize=7)
