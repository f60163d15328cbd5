"""Everything that is cheap is checked before the base is loaded, and all of it is told at once."""

import errno
import os
import shutil
import tempfile
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest

import veneer
from support.random_adapters import tokenizer
from support.tiny_models import tiny
from veneer.errors import ConfigError, DataError, ModelError, TargetError, VeneerError
from veneer.training import preflight, tune
from veneer.training.recipe import DataConfig, Recipe


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Recipe:
    """A run that could begin, with a base whose weights cannot be loaded."""

    def load(*_, **__):
        raise AssertionError("the base was loaded")

    monkeypatch.setattr(tune, "load_base", load)
    tiny("llama").config.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    return Recipe(str(tmp_path / "base"), rows, out=tmp_path / "out")


def refusal(recipe: Recipe, **options: bool) -> VeneerError:
    with pytest.raises(VeneerError) as caught:
        list(veneer.tune(recipe, **options))
    assert not (recipe.out / "metrics.jsonl").exists()
    return caught.value


def missing_data(recipe):
    return replace(recipe, data=recipe.data.with_name("row.jsonl"))


def missing_eval_data(recipe):
    rows = DataConfig(eval_data=recipe.data.with_name("evals.jsonl"))
    return replace(recipe, rows=rows)


def wrong_target(recipe):
    return replace(recipe, lora=veneer.LoRA(targets="q_prj"))


def earlier_run(recipe):
    (recipe.out / "lora_adapter").mkdir(parents=True)
    return recipe


def out_in_a_file(recipe):
    return replace(recipe, out=recipe.data / "deep" / "out")


def foreign_adapter(recipe):
    (recipe.out / "lora_adapter").mkdir(parents=True)
    (recipe.out / "lora_adapter" / "diary.txt").write_text("mine")
    return recipe


def foreign_model(recipe):
    (recipe.out / "lora_merged").mkdir(parents=True)
    (recipe.out / "lora_merged" / "diary.txt").write_text("mine")
    return recipe


def no_base(recipe):
    return replace(recipe, model=recipe.model + "s")


@pytest.mark.parametrize(
    ("spoil", "kind", "says"),
    [
        (missing_data, DataError, "row.jsonl does not exist; did you mean 'rows.jsonl'?"),
        (missing_eval_data, DataError, "evals.jsonl does not exist"),
        (wrong_target, TargetError, "'q_prj' matches no layer; did you mean 'q_proj'?"),
        (earlier_run, ConfigError, "holds an earlier run (lora_adapter)"),
        (out_in_a_file, ConfigError, "rows.jsonl is a file; name another place than"),
        (no_base, ModelError, "bases' is no model here: no such directory"),
    ],
)
def test_a_mistake_alone_is_its_own_error(recipe, spoil, kind, says):
    error = refusal(spoil(recipe))
    assert isinstance(error, kind)
    assert says in str(error)
    assert "\n" not in str(error)


def test_paths_may_be_texts(recipe, tmp_path):
    held_out = DataConfig(eval_data=str(recipe.data))
    texts = Recipe(
        tmp_path / "base", str(recipe.data), rows=held_out, out=str(recipe.out), start_from="an"
    )
    assert texts == replace(
        recipe,
        data=str(recipe.data),
        rows=DataConfig(eval_data=recipe.data),
        start_from=Path("an"),
    )
    assert isinstance(texts.out, Path)


def test_a_recipe_of_wrong_things_names_them_all():
    with pytest.raises(ConfigError) as caught:
        Recipe(3, None, lora={"rank": 8}, out=4.5)
    assert str(caught.value) == (
        "This run cannot be: model is 3, but must be a name or a path; data is None, but must be "
        "a path or several; lora is {'rank': 8}, but must be of the class LoRA; out is 4.5, but "
        "must be a path."
    )


@pytest.mark.parametrize("spoil", [foreign_adapter, foreign_model])
def test_what_others_wrote_is_not_replaced(recipe, spoil):
    assert "holds other things" in str(refusal(spoil(recipe), force=True))


def test_all_mistakes_are_told_at_once(recipe):
    earlier_run(recipe)
    together = wrong_target(missing_data(missing_eval_data(recipe)))
    lines = str(refusal(together)).splitlines()
    assert lines[0] == "This run cannot begin, for 4 reasons:"
    for line, says in zip(
        lines[1:], ("earlier run", "row.jsonl", "evals.jsonl", "'q_proj'?"), strict=True
    ):
        assert line.startswith("  - ")
        assert says in line


def test_a_place_that_cannot_be_written_to_is_refused(recipe, monkeypatch):
    def refuse(dir: Path) -> NoReturn:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    message = str(refusal(recipe))
    assert f"{recipe.out.parent} cannot be written to (Read-only file system)" in message


def test_a_disk_without_room_for_the_results_is_refused(recipe, monkeypatch):
    Usage = namedtuple("Usage", "free")
    recipe = replace(recipe, lora=veneer.LoRA(targets="all", rank=2), dtype="float32")
    model = tiny("llama")
    parameters = sum(weight.numel() for weight in model.parameters())
    veneer.attach(model, recipe.lora)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    checkpoints = 4  # two of the newest, the best, and one that is being written
    needed = 4 * (parameters + trained + checkpoints * 3 * trained)  # with model and adapter
    recipe.out.mkdir()
    (recipe.out / "mine").write_text("It stays, and makes no room.")
    for free, enough in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda place, free=free: Usage(free))
        if enough:
            preflight.preflight(recipe, resume=False, force=False, ignore_space=False)
            continue
        error = str(refusal(recipe))
        assert "for the adapter" in error
        assert "for the merged model" in error
        assert "--ignore-plan" in error
        with pytest.raises(AssertionError, match="the base was loaded"):
            list(veneer.tune(recipe, ignore_plan=True))
