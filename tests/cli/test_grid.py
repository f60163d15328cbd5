"""Which row and column of the grid a layer gets."""

from io import StringIO

from rich.console import Console

from veneer.algebra.grid import OUTSIDE, grid_of
from veneer.cli.grid import grid_table


def test_blocks_are_rows_and_kinds_columns_by_their_last_names():
    grid = grid_of(
        ["model.layers.0.attn.q", "model.layers.0.mlp.up", "model.layers.1.attn.q", "lm_head"]
    )
    assert grid.rows == ("0", "1", OUTSIDE)
    assert grid.columns == ("q", "up", "lm_head")
    assert grid.cells["model.layers.1.attn.q"] == ("1", "q")
    assert grid.cells["lm_head"] == (OUTSIDE, "lm_head")


def test_names_that_would_be_the_same_stay_whole():
    grid = grid_of(["h.0.attn.c_proj", "h.0.mlp.c_proj", "h.0.mlp.c_fc"])
    assert grid.columns == ("attn.c_proj", "mlp.c_proj", "mlp.c_fc")
    two_stacks = grid_of(["encoder.block.0.k", "decoder.block.0.k"])
    assert two_stacks.rows == ("encoder.block.0", "decoder.block.0")
    assert len(set(two_stacks.cells.values())) == 2


def test_a_layer_inside_a_layer_belongs_to_the_outer_block():
    grid = grid_of(["layers.3.experts.0.up", "layers.3.experts.1.up"])
    assert grid.rows == ("3",)
    assert grid.columns == ("experts.0.up", "experts.1.up")


def test_what_is_not_there_leaves_its_field_empty():
    console = Console(width=80, record=True, file=StringIO())
    console.print(grid_table("All", {"h.0.q": "first", "h.1.k": "second"}))
    rows = [line.split() for line in console.export_text().splitlines()[3:]]
    assert rows == [["0", "first"], ["1", "second"]]
