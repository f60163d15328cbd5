"""Layers in a grid: a row for each block, a column for each kind of layer. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

IN_BLOCK = re.compile(r"(?P<stack>.*?)\.(?P<block>\d+)\.(?P<kind>.+)")
OUTSIDE = "–"  # the row for layers that are in no block


@dataclass(frozen=True)
class Grid:
    """The cell of each layer, {path: (row, column)}, and the rows and columns in their order."""

    cells: Mapping[str, tuple[str, str]]
    rows: tuple[str, ...]
    columns: tuple[str, ...]


def grid_of(paths: Sequence[str]) -> Grid:
    """Return the grid of layers, its rows and columns named as briefly as stays unambiguous."""
    matches = {path: IN_BLOCK.fullmatch(path) for path in paths}
    stacks = {match["stack"] for match in matches.values() if match}
    kinds = list(dict.fromkeys(m["kind"] if m else p for p, m in matches.items()))
    last = [kind.rpartition(".")[2] for kind in kinds]
    short = dict(zip(kinds, last if len(set(last)) == len(last) else kinds, strict=True))
    cells = {}
    for path, match in matches.items():
        block = OUTSIDE
        if match:
            block = match["block"] if len(stacks) == 1 else f"{match['stack']}.{match['block']}"
        cells[path] = block, short[match["kind"] if match else path]
    rows = dict.fromkeys(row for row, _ in cells.values())
    return Grid(cells, tuple(rows), tuple(short.values()))
