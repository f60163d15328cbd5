"""Where layers stand in a grid of blocks and kinds."""

from io import StringIO

from rich.console import Console

from veneer.cli.grid import OUTSIDE, grid_table, places


def test_blocks_are_rows_and_kinds_columns_by_their_last_names():
    place = places(
        ["model.layers.0.attn.q", "model.layers.0.mlp.up", "model.layers.1.attn.q", "lm_head"]
    )
    assert place.rows == ("0", "1", OUTSIDE)
    assert place.columns == ("q", "up", "lm_head")
    assert place.of["model.layers.1.attn.q"] == ("1", "q")
    assert place.of["lm_head"] == (OUTSIDE, "lm_head")


def test_names_that_would_be_the_same_stay_whole():
    place = places(["h.0.attn.c_proj", "h.0.mlp.c_proj", "h.0.mlp.c_fc"])
    assert place.columns == ("attn.c_proj", "mlp.c_proj", "mlp.c_fc")
    two_stacks = places(["encoder.block.0.k", "decoder.block.0.k"])
    assert two_stacks.rows == ("encoder.block.0", "decoder.block.0")
    assert len(set(two_stacks.of.values())) == 2


def test_a_layer_inside_a_layer_belongs_to_the_outer_block():
    place = places(["layers.3.experts.0.up", "layers.3.experts.1.up"])
    assert place.rows == ("3",)
    assert place.columns == ("experts.0.up", "experts.1.up")


def test_what_is_not_there_leaves_its_field_empty():
    console = Console(width=80, record=True, file=StringIO())
    console.print(grid_table("All", {"h.0.q": "first", "h.1.k": "second"}))
    rows = [line.split() for line in console.export_text().splitlines()[3:]]
    assert rows == [["0", "first"], ["1", "second"]]
