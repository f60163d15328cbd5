"""Methods and bases of `veneer tune` that are named in short: qlora, dora, and presets."""

from pathlib import Path

import pytest

from support.written_recipes import write_recipe
from veneer.cli.app import run
from veneer.training.recipe import Recipe


@pytest.mark.parametrize(
    ("short", "flags", "bits", "dora"),
    [
        ("qlora", [], 4, False),
        ("qlora", ["--bits", "8"], 8, False),
        ("qlora", ["--dora"], 4, True),
        ("dora", [], None, True),
        ("dora", ["--bits", "4"], 4, True),
    ],
)
@pytest.mark.thinned(one_in=2)
def test_qlora_and_dora_are_lora_with_their_settings(caught, tmp_path, short, flags, bits, dora):
    spelt_out = {"method": "lora", "bits": bits, "dora": dora}
    plain = write_recipe(tmp_path / "plain.yaml", Recipe("m", Path("d")).settings())
    given = {"model": "m", "data": "d", "method": short}
    given |= {"bits": bits} if "--bits" in flags else {}
    given |= {"dora": dora} if "--dora" in flags else {}
    for command in (
        ["m", "d", "--method", short, *flags],
        ["--config", str(plain), "--method", short, *flags],
        ["--config", str(write_recipe(tmp_path / "short.yaml", given))],
    ):
        assert run(["tune", *command]) == 0
        assert caught.recipe.settings() == Recipe("m", Path("d")).settings() | spelt_out


def test_what_contradicts_a_short_method_is_refused(caught, tmp_path, refused):
    error = refused("tune", "m", "d", "--method", "dora", "--no-dora")
    assert "--method dora and --no-dora exclude each other" in error
    assert "qlra" in refused("tune", "m", "d", "--method", "qlra")
    recipe = write_recipe(tmp_path / "odd.yaml", {"model": "m", "data": "d", "method": ["dora"]})
    assert "method" in refused("tune", "--config", recipe)
    assert caught.recipe is None


@pytest.mark.parametrize("command", ["tune", "compare", "quantize", "generate"])
def test_a_preset_without_weights_is_no_base(command, caught, refused):
    assert "shapes without weights" in refused(command, "qwen3-8b", "d")
    near = refused(command, "qwen3-7b", "d")
    assert "is no model here. Did you mean 'qwen3-8b' or 'qwen3-4b'? These are presets" in near
    assert caught.recipe is None
