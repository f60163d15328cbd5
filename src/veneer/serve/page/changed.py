"""How much an adapter changes each layer, beside the layer's own weight."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from veneer.algebra.grid import grid_of
from veneer.algebra.measure import inspect, is_dora
from veneer.formats.adapters import read
from veneer.serve.engine.base_weights import BaseWeights


@lru_cache(maxsize=64)
def changed(directory: Path, version: int, weights: BaseWeights | None) -> dict[str, Any]:
    """Return a grid of ‖ΔW‖ and ‖W‖: a row for each block, a column for each kind of layer.

    version: changes whenever the adapter's name is added again. weights: the base's, None where
    they cannot be measured. Raises AdapterError for an adapter without low-rank factors.
    """
    state = read(directory, None if weights is None else weights.model)
    layers = inspect(state)
    grid = grid_of([layer.path for layer in layers])
    notes = []
    if is_dora(state):
        notes.append("It is DoRA: B A is measured, without the lengths of the rows.")
    if state.new_tokens is not None:
        notes.append("Its new tokens are not measured.")
    cells = []
    for layer in layers:
        row, column = grid.cells[layer.path]
        weight = None if weights is None else weights.norm(layer.path)
        cells.append({"row": row, "column": column, "change": layer.norm, "weight": weight})
    return {"rows": grid.rows, "columns": grid.columns, "cells": cells, "note": " ".join(notes)}
