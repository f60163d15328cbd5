"""Numbers of layers as a table, and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from veneer.algebra.grid import Grid, grid_of
from veneer.cli.console import new_table
from veneer.errors import VeneerError

# Dark to light, evenly to the eye and in grey alike (Nuñez et al. 2018).
COLOURS = "cividis"


@dataclass(frozen=True)
class Panel:
    """One heat map: a number for each layer; `span` holds the values of darkest and lightest."""

    title: str
    values: Mapping[str, float]
    text: str = "{:.3g}"
    span: tuple[float | None, float | None] = (0.0, None)


def grid_table(title: str, cells: Mapping[str, str]) -> Table:
    """Return a table of a text for each layer, by path."""
    grid = grid_of(list(cells))
    texts = {grid.cells[path]: text for path, text in cells.items()}
    table = new_table("Block", *grid.columns, title=title, title_justify="left", title_style="bold")
    for column in table.columns:
        column.justify, column.overflow = "right", "fold"
    for row in grid.rows:
        table.add_row(row, *(texts.get((row, column), "") for column in grid.columns))
    return table


def draw_heatmaps(panels: Sequence[Panel], path: Path) -> None:
    """Draw panels beside each other: a field for each layer, with its number in it.

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

    endings = pyplot.figure().canvas.get_supported_filetypes()
    pyplot.close()
    if path.suffix.removeprefix(".") not in endings:
        raise VeneerError(f"{path} is no picture's name; end it with .png, .pdf or .svg.")
    grid = grid_of(list(dict.fromkeys(p for panel in panels for p in panel.values)))
    height, width = 1.6 + 0.24 * len(grid.rows), 1.2 + 0.52 * len(grid.columns)
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(len(panels) * width, height), layout="constrained", squeeze=False
    )
    for ax, panel in zip(axes[0], panels, strict=True):
        _draw(ax, panel, grid)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw(ax: Any, panel: Panel, grid: Grid) -> None:
    from matplotlib.colors import Normalize

    values = {grid.cells[path]: value for path, value in panel.values.items()}
    empty = float("nan")
    cells = [[values.get((row, column), empty) for column in grid.columns] for row in grid.rows]
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
    ax.set_xticks(range(len(grid.columns)), grid.columns, rotation=60, ha="right", fontsize=7)
    ax.set_yticks(range(len(grid.rows)), grid.rows, fontsize=7)
    ax.set_ylabel("block", fontsize=7)
